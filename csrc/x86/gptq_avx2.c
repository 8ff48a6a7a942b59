/* gptq_avx2.c: see gptq_body.h. */
#include "vec_avx2.h"

#define VD_LANES 4
static inline vd vd_load(const double *p) { return _mm256_loadu_pd(p); }
static inline vd vd_load_floats(const float *p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
static inline void vd_store(double *p, vd a) { _mm256_storeu_pd(p, a); }
static inline void vd_store_bytes(uint8_t *p, vd a) { /* whole numbers of 0 to 255 */
    __m128i words = _mm256_cvtpd_epi32(a), halves = _mm_packus_epi32(words, words);
    int bytes = _mm_cvtsi128_si32(_mm_packus_epi16(halves, halves));
    memcpy(p, &bytes, sizeof bytes);
}
static inline vd vd_set1(double a) { return _mm256_set1_pd(a); }
static inline vd vd_sub(vd a, vd b) { return _mm256_sub_pd(a, b); }
static inline vd vd_mul(vd a, vd b) { return _mm256_mul_pd(a, b); }
static inline vd vd_div(vd a, vd b) { return _mm256_div_pd(a, b); }
static inline vd vd_min(vd a, vd b) { return _mm256_min_pd(a, b); }
static inline vd vd_max(vd a, vd b) { return _mm256_max_pd(a, b); }

#include "gptq_body.h"
