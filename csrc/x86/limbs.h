/* limbs.h: floats as integers of 24 bits that have one scale, max|x| / MOST: about the rounding of float32 at the largest of them. An
 * integer is three signed bytes, its limbs, the highest first; sums of their products are exact in int32. What holds an infinity or a NaN
 * has that for its largest, and its integers are 0: products with it are NaN. */
#ifndef QL_LIMBS_H
#define QL_LIMBS_H

#include "vec_avx512.h"

#include <string.h> /* memcpy */

enum {
    LIMBS = 3,
    MOST = 127 << 16 /* its limbs are 127, 0, 0 */
};

typedef struct {
    float most;        /* max|x|; the scale itself would lose digits where it is denormal */
    float up, inverse; /* integer = x * up * inverse: the inverse alone of a small scale would not be finite */
} limb_scale;

/* the larger of `bits` and |x| as bits: so a NaN is the largest */
static inline vi larger_bits(vi bits, vf x) { return _mm512_max_epi32(bits, vi_and(vf_as_vi(x), vi_set1(INT32_MAX))); }

static inline limb_scale limb_scale_of(int32_t largest) {
    float most;
    memcpy(&most, &largest, sizeof most);
    float up = most < 0x1p-64f ? 0x1p64f : 1.0f;
    return (limb_scale){most, up, most > 0.0f ? MOST / (most * up) : 0.0f};
}

static inline vi to_integers(vf x, vf up, vf inverse) { return vi_from_vf(v_mul(v_mul(x, up), inverse)); }

/* The lowest three bytes of each lane are the limbs, the lowest limb first: a limb of 128 and more is 256 less and the next one more. */
static inline vi to_limbs(vi integers) { return _mm512_xor_si512(vi_add(integers, vi_set1(0x8080)), vi_set1(0x8080)); }

/* Of the 16 fours of 64 values: where in a line of limbs four `i` stands. A 4 x 4 of them is transposed. */
static inline int64_t place_of_four(int64_t i) { return i % 4 * 4 + i / 4; }

/* limbs of 64 values to three lines of 64 bytes, `plane` elements of 16 bits apart */
static inline void store_limbs(uint16_t *out, int64_t plane, const vi limbs[4]) {
    const vi by_limb = _mm512_broadcast_i32x4(_mm_setr_epi8(2, 6, 10, 14, 1, 5, 9, 13, 0, 4, 8, 12, 3, 7, 11, 15));
    vi four[4];
    for (int q = 0; q < 4; q++) { four[q] = _mm512_shuffle_epi8(limbs[q], by_limb); }
    vi high01 = _mm512_unpacklo_epi32(four[0], four[1]), high23 = _mm512_unpacklo_epi32(four[2], four[3]); /* limbs 0 and 1 */
    vi low01 = _mm512_unpackhi_epi32(four[0], four[1]), low23 = _mm512_unpackhi_epi32(four[2], four[3]);   /* limb 2 */
    _mm512_store_si512(out, _mm512_unpacklo_epi64(high01, high23));
    _mm512_store_si512(out + plane, _mm512_unpackhi_epi64(high01, high23));
    _mm512_store_si512(out + 2 * plane, _mm512_unpacklo_epi64(low01, low23));
}

/* the sums of products of limbs (or of limbs alone) as one number, the highest first, each 256 of the next */
static inline vf join_limbs(vi high, vi middle, vi low) {
    vf sum = v_fma(vi_to_vf(high), v_set1(256.0f), vi_to_vf(middle));
    return v_fma(sum, v_set1(256.0f), vi_to_vf(low));
}

/* what 1 is worth in the sums of products whose places add up to 2 (0 0, 0 1 and so on are the higher ones), where the largest values
 * are 1. Those are multiplied by only then: the unit times a small one would lose digits. */
static inline vf product_unit(void) { return v_set1(65536.0f / ((float)MOST * MOST)); }

/* the bits of a where mask has them set, else those of b */
static inline vi select_bits(vi mask, vi a, vi b) { return _mm512_ternarylogic_epi32(mask, a, b, 0xCA); }

/* limb l of four values each, lane by lane: the first value's in the lowest byte */
static inline void limbs_of_four(vi out[LIMBS], const vi limbs[4]) {
    const vi even = vi_set1(0x00FF00FF), low = vi_set1(0x0000FFFF);
    vi bytes02[2], bytes13[2]; /* of two values: bytes 0 and 2 of each, 1 and 3 */
    for (int i = 0; i < 2; i++) {
        vi first = limbs[2 * i], second = limbs[2 * i + 1];
        bytes02[i] = select_bits(even, first, vi_shl(second, 8));
        bytes13[i] = select_bits(even, vi_shr(first, 8), second);
    }
    out[0] = select_bits(low, vi_shr(bytes02[0], 16), bytes02[1]);
    out[1] = select_bits(low, bytes13[0], vi_shl(bytes13[1], 16));
    out[2] = select_bits(low, bytes02[0], vi_shl(bytes02[1], 16));
}

#endif
