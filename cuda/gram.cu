/* gram.cu: h += a^T b in float32: the Hessian of float32 activations and the cross moments of GPTQ's drift correction. */
#include "tile_product.cuh"

extern "C" void ql_gram_forward_cuda(float *h, const float *a, const float *b, int64_t t, int64_t ka, int64_t kb, int lower) {
    product_args<float> p = {h, a, b, ka, kb, t, kb, ka, kb};
    (lower ? launch_product<float, 8, true, false, true> : launch_product<float, 8, true, false, false>)(p);
}
