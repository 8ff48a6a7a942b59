/* feedback_avx512.c: see feedback_body.h. */
#include <immintrin.h>
#include <stdint.h>

typedef __m512d vd;
#define VD_LANES 8
static inline vd vd_load(const double *p) { return _mm512_loadu_pd(p); }
static inline void vd_store(double *p, vd a) { _mm512_storeu_pd(p, a); }
static inline vd vd_set1(double a) { return _mm512_set1_pd(a); }
static inline vd vd_fma(vd a, vd b, vd c) { return _mm512_fmadd_pd(a, b, c); } /* a b + c */

#include "feedback_body.h"

void ql_feedback_forward_avx512(double *z, const double *e, const double *a, int64_t rows, int64_t depth, int64_t width,
                                int64_t ldz, int64_t lde, int64_t lda) {
    feedback(z, e, a, rows, depth, width, ldz, lde, lda);
}
