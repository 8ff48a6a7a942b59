/* vec_avx512.h: the vector vocabulary over AVX-512 (F, BW, DQ, VL): 16 floats. vec_avx2.h has the same names, so that
 * a kernel's body is written once, <op>_body.h, and included by <op>_avx2.c and <op>_avx512.c.
 *   vf floats, vi int32 lanes, vm a mask of lanes; VL lanes; V_NAME(op) is ql_op_<isa>. */
#ifndef QL_VEC_AVX512_H
#define QL_VEC_AVX512_H

#include <immintrin.h>
#include <stdint.h>

#define V_NAME(op) ql_##op##_avx512
#define V_AVX512 1

enum { VL = 16 };
typedef __m512 vf;
typedef __m512i vi;
typedef __mmask16 vm;

/* ---- memory; a tail is the first n of VL lanes, 0 <= n <= VL, and nothing beyond them is touched ------------- */

static inline vm vm_first(int64_t n) { return (vm)((1u << n) - 1u); }
static inline vf v_load(const float *p) { return _mm512_loadu_ps(p); }
static inline vf v_load_tail(const float *p, int64_t n) { return _mm512_maskz_loadu_ps(vm_first(n), p); } /* rest: 0 */
static inline void v_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
static inline void v_store_tail(float *p, vf a, int64_t n) { _mm512_mask_storeu_ps(p, vm_first(n), a); }
#define v_prefetch(p) __builtin_prefetch(p, 0, 3) /* gcc drops calls of a function that does nothing else */
static inline void v_stream(float *p, vf a) { _mm512_stream_ps(p, a); } /* past the caches; p on 64 bytes */
static inline void v_stream_end(void) { _mm_sfence(); }

/* out[q] = column q of the VL x 4 matrix at p: p[0 ld + q], p[1 ld + q], … */
static inline void v_transpose4(vf out[4], const float *p, int64_t ld) {
    vf r[4]; /* r[q]: rows q, 4 + q, 8 + q, 12 + q, four columns of each */
    for (int q = 0; q < 4; q++) {
        r[q] = _mm512_castps128_ps512(_mm_loadu_ps(p + q * ld));
        r[q] = _mm512_insertf32x4(r[q], _mm_loadu_ps(p + (4 + q) * ld), 1);
        r[q] = _mm512_insertf32x4(r[q], _mm_loadu_ps(p + (8 + q) * ld), 2);
        r[q] = _mm512_insertf32x4(r[q], _mm_loadu_ps(p + (12 + q) * ld), 3);
    }
    __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(r[0], r[1])), b = _mm512_castps_pd(_mm512_unpacklo_ps(r[2], r[3]));
    __m512d c = _mm512_castps_pd(_mm512_unpackhi_ps(r[0], r[1])), d = _mm512_castps_pd(_mm512_unpackhi_ps(r[2], r[3]));
    out[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
    out[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    out[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
    out[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
}

/* ---- arithmetic ---------------------------------------------------------------------------------------------- */

static inline vf v_zero(void) { return _mm512_setzero_ps(); }
static inline vf v_set1(float a) { return _mm512_set1_ps(a); }
static inline vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }   /* a b + c */
static inline vf v_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); } /* c - a b */
static inline vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }              /* b where either is NaN */
static inline vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vf v_abs(vf a) { return _mm512_abs_ps(a); }
static inline vf v_sqrt(vf a) { return _mm512_sqrt_ps(a); }
static inline vf v_round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline float v_sum(vf a) { return _mm512_reduce_add_ps(a); } /* in a fixed order */
static inline float v_hmax(vf a) { return _mm512_reduce_max_ps(a); }

/* ---- masks --------------------------------------------------------------------------------------------------- */

