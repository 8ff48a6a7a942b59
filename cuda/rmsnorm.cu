/* rmsnorm.cu: root mean square layer normalization and its gradient. A block a row, held in registers between the sum (float64) and the product
 * where it has at most 16 floats a thread. */
#include "cuda.h"
#include "device.cuh"

enum { HELD = 4, MAX_THREADS = 1024 }; /* vectors of 4 floats that a thread holds */

static __device__ __forceinline__ void store_4(float *to, float4 x) { *(float4 *)to = x; }
static __device__ __forceinline__ void store_4(bf16 *to, float4 x) {
    *(uint2 *)to = make_uint2(pack_bf16(x.x, x.y), pack_bf16(x.z, x.w));
}
static __device__ __forceinline__ void store_1(float *to, float x) { *to = x; }
static __device__ __forceinline__ void store_1(bf16 *to, float x) { *to = __float2bfloat16_rn(x); }

static __device__ __forceinline__ float inverse_rms(double sum, int64_t c, float eps) {
    return __frcp_rn(__fsqrt_rn(__fadd_rn((float)(sum / (double)c), eps)));
}

/* rows of c = 4 vectors floats, 16-byte aligned, at most HELD vectors a thread */
template <typename T>
static __global__ void __launch_bounds__(MAX_THREADS) rmsnorm_held_kernel(T *out, float *inv_rms, const float *x,
                                                                          const float *gain, int vectors, float eps) {
    __shared__ double scratch[WARP];
    const float4 *row = (const float4 *)x + (int64_t)blockIdx.x * vectors;
    float4 held[HELD];
    double sum = 0.0;
    ql_cuda_wait_previous();
    ql_cuda_start_next();
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int at = (int)(threadIdx.x + i * blockDim.x);
        held[i] = at < vectors ? row[at] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        sum += (double)held[i].x * held[i].x + (double)held[i].y * held[i].y;
        sum += (double)held[i].z * held[i].z + (double)held[i].w * held[i].w;
    }
    float inverse = inverse_rms(block_sum(sum, scratch), 4 * (int64_t)vectors, eps);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int at = (int)(threadIdx.x + i * blockDim.x);
        if (at >= vectors) { break; }
        float4 g = ((const float4 *)gain)[at], h = held[i];
        store_4(out + ((int64_t)blockIdx.x * vectors + at) * 4, make_float4(h.x * inverse * g.x, h.y * inverse * g.y,
                                                                            h.z * inverse * g.z, h.w * inverse * g.w));
    }
    if (inv_rms != NULL && threadIdx.x == 0) { inv_rms[blockIdx.x] = inverse; }
}

/* any row */
template <typename T>
static __global__ void __launch_bounds__(MAX_THREADS) rmsnorm_kernel(T *out, float *inv_rms, const float *x, const float *gain,
                                                                     int64_t c, float eps) {
    __shared__ double scratch[WARP];
    const float *row = x + (int64_t)blockIdx.x * c;
    double sum = 0.0;
    ql_cuda_wait_previous();
    ql_cuda_start_next();
    for (int64_t i = threadIdx.x; i < c; i += blockDim.x) { sum += (double)row[i] * row[i]; }
    float inverse = inverse_rms(block_sum(sum, scratch), c, eps);
    for (int64_t i = threadIdx.x; i < c; i += blockDim.x) {
        store_1(out + (int64_t)blockIdx.x * c + i, row[i] * inverse * gain[i]);
    }
    if (inv_rms != NULL && threadIdx.x == 0) { inv_rms[blockIdx.x] = inverse; }
}

