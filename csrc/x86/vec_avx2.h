/* vec_avx2.h: the vector vocabulary over AVX2, FMA and F16C: 8 floats. The same names as vec_avx512.h; see there. */
#ifndef QL_VEC_AVX2_H
#define QL_VEC_AVX2_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h> /* memcpy: unaligned loads of a few bytes */

#define V_NAME(op) ql_##op##_avx2
#define V_AVX512 0

enum { VL = 8 };
typedef __m256 vf;
typedef __m256i vi;
typedef __m256 vm; /* all bits of a lane set or clear */

/* ---- memory; a tail is the first n of VL lanes, 0 <= n <= VL, and nothing beyond them is touched ------------- */

static inline vm vm_first(int64_t n) {
    static const int32_t window[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
    return _mm256_castsi256_ps(_mm256_loadu_si256((const __m256i *)(const void *)(window + 8 - n)));
}
static inline vf v_load(const float *p) { return _mm256_loadu_ps(p); }
static inline vf v_load_tail(const float *p, int64_t n) { return _mm256_maskload_ps(p, _mm256_castps_si256(vm_first(n))); }
static inline void v_store(float *p, vf a) { _mm256_storeu_ps(p, a); }
static inline void v_store_tail(float *p, vf a, int64_t n) { _mm256_maskstore_ps(p, _mm256_castps_si256(vm_first(n)), a); }
#define v_prefetch(p) __builtin_prefetch(p, 0, 3) /* gcc drops calls of a function that does nothing else */
static inline void v_stream(float *p, vf a) { _mm256_stream_ps(p, a); } /* past the caches; p on 32 bytes */
static inline void v_stream_end(void) { _mm_sfence(); }

/* out[q] = column q of the VL x 4 matrix at p: p[0 ld + q], p[1 ld + q], … */
static inline void v_transpose4(vf out[4], const float *p, int64_t ld) {
    vf r[4]; /* r[q]: rows q and 4 + q, four columns of each */
    for (int q = 0; q < 4; q++) {
        r[q] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + q * ld)), _mm_loadu_ps(p + (4 + q) * ld), 1);
    }
    __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(r[0], r[1])), b = _mm256_castps_pd(_mm256_unpacklo_ps(r[2], r[3]));
    __m256d c = _mm256_castps_pd(_mm256_unpackhi_ps(r[0], r[1])), d = _mm256_castps_pd(_mm256_unpackhi_ps(r[2], r[3]));
    out[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
    out[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    out[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(c, d));
    out[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(c, d));
}

/* ---- arithmetic ---------------------------------------------------------------------------------------------- */

static inline vf v_zero(void) { return _mm256_setzero_ps(); }
static inline vf v_set1(float a) { return _mm256_set1_ps(a); }
static inline vf v_add(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf v_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
static inline vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf v_div(vf a, vf b) { return _mm256_div_ps(a, b); }
static inline vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }   /* a b + c */
static inline vf v_fnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); } /* c - a b */
static inline vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }              /* b where either is NaN */
static inline vf v_min(vf a, vf b) { return _mm256_min_ps(a, b); }
static inline vf v_abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static inline vf v_sqrt(vf a) { return _mm256_sqrt_ps(a); }
static inline vf v_round(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline float v_sum(vf a) { /* in a fixed order */
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline float v_hmax(vf a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

/* ---- masks --------------------------------------------------------------------------------------------------- */

static inline vm v_gt(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
static inline vm v_lt(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
static inline vm v_ge(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
static inline vm v_eq(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
static inline int vm_any(vm m) { return _mm256_movemask_ps(m) != 0; }
static inline int vm_all(vm m) { return _mm256_movemask_ps(m) == 255; }
static inline vf v_select(vm m, vf a, vf b) { return _mm256_blendv_ps(b, a, m); } /* a where m, else b */

/* ---- int32 lanes --------------------------------------------------------------------------------------------- */

static inline vi vi_set1(int32_t a) { return _mm256_set1_epi32(a); }
static inline vi vi_iota(void) { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
static inline vi vi_load(const void *p) { return _mm256_loadu_si256(p); }
static inline void vi_store(void *p, vi a) { _mm256_storeu_si256(p, a); }
static inline vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
static inline vi vi_sub(vi a, vi b) { return _mm256_sub_epi32(a, b); }
static inline vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
static inline vi vi_or(vi a, vi b) { return _mm256_or_si256(a, b); }
static inline vi vi_xor(vi a, vi b) { return _mm256_xor_si256(a, b); }
static inline vi vi_shl(vi a, unsigned n) { return _mm256_slli_epi32(a, (int)n); }
static inline vi vi_shr(vi a, unsigned n) { return _mm256_srli_epi32(a, (int)n); }
static inline vi vi_shr_by(vi a, vi n) { return _mm256_srlv_epi32(a, n); } /* 0 where n > 31 */
static inline vi vi_from_vf(vf a) { return _mm256_cvtps_epi32(a); }        /* to nearest even */
static inline vf vi_to_vf(vi a) { return _mm256_cvtepi32_ps(a); }
static inline vf vi_as_vf(vi a) { return _mm256_castsi256_ps(a); } /* the same bits */
static inline vi vf_as_vi(vf a) { return _mm256_castps_si256(a); }
static inline vi vi_select(vm m, vi a, vi b) { return vf_as_vi(v_select(m, vi_as_vf(a), vi_as_vf(b))); }

/* a 2^q for a whole q, |q| <= 252, rounded at most twice in the denormals */
static inline vf v_ldexp(vf a, vf exponent) {
    vi q = vi_from_vf(exponent), half = _mm256_srai_epi32(q, 1), bias = vi_set1(127);
    vf first = vi_as_vf(vi_shl(vi_add(half, bias), 23)), second = vi_as_vf(vi_shl(vi_add(vi_sub(q, half), bias), 23));
    return v_mul(v_mul(a, first), second);
}

/* ---- narrow types to lanes: VL elements at p ------------------------------------------------------------------ */

static inline vi vi_load_u8(const void *p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(p)); }
static inline vi vi_load_i8(const void *p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64(p)); }
static inline vi vi_load_i16(const void *p) { return _mm256_cvtepi16_epi32(_mm_loadu_si128(p)); }
static inline vi vi_load_u16(const void *p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128(p)); }
static inline vf v_load_f16(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128(p)); }
static inline vf v_load_bf16(const void *p) { return vi_as_vf(vi_shl(vi_load_u16(p), 16)); }

/* the first n of VL dwords at p, 0 <= n <= VL, the rest 0; lane i of a permutation is lane index[i] of a */
static inline vi vi_load_tail(const void *p, int64_t n) { return _mm256_maskload_epi32(p, vf_as_vi(vm_first(n))); }
static inline vi vi_permute(vi a, vi index) { return _mm256_permutevar8x32_epi32(a, index); }
static inline vf v_permute(vf a, vi index) { return _mm256_permutevar8x32_ps(a, index); }
static inline vi vi_shl_by(vi a, vi n) { return _mm256_sllv_epi32(a, n); }

/* VL / 2 bytes of nibble codes at p, the even element of a byte in its high nibble, as lanes: code in the low 4 bits,
 * other bits above it */
static inline vi vi_load_nibbles(const void *p) {
    int32_t bytes;
    memcpy(&bytes, p, sizeof bytes);
    return vi_shr_by(vi_set1(bytes), _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
}
/* the low byte of each 32-bit lane, in order */
static inline int64_t vi_low_bytes(vi a) {
    const __m256i pick = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8,
                                          12, -1, -1, -1, -1, -1, -1, -1, -1);
    __m256i bytes = _mm256_shuffle_epi8(a, pick);
    return _mm_cvtsi128_si64(_mm_or_si128(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
}
/* the reverse: lanes hold codes of 0 to 15 */
static inline void vi_store_nibbles(void *p, vi codes) {
    uint64_t c = (uint64_t)vi_low_bytes(_mm256_or_si256(_mm256_slli_epi64(codes, 4), _mm256_srli_epi64(codes, 32)));
    uint8_t bytes[4] = {(uint8_t)c, (uint8_t)(c >> 16), (uint8_t)(c >> 32), (uint8_t)(c >> 48)};
    memcpy(p, bytes, sizeof bytes);
}
/* the low bytes of the lanes: VL bytes */
static inline void vi_store_i8(void *p, vi a) {
    int64_t bytes = vi_low_bytes(a);
    memcpy(p, &bytes, sizeof bytes);
}

/* a table of 16 floats in registers: v_table_get(t, i) is t[i & 15] */
typedef struct { vf low, high; } v_table;
static inline v_table v_table_load(const float *p) { return (v_table){v_load(p), v_load(p + 8)}; }
static inline vf v_table_get(v_table t, vi i) {
    vf low = _mm256_permutevar8x32_ps(t.low, i), high = _mm256_permutevar8x32_ps(t.high, i);
    return _mm256_blendv_ps(low, high, vi_as_vf(vi_shl(i, 28))); /* bit 3 of i picks the half */
}

/* the same by bytes, of 32 codes: v_bytes_get(out, t, c), c codes of 0 to 15 in bytes, is t[byte j of c] where j is 4 i + 0 .. 3 in the
 * low half of out[i] and 16 + 4 i + 0 .. 3 in the high one */
typedef struct { vi plane[4]; } v_bytes;
static inline v_bytes v_bytes_of(const float *p) {
    uint8_t bytes[64], planes[4][16];
    memcpy(bytes, p, sizeof bytes);
    for (int i = 0; i < 64; i++) { planes[i % 4][i / 4] = bytes[i]; }
    v_bytes t;
    for (int b = 0; b < 4; b++) { t.plane[b] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)planes[b])); }
    return t;
}
static inline void v_bytes_get(vf out[4], v_bytes t, vi codes) {
    vi b[4];
    for (int i = 0; i < 4; i++) { b[i] = _mm256_shuffle_epi8(t.plane[i], codes); }
    vi low = _mm256_unpacklo_epi8(b[0], b[1]), high = _mm256_unpacklo_epi8(b[2], b[3]);
    out[0] = vi_as_vf(_mm256_unpacklo_epi16(low, high)), out[1] = vi_as_vf(_mm256_unpackhi_epi16(low, high));
    low = _mm256_unpackhi_epi8(b[0], b[1]), high = _mm256_unpackhi_epi8(b[2], b[3]);
    out[2] = vi_as_vf(_mm256_unpacklo_epi16(low, high)), out[3] = vi_as_vf(_mm256_unpackhi_epi16(low, high));
}
/* 4 floats in each half; lane i: the sum of the 4 lanes of a[i] low, lane 4 + i: of a[i] high */
static inline vf v_set4(const float *p) { return _mm256_broadcast_ps((const __m128 *)(const void *)p); }
static inline vf v_sums4(const vf a[4]) { return _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3])); }
static inline vi vi_halves(vi low, vi high) { return _mm256_blend_epi16(low, high, 0xaa); } /* 16 bits of a lane from each */

/* ---- float64: the two halves of a vf, for long sums ----------------------------------------------------------- */

typedef __m256d vd;
static inline vd vd_zero(void) { return _mm256_setzero_pd(); }
static inline vd vd_low(vf a) { return _mm256_cvtps_pd(_mm256_castps256_ps128(a)); }
static inline vd vd_high(vf a) { return _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)); }
static inline vd vd_add(vd a, vd b) { return _mm256_add_pd(a, b); }
static inline vd vd_fma(vd a, vd b, vd c) { return _mm256_fmadd_pd(a, b, c); }
static inline double vd_sum(vd a) { /* in a fixed order */
    __m128d s = _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}

#include "vec_math.h"

#endif
