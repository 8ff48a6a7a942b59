/* cross_entropy.cu: softmax cross-entropy of integer targets. A block a row: one pass with a running maximum for the loss
 * (sums in float64), a second one for the gradient. */
#include "cuda.h"
#include "device.cuh"

enum { THREADS = 1024, IGNORED = -100 };

/* `vector`: rows are 16-byte aligned */
template <bool vector>
static __global__ void __launch_bounds__(THREADS) cross_entropy_kernel(float *loss, float *dlogits, const float *logits,
                                                                       const int32_t *targets, int64_t v) {
    __shared__ double sums[WARP];
    __shared__ float maxima[WARP];
    ql_cuda_wait_previous();
    ql_cuda_start_next();
    const float *row = logits + (int64_t)blockIdx.x * v;
    int32_t target = targets[blockIdx.x];
    float top = -INFINITY;
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < (vector ? v / 4 : v); i += THREADS) {
        float4 x = vector ? ((const float4 *)row)[i] : make_float4(row[i], -INFINITY, -INFINITY, -INFINITY);
        float here = fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w));
        if (here > top) {
            sum *= (double)expf(top - here);
            top = here;
        }
        if (top > -INFINITY) { sum += (double)(expf(x.x - top) + expf(x.y - top)) + (double)(expf(x.z - top) + expf(x.w - top)); }
    }
    float maximum = block_max(top, maxima);
    sum = block_sum(top > -INFINITY ? sum * (double)expf(top - maximum) : 0.0, sums);
    if (threadIdx.x == 0) {
        loss[blockIdx.x] = target == IGNORED ? 0.0f : (float)(log(sum) - ((double)row[target] - maximum));
    }
    if (dlogits == NULL) { return; }
    __syncthreads(); /* the gradient may take the place of the logits */
    float *gradient = dlogits + (int64_t)blockIdx.x * v;
    double inverse = 1.0 / sum;
    for (int64_t i = threadIdx.x; i < v; i += THREADS) {
        float p = (float)((double)expf(row[i] - maximum) * inverse);
        gradient[i] = target == IGNORED ? 0.0f : p - (i == target ? 1.0f : 0.0f);
    }
}

extern "C" void ql_cross_entropy_forward_cuda(float *loss, float *dlogits, const float *logits, const int32_t *targets, int64_t t,
                                              int64_t v) {
    if (t == 0) { return; }
    bool vector = v % 4 == 0 && (uintptr_t)logits % 16 == 0;
    ql_cuda_launch(vector ? cross_entropy_kernel<true> : cross_entropy_kernel<false>, dim3((unsigned)t), dim3(THREADS), 0, true,
                   loss, dlogits, logits, targets, v);
}
