/* quantize_body.h: absmax quantization to NF4, FP4 and INT8, bit for bit as ops/quantize.c specifies it. */
#include "../core/sizes.h"
#include "../formats/weight.h"
#include "overlay.h"

#include <math.h>   /* isinf */
#include <string.h> /* memcpy, memset */

enum { TASK_ELEMENTS = 1 << 16 };
static const float smallest_absmax = 1e-38f; /* a denormal */

typedef struct {
    uint8_t *codes;
    float *scales;
    const float *x;
    ql_format format;
    int64_t count, group, blocks, blocks_per_task;
} quantize_context;

static vf load_part(const float *x, int64_t lanes) { return lanes == VL ? v_load(x) : v_load_tail(x, lanes); }

static float block_absmax(const float *x, int64_t count) {
    vf largest = v_zero();
    for (int64_t i = 0; i < count; i += VL) { largest = v_max(v_abs(load_part(x + i, at_most(VL, count - i))), largest); }
    return v_hmax(largest);
}

/* how many of the 15 ascending thresholds are below `unit`: four halvings, bit by bit */
static inline vi rank_of(vf unit, v_table thresholds) {
    const vi zero = vi_set1(0);
    vi rank = zero;
    for (int bit = 8; bit > 0; bit >>= 1) {
        vf middle = v_table_get(thresholds, vi_add(rank, vi_set1(bit - 1)));
        rank = vi_add(rank, vi_select(v_gt(unit, middle), vi_set1(bit), zero));
    }
    return rank;
}

typedef struct {
    v_table thresholds; /* 15, the last one is never asked for */
    v_table codes;      /* code of each rank, in the bits of the float */
} grid_tables;

static grid_tables tables_of(ql_format format) {
    float thresholds[16] = {0}, codes[16];
    memcpy(thresholds, format == QL_NF4 ? ql_nf4_thresholds : ql_fp4_thresholds, sizeof ql_nf4_thresholds);
    for (uint32_t rank = 0; rank < 16; rank++) { codes[rank] = ql_bits_to_float(format == QL_NF4 ? rank : ql_fp4_order[rank]); }
    return (grid_tables){v_table_load(thresholds), v_table_load(codes)};
}

/* a block begins at an even element: the group is even */
static void quantize_block_4bit(const quantize_context *c, int64_t block, grid_tables tables) {
    int64_t first = block * c->group, count = at_most(c->group, c->count - first);
    const float *x = c->x + first;
    int partial = count < c->group;
    float absmax = block_absmax(x, count), divisor = absmax > smallest_absmax ? absmax : smallest_absmax;
    c->scales[block] = partial ? divisor : absmax;
    vf inverse = v_set1(1.0f / divisor);
    for (int64_t i = 0; i < count; i += VL) {
        int64_t lanes = at_most(VL, count - i);
        vf part = load_part(x + i, lanes); /* beyond the count: 0, which pads an odd one */
        vf unit = partial ? v_div(part, v_set1(divisor)) : v_mul(part, inverse);
        vi codes = vf_as_vi(v_table_get(tables.codes, rank_of(unit, tables.thresholds)));
        uint8_t bytes[VL / 2];
        vi_store_nibbles(bytes, codes);
        memcpy(c->codes + (first + i) / 2, bytes, lanes == VL ? VL / 2 : (size_t)(lanes + 1) / 2);
    }
}

static void quantize_row_int8(int8_t *codes, float *scale, const float *x, int64_t count) {
    float absmax = block_absmax(x, count), factor = 1.0f / absmax * 127.0f;
    *scale = absmax;
    if (isinf(factor)) {
        memset(codes, 0, (size_t)count);
        return;
    }
    for (int64_t i = 0; i < count; i += VL) {
        int64_t lanes = at_most(VL, count - i);
        int8_t bytes[VL];
        vi_store_i8(bytes, vi_from_vf(v_mul(load_part(x + i, lanes), v_set1(factor))));
        memcpy(codes + i, bytes, lanes == VL ? VL : (size_t)lanes);
    }
}

static void quantize_blocks(void *context, int64_t task) {
    const quantize_context *c = context;
    int64_t begin = task * c->blocks_per_task, end = at_most(begin + c->blocks_per_task, c->blocks);
    grid_tables tables = tables_of(c->format);
    for (int64_t block = begin; block < end; block++) {
        if (c->format == QL_INT8) {
            int64_t first = block * c->group;
            quantize_row_int8((int8_t *)c->codes + first, c->scales + block, c->x + first, c->group);
        } else {
            quantize_block_4bit(c, block, tables);
        }
    }
}

void V_NAME(quantize_forward)(void *codes, float *scales, const float *x, ql_format format, int64_t count, int64_t group) {
    if (format != QL_INT8 && group % 2 != 0 && group < count) { /* blocks share bytes: nobody's format, kept in one place */
        ql_quantize_forward_scalar(codes, scales, x, format, count, group);
        return;
    }
    quantize_context c = {codes, scales, x, format, count, group, 0, 0};
    c.blocks = (count + group - 1) / group;
    c.blocks_per_task = group < TASK_ELEMENTS ? TASK_ELEMENTS / group : 1;
    ql_parallel_for((c.blocks + c.blocks_per_task - 1) / c.blocks_per_task, quantize_blocks, &c);
}
