/* feedback.cu: z += e a in float64, summed in order of depth beginning with z: GPTQ's error feedback. */
#include "tile_product.cuh"

extern "C" void ql_feedback_forward_cuda(double *z, const double *e, const double *a, int64_t rows, int64_t depth, int64_t width,
                                         int64_t ldz, int64_t lde, int64_t lda) {
    product_args<double> p = {z, e, a, rows, width, depth, ldz, lde, lda};
    launch_product<double, 4, false, true, false>(p);
}
