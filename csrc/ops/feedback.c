/* feedback.c: z += e a in float64: the panels of the Cholesky factor that GPTQ takes its error feedback from (quant/gptq.h). */
#include "../quantlab.h"

void ql_feedback_forward_scalar(double *z, const double *e, const double *a, int64_t rows, int64_t depth, int64_t width,
                                int64_t ldz, int64_t lde, int64_t lda) {
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t i = 0; i < depth; i++) {
            double factor = e[r * lde + i];
            for (int64_t j = 0; j < width; j++) { z[r * ldz + j] += factor * a[i * lda + j]; }
        }
    }
}
