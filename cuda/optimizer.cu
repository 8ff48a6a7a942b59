/* optimizer.cu: AdamW over one long vector of parameters, and the square sum of its gradients, in one order for any device. */
#include "cuda.h"
#include "device.cuh"

enum { THREADS = 256, PARTS = 512 };

/* part b of the sum: elements b THREADS + thread, PARTS THREADS apart */
static __global__ void __launch_bounds__(THREADS) square_parts(double *parts, const float *x, int64_t count) {
    __shared__ double scratch[WARP];
    ql_cuda_wait_previous();
    ql_cuda_start_next();
    double sum = 0.0;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count; i += (int64_t)PARTS * THREADS) {
        sum += (double)x[i] * x[i];
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) { parts[blockIdx.x] = sum; }
}

static __global__ void __launch_bounds__(PARTS) add_parts(double *sum, const double *parts) {
    __shared__ double scratch[WARP];
    ql_cuda_wait_previous();
    ql_cuda_start_next();
    double total = block_sum(parts[threadIdx.x], scratch);
    if (threadIdx.x == 0) { *sum = total; }
}

extern "C" void ql_square_sum_forward_cuda(double *sum, const float *x, int64_t count) {
    double *parts = (double *)ql_cuda_scratch(QL_SCRATCH_PARTIAL, PARTS * sizeof(double));
    if (parts == NULL) { return; }
    ql_cuda_launch(square_parts, dim3(PARTS), dim3(THREADS), 0, true, parts, x, count);
    ql_cuda_launch(add_parts, dim3(1), dim3(PARTS), 0, true, sum, parts);
}

/* the numbers of a step as csrc/ops/optimizer.c rounds them */
struct adamw_args {
    float *w, *m, *v;
    const float *g;
    const double *squares;
    int64_t count;
    double max_norm;
    float beta1, beta2, new1, new2, eps, root2, rate, keep;
};

static __global__ void __launch_bounds__(THREADS) adamw_kernel(const adamw_args a) {
    ql_cuda_wait_previous();
    ql_cuda_start_next();
    double squares = *a.squares, norm = sqrt(squares);
    if (!isfinite(squares)) { return; }
    float factor = (float)(a.max_norm > 0.0 && norm > a.max_norm ? a.max_norm / norm : 1.0);
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < a.count; i += (int64_t)gridDim.x * THREADS) {
        float g = a.g[i] * factor, m = a.beta1 * a.m[i] + a.new1 * g, v = a.beta2 * a.v[i] + a.new2 * g * g;
        a.m[i] = m, a.v[i] = v;
        a.w[i] = a.w[i] * a.keep - a.rate * m / (sqrtf(v) / a.root2 + a.eps);
    }
}

extern "C" void ql_adamw_forward_cuda(float *w, float *m, float *v, const float *g, const double *squares, int64_t count,
                                      const ql_adamw_step *s) {
    adamw_args a = {w, m, v, g, squares, count, s->max_norm, (float)s->beta1, (float)s->beta2, (float)(1.0 - s->beta1),
                    (float)(1.0 - s->beta2), (float)s->eps, (float)sqrt(s->correction2), (float)(s->lr / s->correction1),
                    (float)(1.0 - s->lr * s->weight_decay)};
    int64_t blocks = (count + THREADS - 1) / THREADS, most = (int64_t)ql_cuda_multiprocessors() * 16;
    ql_cuda_launch(adamw_kernel, dim3((unsigned)(blocks < most ? blocks : most)), dim3(THREADS), 0, true, a);
}
