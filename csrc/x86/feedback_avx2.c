/* feedback_avx2.c: see feedback_body.h. */
#include <immintrin.h>
#include <stdint.h>

typedef __m256d vd;
#define VD_LANES 4
static inline vd vd_load(const double *p) { return _mm256_loadu_pd(p); }
static inline void vd_store(double *p, vd a) { _mm256_storeu_pd(p, a); }
static inline vd vd_set1(double a) { return _mm256_set1_pd(a); }
static inline vd vd_fma(vd a, vd b, vd c) { return _mm256_fmadd_pd(a, b, c); } /* a b + c */

#include "feedback_body.h"

void ql_feedback_forward_avx2(double *z, const double *e, const double *a, int64_t rows, int64_t depth, int64_t width,
                              int64_t ldz, int64_t lde, int64_t lda) {
    feedback(z, e, a, rows, depth, width, ldz, lde, lda);
}
