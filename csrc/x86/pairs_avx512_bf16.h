/* pairs_avx512_bf16.h: float32 to pairs of bf16, a word each, rounded to nearest even, and their products: what gemm_body.h takes for GEMM_PAIRS. */
#ifndef QL_PAIRS_AVX512_BF16_H
#define QL_PAIRS_AVX512_BF16_H

#include "../core/sizes.h"
#include "vec_avx512.h"

/* sum + the two products of each word of a and b; denormals count as zeros */
static inline vf v_multiply_pairs(vf a, vf b, vf sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

/* 32 floats as bf16, to nearest even */
static inline __m512i to_bf16(vf low, vf high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

/* the words of 16 bits of the lower half beside those of the upper half */
static inline __m512i interleave_halves(__m512i a) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                           20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, a);
}

/* elements [s, s + VL) of a row, those from `end` on 0; columns: where each of them is, or NULL */
static inline vf load_steps(const float *row, const int32_t *columns, int64_t s, int64_t end) {
    vm lanes = vm_first(end < s ? 0 : at_most(end - s, VL));
    if (columns == NULL) { return _mm512_maskz_loadu_ps(lanes, row + s); }
    return _mm512_mask_i32gather_ps(v_zero(), lanes, _mm512_maskz_loadu_epi32(lanes, columns + s), row, 4);
}

/* pairs of neighbours to pairs (0, 4), (1, 5), (2, 6), (3, 7) of each eight values */
static inline __m512i halves_of_eights(__m512i a) {
    const __m512i order = _mm512_set_epi16(31, 27, 30, 26, 29, 25, 28, 24, 23, 19, 22, 18, 21, 17, 20, 16, 15, 11, 14, 10, 13, 9,
                                           12, 8, 7, 3, 6, 2, 5, 1, 4, 0);
    return _mm512_permutexvar_epi16(order, a);
}

/* the pairs of elements [s, end) of a row; up to 15 pairs of zeros too many are written */
static inline void v_pairs_of_row(float *out, const float *row, const int32_t *columns, int64_t s, int64_t end, int in_eights) {
    for (; s < end; s += 2 * VL, out += VL) {
        __m512i pairs = to_bf16(load_steps(row, columns, s, end), load_steps(row, columns, s + VL, end));
        _mm512_storeu_si512(out, in_eights ? halves_of_eights(pairs) : pairs);
    }
}

/* VL words: a pair of each lane of two vectors */
static inline void v_store_pairs(float *out, vf first, vf second) { _mm512_storeu_si512(out, interleave_halves(to_bf16(first, second))); }

/* The pairs of rows 2 i and 2 i + 1 of `count` rows of `width` floats, a multiple of VL, a row of words each; zeros stand for a row behind the last. */
static inline void v_pairs_of_rows(float *out, const float *rows, int64_t width, int64_t count) {
    for (int64_t i = 0; i < count; i += 2, rows += 2 * width, out += width) {
        for (int64_t j = 0; j < width; j += VL) {
            vf second = i + 1 < count ? v_load(rows + width + j) : v_zero();
            v_store_pairs(out + j, v_load(rows + j), second);
        }
    }
}

#endif
