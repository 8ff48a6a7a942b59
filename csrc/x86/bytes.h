/* bytes.h: what products with few rows share, those of bytes in vectors (bytes_body.h) and those on tiles (few_amx.c). In panels of
 * integers (formats/packed.h) both add up the same numbers in the same order, so results have the same bits. */
#ifndef QL_BYTES_H
#define QL_BYTES_H

#include "limbs.h"
#include "panels.h"

enum {
    LEVEL_ONE = 32767, /* 1 where codes are looked up, and become integers */
    AHEAD = 2048, /* bytes of a stream: memory answers late */
    CHUNK = 64,   /* columns of a tile product */
    LINES = 16,   /* of a tile */
    BYTE_ROWS = 32
};

typedef struct {
    float *y;              /* (m, n) */
    int8_t *limbs;         /* (m, LIMBS, ld), the highest limb first; on tiles see few_amx.c */
    int32_t *begin;        /* (m, groups, LIMBS, lanes) what sums begin at; lanes: VL in vectors of rows, else 1 */
    float *scales, *sums;  /* (m, groups) of the integers of a group; the sum of its x, where W has zeros */
    const ql_weight *w;
    const void *codes;
    ql_packed_layout l;
    int64_t m, ld, groups, part; /* part: of a task: panels, rows, or on tiles BYTE_ROWS of them each */
    int64_t stride;        /* bytes from one row of bytes to the next */
    int32_t middle;        /* of the unsigned codes: what stands for 0 */
    int tiles;             /* 0, or of 16 rows of limbs, those of one row of x side by side */
    int halves;            /* 1, or 2: codes are looked up, and become two bytes each */
    void (*task)(void *context, int64_t i);
    int accumulate;
} gemv_product;

/* limbs of x that a product has: all, or the higher two where codes have no more bits either */
static inline int kept_limbs(int halves) { return halves == 2 ? 2 : LIMBS; }

/* of a panel of `bits` bits, as ql_packed_layout has them: rows, and codes of a row in a block; constants after inlining */
static inline int rows_of(int bits) { return bits == 4 ? 32 : 64; }
static inline int step_of(int bits) { return bits == 4 ? 8 : bits == 2 ? 16 : 32; }

/* what a group of a vector of rows of W is multiplied by, and its zeros less the middle */
typedef struct { vf scale, offset; } group_scale;

/* those of vector v of `rows` rows in each of some panels, from lane `lane` of the group's head on */
static inline group_scale panel_scale(const gemv_product *g, const uint32_t *head, int64_t lane, int v, int rows) {
    const uint32_t *panel = lanes_of(head, &g->l, v / (rows / VL) * (rows / VL), rows);
    int64_t first = lane + v % (rows / VL) * VL;
    const int16_t *offsets = (const int16_t *)(const void *)(panel + rows);
    return (group_scale){v_load((const float *)(const void *)(panel + first)),
                         g->l.zeros ? vi_to_vf(vi_load_i16(offsets + first)) : v_zero()};
}

/* total + the sums of group `group` of row r of x, scaled */
static inline vf add_group(const gemv_product *g, vf total, const vi sum[LIMBS], group_scale by, int64_t r, int64_t group) {
    int64_t at = r * g->groups + group;
    vf value = v_mul(join_limbs(sum[0], sum[1], sum[2]), v_set1(g->scales[at]));
    if (g->w->zeros != NULL) { value = v_fnma(by.offset, v_set1(g->sums[at]), value); }
    return v_fma(value, by.scale, total);
}

/* four codes a lane of a block whose words of these lanes begin at p, one to a byte; 0 <= h < step / 4 says which */
ALWAYS_INLINE vi codes_of(const uint32_t *p, const int bits, const int h) {
    if (bits == 4) { return vi_and(vi_shr(vi_load(p), (unsigned)(4 * h)), vi_set1(0x0f0f0f0f)); }
    vi low = vi_and(vi_shr(vi_load(p + h / 4 * 64), (unsigned)(h % 4 * 2)), vi_set1(0x03030303));
    if (bits == 2) { return low; }
    vi high = vi_load(p + 2 * 64); /* bit 2 of a code at bit h of its byte */
    high = h < 2 ? vi_shl(high, (unsigned)(2 - h)) : vi_shr(high, (unsigned)(h - 2));
    return select_bits(vi_set1(0x04040404), high, low);
}

/* panels [first, end), or BYTE_ROWS rows of bytes each, for all rows of x */
void ql_few_amx(const gemv_product *g, int64_t first, int64_t end);

#endif
