/* gguf.c: the blocks of GGUF's quantized types (ggml's docs/gguf.md and ggml-common.h) as float32: scale times code, then plus
 * or minus the least value where there is one, each rounded. A plain block has 32 values and a float16 scale; a K block has 256
 * and in it small codes that times one float16 scale are the scales of 16 or 32 values. Codes are put together as bytes, then
 * made floats: both loops are of a fixed length, which compilers make vectors of. */
#include "gguf.h"

#include "../core/half.h"
#include "../core/sizes.h"

enum {
    PLAIN = 32,
    LARGE = 256,
    HALF = LARGE / 2, /* 2-bit codes: a byte holds the values i, 32 + i, 64 + i, 96 + i of half a block */
    VALUES_PER_TASK = 65536,
};

typedef struct {
    float *out;
    const uint8_t *blocks;
    int64_t count;
    const ql_gguf_type *type;
} decode_context;

static float half_at(const uint8_t *bytes) { return ql_f16_to_float((uint16_t)(bytes[0] | bytes[1] << 8)); }

QL_INLINE void scaled(float *out, const int8_t *codes, int count, float scale) {
    for (int i = 0; i < count; i++) { out[i] = scale * (float)codes[i]; }
}

QL_INLINE void shifted(float *out, const int8_t *codes, int count, float scale, float least) {
    for (int i = 0; i < count; i++) { out[i] = scale * (float)codes[i] + least; }
}

/* ---- codes ------------------------------------------------------------------------------------------------------------------- */

/* Four bits: the low halves of `count` bytes, then their high halves */
QL_INLINE void nibbles(int8_t *codes, const uint8_t *bytes, int count) {
    for (int i = 0; i < count; i++) { codes[i] = (int8_t)(bytes[i] & 15); }
    for (int i = 0; i < count; i++) { codes[count + i] = (int8_t)(bytes[i] >> 4); }
}

/* Two bits of `count` bytes, those from `shift` on, times `unit`, to codes that have room for them */
QL_INLINE void add_pairs(int8_t *codes, const uint8_t *bytes, int count, int shift, int unit) {
    for (int i = 0; i < count; i++) { codes[i] = (int8_t)(codes[i] + (bytes[i] >> shift & 3) * unit); }
}

/* Bit i of 32 is the fifth of code i; by masks, since SSE2 has no shifts by different counts. */
QL_INLINE void add_fifth_bits(int8_t *codes, const uint8_t *bytes) {
    static const uint8_t place[8] = {1, 2, 4, 8, 16, 32, 64, 128};
    for (int i = 0; i < PLAIN / 8; i++) {
        for (int j = 0; j < 8; j++) { codes[8 * i + j] = (int8_t)(codes[8 * i + j] + (bytes[i] & place[j] ? 16 : 0)); }
    }
}

/* ---- blocks of 32 ------------------------------------------------------------------------------------------------------------ */

static void decode_q8_0(float *out, const uint8_t *block) { scaled(out, (const int8_t *)block + 2, PLAIN, half_at(block)); }

static void decode_q4_0(float *out, const uint8_t *block) {
    int8_t codes[PLAIN];
    nibbles(codes, block + 2, PLAIN / 2);
    for (int i = 0; i < PLAIN; i++) { codes[i] = (int8_t)(codes[i] - 8); }
    scaled(out, codes, PLAIN, half_at(block));
}

static void decode_q4_1(float *out, const uint8_t *block) {
    int8_t codes[PLAIN];
    nibbles(codes, block + 4, PLAIN / 2);
    shifted(out, codes, PLAIN, half_at(block), half_at(block + 2));
}

static void decode_q5_0(float *out, const uint8_t *block) {
    int8_t codes[PLAIN];
    nibbles(codes, block + 6, PLAIN / 2);
    add_fifth_bits(codes, block + 2);
    for (int i = 0; i < PLAIN; i++) { codes[i] = (int8_t)(codes[i] - 16); }
    scaled(out, codes, PLAIN, half_at(block));
}

static void decode_q5_1(float *out, const uint8_t *block) {
    int8_t codes[PLAIN];
    nibbles(codes, block + 8, PLAIN / 2);
    add_fifth_bits(codes, block + 4);
    shifted(out, codes, PLAIN, half_at(block), half_at(block + 2));
}

/* out (32): the values that 4-bit codes stand for in IQ4 */
static void decode_nonlinear(float *out, const uint8_t *bytes, float scale) {
    static const int8_t values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    float table[16];
    scaled(table, values, 16, scale);
    for (int i = 0; i < PLAIN / 2; i++) {
        out[i] = table[bytes[i] & 15];
        out[PLAIN / 2 + i] = table[bytes[i] >> 4];
    }
}

static void decode_iq4_nl(float *out, const uint8_t *block) { decode_nonlinear(out, block + 2, half_at(block)); }

/* ---- blocks of 256 ----------------------------------------------------------------------------------------------------------- */

/* scales (16 bytes: scale, least), codes (64), scale, scale of the least */
static void decode_q2_k(float *out, const uint8_t *block) {
    float scale = half_at(block + 80), least = -half_at(block + 82);
    int8_t codes[LARGE] = {0};
    for (int i = 0; i < 8; i++) { add_pairs(codes + 32 * i, block + 16 + i / 4 * 32, 32, i % 4 * 2, 1); }
    for (int i = 0; i < 16; i++) {
        shifted(out + 16 * i, codes + 16 * i, 16, scale * (float)(block[i] & 15), least * (float)(block[i] >> 4));
    }
}