template <typename T>
static void launch(T *out, float *inv_rms, const float *x, const float *gain, int64_t t, int64_t c, float eps) {
    if (t == 0) { return; }
    bool aligned = c % 4 == 0 && ((uintptr_t)x | (uintptr_t)gain | (uintptr_t)out) % 16 == 0;
    if (aligned && c <= 4 * HELD * MAX_THREADS) {
        /* few rows: many threads, for the latency; many rows: few, for the loads that each has in flight */
        int64_t vectors = c / 4, wanted = t < 64 ? vectors : (vectors + HELD - 1) / HELD;
        unsigned threads = wanted < MAX_THREADS ? (unsigned)((wanted + WARP - 1) / WARP * WARP) : (unsigned)MAX_THREADS;
        ql_cuda_launch(rmsnorm_held_kernel<T>, dim3((unsigned)t), dim3(threads), 0, true, out, inv_rms, x, gain, vectors, eps);
    } else {
        ql_cuda_launch(rmsnorm_kernel<T>, dim3((unsigned)t), dim3(256), 0, true, out, inv_rms, x, gain, c, eps);
    }
}

extern "C" void ql_rmsnorm_forward_cuda(float *out, float *inv_rms, const float *x, const float *gain, int64_t t, int64_t c,
                                        float eps) {
    launch(out, inv_rms, x, gain, t, c, eps);
}

void ql_cuda_rmsnorm_bf16(bf16 *out, const float *x, const float *gain, int64_t t, int64_t c, float eps) {
    launch(out, (float *)NULL, x, gain, t, c, eps);
}

/* ---- gradient ---------------------------------------------------------------------------------------------------------- */

/* With n = x inv: dx = or += inv (dy gain - n mean(dy gain n)). inv_rms NULL: made again from x. copy: dx as bf16, or NULL */
static __global__ void __launch_bounds__(MAX_THREADS) rmsnorm_backward_kernel(float *dx, bf16 *copy, const float *dy, const float *x,
                                                                              const float *gain, const float *inv_rms, int64_t c,
                                                                              float eps, int accumulate) {
    __shared__ double scratch[WARP];
    int64_t first = (int64_t)blockIdx.x * c;
    double along = 0.0, squares = 0.0;
    ql_cuda_wait_previous();
    ql_cuda_start_next();
    for (int64_t i = threadIdx.x; i < c; i += blockDim.x) {
        double wide = x[first + i];
        along += (double)dy[first + i] * gain[i] * wide;
        squares += wide * wide;
    }
    along = block_sum(along, scratch);
    float inverse = inv_rms != NULL ? inv_rms[blockIdx.x] : inverse_rms(block_sum(squares, scratch), c, eps);
    float part = (float)(along / (double)c) * inverse * inverse;
    for (int64_t i = threadIdx.x; i < c; i += blockDim.x) {
        float d = __fmul_rn(inverse, dy[first + i] * gain[i] - x[first + i] * part); /* rounded before it is added */
        float sum = accumulate ? dx[first + i] + d : d;
        dx[first + i] = sum;
        if (copy != NULL) { copy[first + i] = __float2bfloat16_rn(sum); }
    }
}

static void launch_backward(float *dx, bf16 *copy, const float *dy, const float *x, const float *gain, const float *inv_rms, int64_t t,
                            int64_t c, float eps, int accumulate) {
    int64_t threads = (c + WARP - 1) / WARP * WARP;
    ql_cuda_launch(rmsnorm_backward_kernel, dim3((unsigned)t), dim3((unsigned)(threads < 512 ? threads : 512)), 0, true, dx, copy, dy, x,
                   gain, inv_rms, c, eps, accumulate);
}

extern "C" void ql_rmsnorm_backward_cuda(float *dx, const float *dy, const float *x, const float *gain, const float *inv_rms, int64_t t,
                                         int64_t c, int accumulate) {
    launch_backward(dx, NULL, dy, x, gain, inv_rms, t, c, 0.0f, accumulate);
}

extern "C" void ql_rmsnorm_fused_backward_cuda(float *dx, void *copy, const float *dy, const float *x, const float *gain, int64_t t,
                                               int64_t c, float eps) {
    launch_backward(dx, (bf16 *)copy, dy, x, gain, NULL, t, c, eps, 1);
}
