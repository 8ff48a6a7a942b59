/* quantize.c: absmax quantization: NF4 and FP4 by blocks of the flat tensor, INT8 by rows. The rules, to the last bit,
 * are those of bitsandbytes' CPU path (quantize_4bit, int8_vectorwise_quant); NaN and infinity are refused above.
 *
 * NF4, FP4: scale = absmax of the block. A full block encodes x * (1 / max(absmax, 1e-38)); the last, shorter block
 * encodes x / max(absmax, 1e-38) and stores that maximum as its scale. An odd count is padded by one zero element.
 * INT8: scale = absmax of the row, code = round to even of x * (1 / absmax * 127); 0 where that factor is infinite. */
#include "../formats/weight.h"

#include <math.h> /* fabsf, isinf, nearbyintf */

enum { BLOCKS_PER_TASK = 64 }; /* even, so that two tasks never share a byte whatever the block size */
static const float smallest_absmax = 1e-38f; /* a denormal */

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

static uint8_t encode(ql_format format, float unit) {
    return format == QL_NF4 ? ql_nf4_encode(unit) : ql_fp4_encode(unit);
}

static void quantize_row_int8(int8_t *codes, float *scale, const float *x, int64_t count) {
    float absmax = block_absmax(x, count), factor = 1.0f / absmax * 127.0f;
    for (int64_t i = 0; i < count; i++) { codes[i] = isinf(factor) ? 0 : (int8_t)nearbyintf(x[i] * factor); }
    *scale = absmax;
}

static void quantize_block_4bit(const quantize_context *c, int64_t block) {
    int64_t first = block * c->group, count = c->count - first < c->group ? c->count - first : c->group;
    int partial = count < c->group;
    float absmax = block_absmax(c->x + first, count);
    float divisor = absmax > smallest_absmax ? absmax : smallest_absmax, inverse = 1.0f / divisor;
    c->scales[block] = partial ? divisor : absmax;
    for (int64_t i = first; i < first + count; i++) {
        uint8_t code = encode(c->format, partial ? c->x[i] / divisor : c->x[i] * inverse);
        c->codes[i / 2] = i & 1 ? (uint8_t)(c->codes[i / 2] | code) : (uint8_t)(code << 4);
    }
    if (first + count == c->count && c->count & 1) { c->codes[c->count / 2] |= encode(c->format, 0.0f); }
}

static void quantize_blocks(void *context, int64_t task) {
    const quantize_context *c = context;
    int64_t blocks = (c->count + c->group - 1) / c->group;
    int64_t end = (task + 1) * BLOCKS_PER_TASK < blocks ? (task + 1) * BLOCKS_PER_TASK : blocks;
    for (int64_t block = task * BLOCKS_PER_TASK; block < end; block++) {
        if (c->format == QL_INT8) {
            int64_t first = block * c->group;
            quantize_row_int8((int8_t *)c->codes + first, c->scales + block, c->x + first, c->group);
        } else {
            quantize_block_4bit(c, block);
        }
    }
}

/* INT8: count is a multiple of group */
void ql_quantize_forward_scalar(void *codes, float *scales, const float *x, ql_format format, int64_t count,
                                int64_t group) {
    quantize_context context = {codes, scales, x, format, count, group};
    int64_t blocks = (count + group - 1) / group;
    ql_parallel_for((blocks + BLOCKS_PER_TASK - 1) / BLOCKS_PER_TASK, quantize_blocks, &context);
}
