/* gemv_amx.h: what the two kernels of products with few rows share, where W is integers in panels (formats/packed.h): byte products
 * in vectors (gemv_amx.c) and on tiles (few_amx.c). Both add up the same integers, so their results have the same bits. */
#ifndef QL_GEMV_AMX_H
#define QL_GEMV_AMX_H

#include "limbs_amx.h"
#include "panels.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline)) /* m, bits and the like are constants after inlining */

enum {
    AHEAD = 2048, /* bytes of a stream: memory answers late */
    CHUNK = 64    /* columns of a tile product */
};

typedef struct {
    float *y;              /* (m, n) */
    int8_t *limbs;         /* (m, LIMBS, ld), the highest limb first; on tiles see few_amx.c */
    int32_t *begin;        /* (m, groups, LIMBS, lanes) what sums begin at; lanes: 1 in panels, VL in rows */
    float *scales, *sums;  /* (m, groups) of the integers of a group; the sum of its x, where W has zeros */
    const ql_weight *w;
    const void *codes;
    ql_packed_layout l;
    int64_t m, ld, groups, part, tasks; /* part: panels or rows of a task */
    int tiles;             /* 0, or of 16 rows of limbs, those of one row of x side by side */
    void (*task)(void *context, int64_t i);
    int accumulate;
} gemv_product;

/* of a panel of `bits` bits, as ql_packed_layout has them: rows, and codes of a row in a block; constants after inlining */
static inline int rows_of(int bits) { return bits == 4 ? 32 : 64; }
static inline int step_of(int bits) { return bits == 4 ? 8 : bits == 2 ? 16 : 32; }

/* total + the sums of group `group` of row r of x, scaled, for the vector of W whose scales are at `scales`, its offsets `to`
 * bytes on */
static inline vf add_group(const gemv_product *g, vf total, const vi sum[LIMBS], const uint32_t *scales, int64_t to, int64_t r,
                           int64_t group) {
    int64_t at = r * g->groups + group;
    vf value = v_mul(join_limbs(sum[0], sum[1], sum[2]), v_set1(g->scales[at]));
    if (g->l.zeros) { value = v_fnma(vi_to_vf(vi_load_i16((const char *)scales + to)), v_set1(g->sums[at]), value); }
    return v_fma(value, v_load((const float *)(const void *)scales), total);
}

/* VL elements of row r of y from column i, as many as there are */
static inline void store_lanes(const gemv_product *g, int64_t r, int64_t i, vf value) {
    int64_t count = at_most(VL, g->w->n - i);
    if (count < 1) { return; }
    float *y = g->y + r * g->w->n + i;
    v_store_tail(y, g->accumulate ? v_add(v_load_tail(y, count), value) : value, count);
}

/* four codes a lane of a block whose words of these lanes begin at p, one to a byte; 0 <= h < step / 4 says which */
ALWAYS_INLINE vi codes_of(const uint32_t *p, const int bits, const int h) {
    if (bits == 4) { return vi_and(vi_shr(vi_load(p), (unsigned)(4 * h)), vi_set1(0x0f0f0f0f)); }
    vi low = vi_and(vi_shr(vi_load(p + h / 4 * 64), (unsigned)(h % 4 * 2)), vi_set1(0x03030303));
    if (bits == 2) { return low; }
    vi high = vi_load(p + 2 * 64); /* bit 2 of a code at bit h of its byte */
    high = h < 2 ? vi_shl(high, (unsigned)(2 - h)) : vi_shr(high, (unsigned)(h - 2));
    return vi_or(vi_and(high, vi_set1(0x04040404)), low);
}

/* panels [panel, end) for all rows of x */
void ql_few_panels_amx(const gemv_product *g, int64_t panel, int64_t end);

#endif
