/* gptq_avx512.c: see gptq_body.h. */
#include "vec_avx512.h"

#define VD_LANES 8
static inline vd vd_load(const double *p) { return _mm512_loadu_pd(p); }
static inline vd vd_load_floats(const float *p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
static inline void vd_store(double *p, vd a) { _mm512_storeu_pd(p, a); }
static inline void vd_store_bytes(uint8_t *p, vd a) { /* whole numbers of 0 to 255 */
    _mm_storel_epi64((__m128i *)(void *)p, _mm256_cvtepi32_epi8(_mm512_cvtpd_epi32(a)));
}
static inline vd vd_set1(double a) { return _mm512_set1_pd(a); }
static inline vd vd_sub(vd a, vd b) { return _mm512_sub_pd(a, b); }
static inline vd vd_mul(vd a, vd b) { return _mm512_mul_pd(a, b); }
static inline vd vd_div(vd a, vd b) { return _mm512_div_pd(a, b); }
static inline vd vd_min(vd a, vd b) { return _mm512_min_pd(a, b); }
static inline vd vd_max(vd a, vd b) { return _mm512_max_pd(a, b); }

#include "gptq_body.h"
