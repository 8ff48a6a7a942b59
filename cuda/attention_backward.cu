/* attention_backward.cu: the slots of attention's gradient, and the plain kernels behind them: float32 sums of float32 or bf16
 * values, any head size. The slot of the float32 table is all their own; of the fused bf16 slot they serve what the tiles of
 * attention_backward_tiles.cu do not know.
 *
 * A warp makes one row: of dq, over the keys that it sees, or of dk and dv, over the queries of its head's group that see it.
 * A lane owns every 32nd column, up to 256 columns of the result a warp; the weights are made again for each panel of them. */
#include "attention_backward.cuh"
#include "cuda.h"

enum { WARPS = 4, THREADS = WARPS * WARP, PANEL = 256, HELD = PANEL / WARP };

static __device__ __forceinline__ float to_float(float x) { return x; }
static __device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
static __device__ __forceinline__ void store(float *to, float x) { *to = x; }
static __device__ __forceinline__ void store(bf16 *to, float x) { *to = __float2bfloat16_rn(x); }

/* of two rows, by a warp */
template <typename T> static __device__ __forceinline__ float dot(const T *a, const T *b, int d) {
    float sum = 0.0f;
    for (int i = threadIdx.x % WARP; i < d; i += WARP) { sum = fmaf(to_float(a[i]), to_float(b[i]), sum); }
    return warp_sum(sum);
}

/* sums += factor * columns of row x, from `column` on */
template <typename T>
static __device__ __forceinline__ void add_scaled(float (&sums)[HELD], float factor, const T *x, int column, int d) {
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int at = column + i * WARP + threadIdx.x % WARP;
        if (at < d) { sums[i] = fmaf(factor, to_float(x[at]), sums[i]); }
    }
}

template <typename T> static __device__ __forceinline__ void store_row(T *row, const float (&sums)[HELD], int column, int d) {
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int at = column + i * WARP + threadIdx.x % WARP;
        if (at < d) { store(row + at, sums[i]); }
    }
}

/* the weight of a query and a key, and the gradient of their score */
template <typename T>
static __device__ __forceinline__ float2 weight_of(const gradient_args<T> &a, int64_t query, int64_t key) {
    float p = expf(dot(a.q + query * a.d, a.k + key * a.d, a.d) * a.scale - a.lse[query]);
    float delta = dot(a.dout + query * a.d, a.out + query * a.d, a.d);
    return make_float2(p, p * (dot(a.dout + query * a.d, a.v + key * a.d, a.d) - delta) * a.scale);
}

/* row `query` (of t hq) sees `keys` keys from row `first` (of rows hkv, hkv apart) on */
template <typename T>
static __device__ void query_row(const gradient_args<T> &a, int64_t query, int64_t first, int64_t keys, int column) {
    float dq[HELD] = {};
    for (int64_t s = 0; s < keys; s++) {
        int64_t key = first + s * a.hkv;
        add_scaled(dq, weight_of(a, query, key).y, a.k + key * a.d, column, a.d);
    }
    store_row(a.dq + query * a.d, dq, column, a.d);
}

/* row `key` (of rows hkv) is seen by the queries [first, end) of `heads` heads from `head` on */
template <typename T>
static __device__ void key_row(const gradient_args<T> &a, int64_t key, int64_t first, int64_t end, int head, int heads, int column) {
    float dk[HELD] = {}, dv[HELD] = {};
    for (int h = head; h < head + heads; h++) {
        for (int64_t s = first; s < end; s++) {
            int64_t query = s * a.hq + h;
            float2 weight = weight_of(a, query, key);
            add_scaled(dv, weight.x, a.dout + query * a.d, column, a.d);
            add_scaled(dk, weight.y, a.q + query * a.d, column, a.d);
        }
    }
    store_row(a.dk + key * a.d, dk, column, a.d);
    store_row(a.dv + key * a.d, dv, column, a.d);
}

/* any grid: row i (of all queries, heads and panels, or, `keys`, of all keys) belongs to warp i % (all warps) */
template <typename T, bool keys> static __global__ void __launch_bounds__(THREADS) plain_backward_kernel(gradient_args<T> a) {
    ql_cuda_wait_previous();
    ql_cuda_start_next();
    int panels = (a.d + PANEL - 1) / PANEL, heads = a.hq / a.hkv, width = keys ? a.hkv : a.hq;
    int64_t next = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP, step = (int64_t)gridDim.x * WARPS, begin = 0;
    for (int i = 0; i < a.b; i++) {
        int64_t first = a.q_start[i], queries = a.q_start[i + 1] - first, kv_first = a.kv_start[i], before = a.kv_len[i] - queries;
        int64_t end = begin + (keys ? a.kv_len[i] : queries) * width * panels;
        for (; next < end; next += step) {
            int64_t row = (next - begin) / panels / width;
            int head = (int)((next - begin) / panels % width), column = (int)((next - begin) % panels) * PANEL;
            if (keys) {
                int64_t seen_from = row > before ? row - before : 0;
                key_row(a, (kv_first + row) * a.hkv + head, first + seen_from, first + queries, head * heads, heads, column);
            } else {
                query_row(a, (first + row) * a.hq + head, kv_first * a.hkv + head / heads, before + row + 1, column);
            }
        }
        begin = end;
    }
}

template <typename T> static void launch_plain(const gradient_args<T> &args) {
    dim3 grid((unsigned)ql_cuda_multiprocessors() * 8);
    ql_cuda_launch(plain_backward_kernel<T, true>, grid, dim3(THREADS), 0, true, args);
    ql_cuda_launch(plain_backward_kernel<T, false>, grid, dim3(THREADS), 0, true, args);
}

extern "C" void ql_attention_backward_cuda(float *dq, float *dk, float *dv, const float *dout, const float *q, const float *k,
                                           const float *v, const float *out, const float *lse, const int64_t *q_start,
                                           const int64_t *kv_start, const int64_t *kv_len, int64_t b, int64_t hq, int64_t hkv,
                                           int64_t d, float scale) {
    if (b == 0) { return; }
    launch_plain(gradient_args<float>{dq, dk, dv, dout, q, k, v, out, lse, NULL, q_start, kv_start, kv_len, (int)b, (int)hq,
                                      (int)hkv, (int)d, scale});
}

extern "C" void ql_attention_fused_backward_cuda(void *dq, void *dk, void *dv, const void *dout, const void *q, const void *k,
                                                 const void *v, const void *out, const float *lse, const int64_t *q_start,
                                                 const int64_t *kv_start, const int64_t *kv_len, int64_t t, int64_t b, int64_t hq,
                                                 int64_t hkv, int64_t d, int64_t max_queries, int64_t max_keys, float scale) {
    if (t == 0) { return; }
    gradient_args<bf16> args = {(bf16 *)dq, (bf16 *)dk, (bf16 *)dv, (const bf16 *)dout, (const bf16 *)q, (const bf16 *)k,
                                (const bf16 *)v, (const bf16 *)out, lse, NULL, q_start, kv_start, kv_len, (int)b, (int)hq,
                                (int)hkv, (int)d, scale};
    if (!ql_attention_backward_tiles(args, t, max_queries, max_keys)) { launch_plain(args); }
}
