/* elementwise.cu: embedding, SwiGLU and its gradient, residual add, dropout, rows moved into and out of the KV cache. 16 bytes a
 * load where the addresses allow it. */
#include "cuda.h"
#include "device.cuh"
#include "weight.cuh"

enum { THREADS = 256, PER_THREAD = 4 };

/* ---- embedding ------------------------------------------------------------------------------------------------- */

/* grid (tokens, pieces of THREADS columns): a thread a value, since each waits for memory */
static __global__ void __launch_bounds__(THREADS) embedding_kernel(float *out, const int32_t *ids, ql_weight table) {
    int64_t j = (int64_t)blockIdx.y * THREADS + threadIdx.x;
    ql_cuda_wait_previous();
    ql_cuda_start_next();
    if (j < table.k) { out[(int64_t)blockIdx.x * table.k + j] = weight_value(table, ids[blockIdx.x], j); }
}

extern "C" void ql_embedding_forward_cuda(float *out, const int32_t *ids, const ql_weight *table, int64_t t) {
    if (t == 0) { return; }
    dim3 grid((unsigned)t, (unsigned)((table->k + THREADS - 1) / THREADS));
    ql_cuda_launch(embedding_kernel, grid, dim3(THREADS), 0, true, out, ids, *table);
}

/* ---- SwiGLU and residual add ----------------------------------------------------------------------------------- */

struct swiglu {
    static __device__ __forceinline__ float of(float gate, float up) { return silu(gate) * up; }
};
struct add {
    static __device__ __forceinline__ float of(float y, float x) { return y + x; }
};

/* out[i] = of(a[i], b[i]); out may be a or b. Blocks take THREADS * PER_THREAD * 4 elements; the last few by themselves */
template <typename op>
static __global__ void __launch_bounds__(THREADS) map_kernel(float *out, const float *a, const float *b, int64_t count) {
    ql_cuda_wait_previous();
    ql_cuda_start_next();
    int64_t first = (int64_t)blockIdx.x * THREADS * PER_THREAD + threadIdx.x, vectors = count / 4;
    float4 x[PER_THREAD], y[PER_THREAD];
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        if (first + i * THREADS < vectors) {
            x[i] = ((const float4 *)a)[first + i * THREADS], y[i] = ((const float4 *)b)[first + i * THREADS];
        }
    }
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        if (first + i * THREADS < vectors) {
            ((float4 *)out)[first + i * THREADS] =
                make_float4(op::of(x[i].x, y[i].x), op::of(x[i].y, y[i].y), op::of(x[i].z, y[i].z), op::of(x[i].w, y[i].w));
        }
    }
    int64_t rest = vectors * 4 + threadIdx.x;
    if (blockIdx.x == 0 && rest < count) { out[rest] = op::of(a[rest], b[rest]); }
}

/* the same for addresses that are no multiples of 16 bytes */
template <typename op>
static __global__ void __launch_bounds__(THREADS) map_each_kernel(float *out, const float *a, const float *b, int64_t count) {
    ql_cuda_wait_previous();
    ql_cuda_start_next();
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < count) { out[i] = op::of(a[i], b[i]); }
}

template <typename op> static void map(float *out, const float *a, const float *b, int64_t count) {
    if (count == 0) { return; }
    bool aligned = ((uintptr_t)out | (uintptr_t)a | (uintptr_t)b) % 16 == 0;
    int64_t per_block = aligned ? THREADS * PER_THREAD * 4 : THREADS;
    ql_cuda_launch(aligned ? map_kernel<op> : map_each_kernel<op>, dim3((unsigned)((count + per_block - 1) / per_block)),
                   dim3(THREADS), 0, true, out, a, b, count);
}

extern "C" void ql_swiglu_forward_cuda(float *out, const float *gate, const float *up, int64_t count) {
    map<swiglu>(out, gate, up, count);
}
extern "C" void ql_add_forward_cuda(float *y, const float *x, int64_t count) { map<add>(y, y, x, count); }

/* ---- training --------------------------------------------------------------------------------------------------------- */