/* high bits (32), low codes (64), scales (12), scale */
static void decode_q3_k(float *out, const uint8_t *block) {
    const uint8_t *scales = block + 96;
    float scale = half_at(block + 108);
    int8_t codes[LARGE];
    for (int i = 0; i < 8; i++) {
        for (int j = 0; j < 32; j++) { codes[32 * i + j] = (int8_t)((block[j] >> i & 1) * 4 - 4); }
        add_pairs(codes + 32 * i, block + 32 + i / 4 * 32, 32, i % 4 * 2, 1);
    }
    for (int i = 0; i < 16; i++) { /* 16 low halves, then the two high bits of four scales to a byte */
        int low = i < 8 ? scales[i] & 15 : scales[i - 8] >> 4, high = scales[8 + i % 4] >> i / 4 * 2 & 3;
        scaled(out + 16 * i, codes + 16 * i, 16, scale * (float)((low | high << 4) - 32));
    }
}

/* 8 times 32 codes with the 6-bit scales and least values of Q4_K and Q5_K. block: scale, scale of the least, and 12 bytes: the
 * first four scales and least values in six bits each, the last four in four bits and the two that are left over there */
static void put_q45_k(float *out, const int8_t *codes, const uint8_t *block) {
    const uint8_t *scales = block + 4, *leasts = block + 8, *last = block + 12;
    float scale = half_at(block), least = -half_at(block + 2);
    for (int i = 0; i < 4; i++) {
        shifted(out + 32 * i, codes + 32 * i, 32, scale * (float)(scales[i] & 63), least * (float)(leasts[i] & 63));
    }
    for (int i = 0; i < 4; i++) {
        int a = (last[i] & 15) | scales[i] >> 6 << 4, b = last[i] >> 4 | leasts[i] >> 6 << 4;
        shifted(out + 32 * (4 + i), codes + 32 * (4 + i), 32, scale * (float)a, least * (float)b);
    }
}

static void decode_q4_k(float *out, const uint8_t *block) {
    int8_t codes[LARGE];
    for (int i = 0; i < 4; i++) { nibbles(codes + 64 * i, block + 16 + 32 * i, 32); }
    put_q45_k(out, codes, block);
}

static void decode_q5_k(float *out, const uint8_t *block) {
    const uint8_t *fifth = block + 16; /* bit i of byte j: of value 32 i + j */
    int8_t codes[LARGE];
    for (int i = 0; i < 4; i++) { nibbles(codes + 64 * i, block + 48 + 32 * i, 32); }
    for (int i = 0; i < 8; i++) {
        for (int j = 0; j < 32; j++) { codes[32 * i + j] = (int8_t)(codes[32 * i + j] | (fifth[j] >> i & 1) << 4); }
    }
    put_q45_k(out, codes, block);
}

/* low halves of the codes (128), their high two bits (64), scales (16), scale */
static void decode_q6_k(float *out, const uint8_t *block) {
    const int8_t *scales = (const int8_t *)block + 192;
    float scale = half_at(block + 208);
    int8_t codes[LARGE];
    for (int i = 0; i < 2; i++) { nibbles(codes + HALF * i, block + HALF / 2 * i, HALF / 2); }
    for (int i = 0; i < 8; i++) { add_pairs(codes + 32 * i, block + 128 + i / 4 * 32, 32, i % 4 * 2, 16); }
    for (int i = 0; i < LARGE; i++) { codes[i] = (int8_t)(codes[i] - 32); }
    for (int i = 0; i < 16; i++) { scaled(out + 16 * i, codes + 16 * i, 16, scale * (float)scales[i]); }
}

/* scale, the high two bits of the scales of 32 (2 bytes), their low halves (4), codes (128) */
static void decode_iq4_xs(float *out, const uint8_t *block) {
    float scale = half_at(block);
    int high = block[2] | block[3] << 8;
    for (int i = 0; i < 8; i++) {
        int code = (block[4 + i / 2] >> i % 2 * 4 & 15) | (high >> 2 * i & 3) << 4;
        decode_nonlinear(out + 32 * i, block + 8 + 16 * i, scale * (float)(code - 32));
    }
}

/* ------------------------------------------------------------------------------------------------------------------------------ */

const ql_gguf_type ql_gguf_types[] = {
    {"Q8_0", PLAIN, 34, decode_q8_0},
    {"Q4_0", PLAIN, 18, decode_q4_0},
    {"Q4_1", PLAIN, 20, decode_q4_1},
    {"Q5_0", PLAIN, 22, decode_q5_0},
    {"Q5_1", PLAIN, 24, decode_q5_1},
    {"Q2_K", LARGE, 84, decode_q2_k},
    {"Q3_K", LARGE, 110, decode_q3_k},
    {"Q4_K", LARGE, 144, decode_q4_k},
    {"Q5_K", LARGE, 176, decode_q5_k},
    {"Q6_K", LARGE, 210, decode_q6_k},
    {"IQ4_NL", PLAIN, 18, decode_iq4_nl},
    {"IQ4_XS", LARGE, 136, decode_iq4_xs},
    {NULL, 0, 0, NULL},
};

static void decode_task(void *context, int64_t task) {
    const decode_context *c = context;
    const ql_gguf_type *type = c->type;
    int64_t count = VALUES_PER_TASK / type->values, begin = task * count, end = at_most(begin + count, c->count);
    for (int64_t i = begin; i < end; i++) { type->decode(c->out + i * type->values, c->blocks + i * type->bytes); }
}

void ql_gguf_decode(float *out, const uint8_t *blocks, int64_t count, const ql_gguf_type *type) {
    decode_context context = {out, blocks, count, type};
    ql_parallel_for(pieces(count, VALUES_PER_TASK / type->values), decode_task, &context);
}