static inline vm v_gt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
static inline vm v_lt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
static inline vm v_ge(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
static inline vm v_eq(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
static inline int vm_any(vm m) { return m != 0; }
static inline int vm_all(vm m) { return m == (vm)-1; }
static inline vf v_select(vm m, vf a, vf b) { return _mm512_mask_blend_ps(m, b, a); } /* a where m, else b */

/* ---- int32 lanes --------------------------------------------------------------------------------------------- */

static inline vi vi_set1(int32_t a) { return _mm512_set1_epi32(a); }
static inline vi vi_iota(void) { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
static inline vi vi_load(const void *p) { return _mm512_loadu_si512(p); }
static inline void vi_store(void *p, vi a) { _mm512_storeu_si512(p, a); }
static inline vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
static inline vi vi_sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
static inline vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
static inline vi vi_or(vi a, vi b) { return _mm512_or_si512(a, b); }
static inline vi vi_xor(vi a, vi b) { return _mm512_xor_si512(a, b); }
static inline vi vi_shl(vi a, unsigned n) { return _mm512_slli_epi32(a, n); }
static inline vi vi_shr(vi a, unsigned n) { return _mm512_srli_epi32(a, n); }
static inline vi vi_shr_by(vi a, vi n) { return _mm512_srlv_epi32(a, n); } /* 0 where n > 31 */
static inline vi vi_from_vf(vf a) { return _mm512_cvtps_epi32(a); }        /* to nearest even */
static inline vf vi_to_vf(vi a) { return _mm512_cvtepi32_ps(a); }
static inline vf vi_as_vf(vi a) { return _mm512_castsi512_ps(a); } /* the same bits */
static inline vi vf_as_vi(vf a) { return _mm512_castps_si512(a); }
static inline vi vi_select(vm m, vi a, vi b) { return _mm512_mask_blend_epi32(m, b, a); }

/* a 2^q for a whole q, |q| <= 252, rounded at most twice in the denormals */
static inline vf v_ldexp(vf a, vf q) { return _mm512_scalef_ps(a, q); }

/* ---- narrow types to lanes: VL elements at p ------------------------------------------------------------------ */

static inline vi vi_load_u8(const void *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(p)); }
static inline vi vi_load_i8(const void *p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128(p)); }
static inline vi vi_load_i16(const void *p) { return _mm512_cvtepi16_epi32(_mm256_loadu_si256(p)); }
static inline vi vi_load_u16(const void *p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256(p)); }
static inline vf v_load_f16(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(p)); }
static inline vf v_load_bf16(const void *p) { return vi_as_vf(vi_shl(vi_load_u16(p), 16)); }

/* the first n of VL dwords at p, 0 <= n <= VL, the rest 0; lane i of a permutation is lane index[i] of a */
static inline vi vi_load_tail(const void *p, int64_t n) { return _mm512_maskz_loadu_epi32(vm_first(n), p); }
static inline vi vi_permute(vi a, vi index) { return _mm512_permutexvar_epi32(index, a); }
static inline vf v_permute(vf a, vi index) { return _mm512_permutexvar_ps(index, a); }
static inline vi vi_shl_by(vi a, vi n) { return _mm512_sllv_epi32(a, n); }

/* VL / 2 bytes of nibble codes at p, the even element of a byte in its high nibble, as lanes: code in the low 4 bits,
 * other bits above it */
static inline vi vi_load_nibbles(const void *p) {
    const vi dword = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const vi shift = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
    return vi_shr_by(vi_permute(_mm512_castsi128_si512(_mm_loadl_epi64(p)), dword), shift);
}
/* the reverse: lanes hold codes of 0 to 15 */
static inline void vi_store_nibbles(void *p, vi codes) {
    __m512i pairs = _mm512_or_si512(_mm512_slli_epi64(codes, 4), _mm512_srli_epi64(codes, 32));
    _mm_storel_epi64(p, _mm512_cvtepi64_epi8(pairs));
}
/* the low bytes of the lanes: VL bytes */
static inline void vi_store_i8(void *p, vi a) { _mm_storeu_si128(p, _mm512_cvtepi32_epi8(a)); }

/* a table of 16 floats in registers: v_table_get(t, i) is t[i & 15] */
typedef struct { vf all; } v_table;
static inline v_table v_table_load(const float *p) { return (v_table){v_load(p)}; }
static inline vf v_table_get(v_table t, vi i) { return _mm512_permutexvar_ps(i, t.all); }

/* ---- float64: the two halves of a vf, for long sums ----------------------------------------------------------- */

typedef __m512d vd;
static inline vd vd_zero(void) { return _mm512_setzero_pd(); }
static inline vd vd_low(vf a) { return _mm512_cvtps_pd(_mm512_castps512_ps256(a)); }
static inline vd vd_high(vf a) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)); }
static inline vd vd_add(vd a, vd b) { return _mm512_add_pd(a, b); }
static inline vd vd_fma(vd a, vd b, vd c) { return _mm512_fmadd_pd(a, b, c); }
static inline double vd_sum(vd a) { return _mm512_reduce_add_pd(a); } /* in a fixed order */

#include "vec_math.h"

#endif
