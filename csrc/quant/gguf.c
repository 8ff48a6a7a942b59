/* gguf.c: the blocks of 32 values of GGUF's plain quantized types (ggml's docs/gguf.md), as float32: scale times code, then
 * plus the least value where there is one, each rounded. Four bits: byte i holds value i in its low half, 16 + i in its high. */
#include "gguf.h"

#include "../core/half.h"

enum { BLOCKS_PER_TASK = 2048 }; /* 256 KB of values */

typedef struct {
    float *out;
    const uint8_t *blocks;
    int64_t count;
    ql_gguf_kind kind;
} decode_context;

int64_t ql_gguf_block_bytes(ql_gguf_kind kind) { return kind == QL_GGUF_Q8_0 ? 34 : kind == QL_GGUF_Q4_1 ? 20 : 18; }

static float half_at(const uint8_t *bytes) { return ql_f16_to_float((uint16_t)(bytes[0] | bytes[1] << 8)); }

static void decode_q8_0(float *out, const uint8_t *block) {
    float scale = half_at(block);
    for (int i = 0; i < QL_GGUF_BLOCK; i++) { out[i] = scale * (float)(int8_t)block[2 + i]; }
}

static void decode_q4_0(float *out, const uint8_t *block) {
    float scale = half_at(block);
    for (int i = 0; i < QL_GGUF_BLOCK / 2; i++) {
        out[i] = scale * (float)((block[2 + i] & 15) - 8);
        out[QL_GGUF_BLOCK / 2 + i] = scale * (float)((block[2 + i] >> 4) - 8);
    }
}

static void decode_q4_1(float *out, const uint8_t *block) {
    float scale = half_at(block), least = half_at(block + 2);
    for (int i = 0; i < QL_GGUF_BLOCK / 2; i++) {
        out[i] = scale * (float)(block[4 + i] & 15) + least;
        out[QL_GGUF_BLOCK / 2 + i] = scale * (float)(block[4 + i] >> 4) + least;
    }
}

static void decode_task(void *context, int64_t task) {
    const decode_context *c = context;
    int64_t begin = task * BLOCKS_PER_TASK, end = begin + BLOCKS_PER_TASK < c->count ? begin + BLOCKS_PER_TASK : c->count;
    int64_t bytes = ql_gguf_block_bytes(c->kind);
    for (int64_t i = begin; i < end; i++) {
        float *out = c->out + i * QL_GGUF_BLOCK;
        const uint8_t *block = c->blocks + i * bytes;
        switch (c->kind) {
        case QL_GGUF_Q8_0: decode_q8_0(out, block); break;
        case QL_GGUF_Q4_0: decode_q4_0(out, block); break;
        case QL_GGUF_Q4_1: decode_q4_1(out, block); break;
        }
    }
}

void ql_gguf_decode(float *out, const uint8_t *blocks, int64_t count, ql_gguf_kind kind) {
    decode_context context = {out, blocks, count, kind};
    ql_parallel_for((count + BLOCKS_PER_TASK - 1) / BLOCKS_PER_TASK, decode_task, &context);
}
