/* training.cu: elementwise ops of training on bf16 activations: rotation in place, SwiGLU and its gradient, rounding. 16 bytes a
 * load where the addresses allow it. */
#include "cuda.h"
#include "device.cuh"

enum { THREADS = 256, VALUES = 8 };

static unsigned blocks_of(int64_t items) { return (unsigned)((items + THREADS - 1) / THREADS); }

/* 8 values from element i on, or those that are there */
static __device__ __forceinline__ void get(float (&v)[VALUES], const bf16 *x, int64_t i, int64_t count) {
    if (i + VALUES <= count) {
        uint4 raw = *(const uint4 *)(x + i);
        const uint32_t pairs[] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int e = 0; e < 4; e++) {
            float2 pair = unpack_bf16(pairs[e]);
            v[2 * e] = pair.x, v[2 * e + 1] = pair.y;
        }
        return;
    }
    for (int e = 0; e < VALUES; e++) { v[e] = i + e < count ? __bfloat162float(x[i + e]) : 0.0f; }
}
static __device__ __forceinline__ void put(bf16 *x, const float (&v)[VALUES], int64_t i, int64_t count) {
    if (i + VALUES <= count) {
        *(uint4 *)(x + i) = make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
        return;
    }
    for (int e = 0; e < VALUES && i + e < count; e++) { x[i + e] = __float2bfloat16_rn(v[e]); }
}

/* ---- rotary embedding ---------------------------------------------------------------------------------------------- */

/* grid (t, parts of a token): a thread turns `width` neighbours of each half */
template <int width>
static __global__ void __launch_bounds__(THREADS) rope_kernel(bf16 *x, const float *cosines, const float *sines, const int32_t *positions,
                                                              int heads, int half) {
    int i = width * (int)(blockIdx.y * THREADS + threadIdx.x);
    ql_cuda_wait_previous();
    ql_cuda_start_next();
    if (i >= heads * half) { return; }
    bf16 *low = x + ((int64_t)blockIdx.x * heads + i / half) * 2 * half + i % half;
    int64_t angle = (int64_t)positions[blockIdx.x] * half + i % half;
    float a[VALUES], b[VALUES];
    get(a, low, 0, width), get(b, low + half, 0, width);
#pragma unroll
    for (int e = 0; e < width; e++) {
        float2 turned = rope_pair(a[e], b[e], cosines[angle + e], sines[angle + e]);
        a[e] = turned.x, b[e] = turned.y;
    }
    put(low, a, 0, width), put(low + half, b, 0, width);
}

extern "C" void ql_rope_fused_forward_cuda(void *x, const float *cosines, const float *sines, const int32_t *positions, int64_t t,
                                           int64_t heads, int64_t d) {
    bool vectors = d / 2 % VALUES == 0;
    dim3 grid((unsigned)t, blocks_of(heads * (d / 2) / (vectors ? VALUES : 1)));
    ql_cuda_launch(vectors ? rope_kernel<VALUES> : rope_kernel<1>, grid, dim3(THREADS), 0, true, (bf16 *)x, cosines, sines, positions,
                   heads, d / 2);
}

/* ---- element by element --------------------------------------------------------------------------------------------- */

static __global__ void __launch_bounds__(THREADS) swiglu_kernel(bf16 *out, const bf16 *gate, const bf16 *up, int64_t count) {
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * VALUES;
    ql_cuda_wait_previous();
    ql_cuda_start_next();
    float g[VALUES], u[VALUES];
    if (i >= count) { return; }
    get(g, gate, i, count), get(u, up, i, count);
#pragma unroll
    for (int e = 0; e < VALUES; e++) { g[e] = silu(g[e]) * u[e]; }
    put(out, g, i, count);
}

extern "C" void ql_swiglu_fused_forward_cuda(void *out, const void *gate, const void *up, int64_t count) {
    ql_cuda_launch(swiglu_kernel, dim3(blocks_of((count + VALUES - 1) / VALUES)), dim3(THREADS), 0, true, (bf16 *)out, (const bf16 *)gate,
                   (const bf16 *)up, count);
}

static __global__ void __launch_bounds__(THREADS) swiglu_slopes_kernel(bf16 *dgate, bf16 *dup, const bf16 *dy, const bf16 *gate,
                                                                       const bf16 *up, int64_t count) {
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * VALUES;
    ql_cuda_wait_previous();
    ql_cuda_start_next();
    float d[VALUES], g[VALUES], u[VALUES];
    if (i >= count) { return; }
    get(d, dy, i, count), get(g, gate, i, count), get(u, up, i, count);
#pragma unroll
    for (int e = 0; e < VALUES; e++) {
        float2 slopes = swiglu_slopes(g[e], u[e]);
        g[e] = d[e] * slopes.x, u[e] = d[e] * slopes.y;
    }
    put(dgate, g, i, count), put(dup, u, i, count);
}

extern "C" void ql_swiglu_fused_backward_cuda(void *dgate, void *dup, const void *dy, const void *gate, const void *up, int64_t count) {
    ql_cuda_launch(swiglu_slopes_kernel, dim3(blocks_of((count + VALUES - 1) / VALUES)), dim3(THREADS), 0, true, (bf16 *)dgate, (bf16 *)dup,
                   (const bf16 *)dy, (const bf16 *)gate, (const bf16 *)up, count);
}

static __global__ void __launch_bounds__(THREADS) round_kernel(bf16 *out, const float *x, int64_t count) {
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * VALUES;
    ql_cuda_wait_previous();
    ql_cuda_start_next();
    float v[VALUES];
    if (i >= count) { return; }
#pragma unroll
    for (int e = 0; e < VALUES; e++) { v[e] = i + e < count ? x[i + e] : 0.0f; }
    put(out, v, i, count);
}

extern "C" void ql_round_forward_cuda(void *out, const float *x, int64_t count) {
    ql_cuda_launch(round_kernel, dim3(blocks_of((count + VALUES - 1) / VALUES)), dim3(THREADS), 0, true, (bf16 *)out, x, count);
}