/* blocks that go over `count` elements, a thread several of them */
static dim3 blocks_for(int64_t count) {
    int64_t blocks = (count + THREADS - 1) / THREADS, most = (int64_t)ql_cuda_multiprocessors() * 16;
    return dim3((unsigned)(blocks < most ? blocks : most));
}

static __global__ void __launch_bounds__(THREADS) swiglu_backward_kernel(float *dgate, float *dup, const float *dy, const float *gate,
                                                                         const float *up, int64_t count) {
    ql_cuda_wait_previous();
    ql_cuda_start_next();
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count; i += (int64_t)gridDim.x * THREADS) {
        float2 slopes = swiglu_slopes(gate[i], up[i]);
        float d = dy[i];
        dgate[i] = d * slopes.x, dup[i] = d * slopes.y;
    }
}

extern "C" void ql_swiglu_backward_cuda(float *dgate, float *dup, const float *dy, const float *gate, const float *up, int64_t count) {
    ql_cuda_launch(swiglu_backward_kernel, blocks_for(count), dim3(THREADS), 0, true, dgate, dup, dy, gate, up, count);
}

static __global__ void __launch_bounds__(THREADS) dropout_kernel(float *out, const float *x, int64_t count, float p, uint64_t key) {
    ql_cuda_wait_previous();
    ql_cuda_start_next();
    float factor = 1.0f / (1.0f - p);
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count; i += (int64_t)gridDim.x * THREADS) {
        out[i] = kept_by_dropout(key, i, p) ? x[i] * factor : 0.0f;
    }
}

extern "C" void ql_dropout_forward_cuda(float *out, const float *x, int64_t count, float p, uint64_t seed, int64_t stream) {
    ql_cuda_launch(dropout_kernel, blocks_for(count), dim3(THREADS), 0, true, out, x, count, p, ql_stream_key(seed, stream));
}

static __global__ void __launch_bounds__(THREADS) scale_kernel(float *x, float factor, int64_t count) {
    ql_cuda_wait_previous();
    ql_cuda_start_next();
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count; i += (int64_t)gridDim.x * THREADS) { x[i] *= factor; }
}

extern "C" void ql_scale_forward_cuda(float *x, float factor, int64_t count) {
    ql_cuda_launch(scale_kernel, blocks_for(count), dim3(THREADS), 0, true, x, factor, count);
}

/* ---- rows moved ------------------------------------------------------------------------------------------------ */

/* row to[i] of out = row from[i] of x, c elements of T each; NULL: row i. A block a row */
template <typename T>
static __global__ void __launch_bounds__(THREADS) move_rows_kernel(T *out, const T *x, const int32_t *to, const int32_t *from,
                                                                   int64_t c) {
    ql_cuda_wait_previous();
    ql_cuda_start_next();
    T *line = out + (to != NULL ? to[blockIdx.x] : (int64_t)blockIdx.x) * c;
    const T *source = x + (from != NULL ? from[blockIdx.x] : (int64_t)blockIdx.x) * c;
    for (int64_t j = threadIdx.x; j < c; j += THREADS) { line[j] = source[j]; }
}

static void move_rows(float *out, const float *x, const int32_t *to, const int32_t *from, int64_t t, int64_t c) {
    if (t == 0) { return; }
    if (c % 4 == 0 && ((uintptr_t)out | (uintptr_t)x) % 16 == 0) {
        ql_cuda_launch(move_rows_kernel<float4>, dim3((unsigned)t), dim3(THREADS), 0, true, (float4 *)out, (const float4 *)x, to,
                       from, c / 4);
    } else {
        ql_cuda_launch(move_rows_kernel<float>, dim3((unsigned)t), dim3(THREADS), 0, true, out, x, to, from, c);
    }
}

extern "C" void ql_scatter_rows_forward_cuda(float *out, const float *x, const int32_t *rows, int64_t t, int64_t c) {
    move_rows(out, x, rows, NULL, t, c);
}
extern "C" void ql_gather_rows_forward_cuda(float *out, const float *x, const int32_t *rows, int64_t t, int64_t c) {
    move_rows(out, x, NULL, rows, t, c);
}
