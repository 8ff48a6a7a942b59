/* device.cuh: what kernels share: asynchronous copies, matrix fragments, the arithmetic of the model, reductions.
 *
 * Fragments of mma.m16n8k16, lane l, g = l / 4, t = l % 4:
 *   A (16 x 16)  a[0] = (g, 2t..2t+1)  a[1] = (g + 8, 2t..)  a[2] = (g, 2t + 8..)  a[3] = (g + 8, 2t + 8..)
 *   B (16 x 8)   b[0] = (2t..2t+1, g)  b[1] = (2t + 8.., g)
 *   C (16 x 8)   c[0..1] = (g, 2t..2t+1)  c[2..3] = (g + 8, 2t..2t+1) */
#ifndef QL_CUDA_DEVICE_CUH
#define QL_CUDA_DEVICE_CUH

#include "../csrc/core/random.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>

typedef __nv_bfloat16 bf16;

enum { WARP = 32 };
#define QL_FULL_WARP 0xffffffffu

/* ---- copies to shared memory ---------------------------------------------------------------------------------- */

__device__ __forceinline__ uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

/* 16 bytes; where `valid` is false, zeros, and `from` is not read (but must be an address of the array) */
__device__ __forceinline__ void copy_async_16(uint32_t to, const void *from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/* waits until at most `pending` of the groups committed last are still on their way */
template <int pending> __device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

/* ---- matrix fragments ----------------------------------------------------------------------------------------- */

__device__ __forceinline__ void load_matrix_4(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void load_matrix_4_transposed(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* low half: a, high half: b */
__device__ __forceinline__ uint32_t pack_bf16(float a, float b) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
    return r;
}
__device__ __forceinline__ float2 unpack_bf16(uint32_t r) {
    return make_float2(__uint_as_float(r << 16), __uint_as_float(r & 0xffff0000u));
}

/* ---- arithmetic of the model ---------------------------------------------------------------------------------- */

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }
/* the same to about 4e-6 of it, where it is rounded to bfloat16 next */
__device__ __forceinline__ float silu_fast(float x) { return __fdividef(x, 1.0f + __expf(-x)); }
/* the derivatives of silu(gate) up by gate and by up */
__device__ __forceinline__ float2 swiglu_slopes(float gate, float up) {
    float sigmoid = 1.0f / (1.0f + expf(-gate));
    return make_float2(up * sigmoid * (1.0f + gate * (1.0f - sigmoid)), gate * sigmoid);
}
/* whether dropout of share p keeps element i; key: ql_stream_key of its seed and stream */
__device__ __forceinline__ bool kept_by_dropout(uint64_t key, int64_t i, float p) {
    return (float)ql_random_bits(key, i) * 0x1p-24f >= p;
}
/* (a, b), elements i and i + d/2 of a head, turned by the angle of their position */
__device__ __forceinline__ float2 rope_pair(float a, float b, float cosine, float sine) {
    return make_float2(a * cosine - b * sine, b * cosine + a * sine);
}

/* ---- reductions: in an order that is always the same, every lane gets the result ------------------------------- */

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int i = WARP / 2; i > 0; i /= 2) { x += __shfl_xor_sync(QL_FULL_WARP, x, i); }
    return x;
}
__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
    for (int i = WARP / 2; i > 0; i /= 2) { x += __shfl_xor_sync(QL_FULL_WARP, x, i); }
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int i = WARP / 2; i > 0; i /= 2) { x = fmaxf(x, __shfl_xor_sync(QL_FULL_WARP, x, i)); }
    return x;
}
/* over a whole block of up to 32 warps; `scratch`: 32 values in shared memory */
template <typename T> __device__ __forceinline__ T block_sum(T x, T *scratch) {
    x = warp_sum(x);
    __syncthreads(); /* what was there has been read */
    if (threadIdx.x % WARP == 0) { scratch[threadIdx.x / WARP] = x; }
    __syncthreads();
    int lane = threadIdx.x % WARP;
    return warp_sum(lane < (int)blockDim.x / WARP ? scratch[lane] : (T)0);
}
__device__ __forceinline__ float block_max(float x, float *scratch) {
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) { scratch[threadIdx.x / WARP] = x; }
    __syncthreads();
    int lane = threadIdx.x % WARP;
    return warp_max(lane < (int)blockDim.x / WARP ? scratch[lane] : -INFINITY);
}

#endif
