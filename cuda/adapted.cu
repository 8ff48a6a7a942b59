/* adapted.cu: a product with a low-rank adapter beside it, and its gradients: bf16 activations, float32 adapters. The weight's part
 * is decoded and goes through cuBLAS; the adapter's are three kernels here, each bound by reading the activations once:
 *
 *   down  u (t, r) = factor z (t, k) M^T      M (r, k): tensor cores, M split into two bf16 numbers
 *   up    y (t, n) = or += u (t, r) M         M (r, n)
 *   gram  M (r, n) += u (t, r)^T z (t, n)     in parts of rows, added in order
 *
 * M is A, or B transposed, wherever its strides say. */
#include "linear.cuh"

enum { THREADS = 256, DOWN_THREADS = 512, WARPS = DOWN_THREADS / WARP, RANKS = 8 };

/* element (i, j) at values[i * rank_step + j * step] */
struct factor_matrix {
    float *values;
    int64_t rank_step, step;
};

/* of activations (rows, width), element (i, j) of which is the (i width + j)-th; p 0: none. Its factor 1 / (1 - p) is not in it */
struct mask {
    float p;
    uint64_t key;
};

static __device__ __forceinline__ float masked(const mask &m, int64_t i, float x) {
    return m.p == 0.0f || kept_by_dropout(m.key, i, m.p) ? x : 0.0f;
}

/* ---- down -------------------------------------------------------------------------------------------------------------- */

/* z[j .. j + 7], zeros from `width` on, as four pairs */
static __device__ __forceinline__ uint4 load_8(const bf16 *z, int64_t row, int64_t j, int64_t width, const mask &m) {
    const bf16 *from = z + row * width + j;
    if (m.p == 0.0f && width % 8 == 0) { return j < width ? *(const uint4 *)from : make_uint4(0, 0, 0, 0); }
    float v[8];
#pragma unroll
    for (int e = 0; e < 8; e++) { v[e] = j + e < width ? masked(m, row * width + j + e, __bfloat162float(from[e])) : 0.0f; }
    return make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
}

/* elements j .. j + 7 of row i of M as pairs: what bf16 holds of them, and what it leaves */
static __device__ __forceinline__ void load_factors(uint32_t (&high)[4], uint32_t (&low)[4], const factor_matrix &m, int64_t i, bool there,
                                                    int64_t j, int64_t width) {
    __align__(16) float v[8];
    const float *from = m.values + i * m.rank_step + j * m.step;
    if (m.step == 1 && there && j + 8 <= width && (uintptr_t)from % 16 == 0) {
        *(float4 *)v = *(const float4 *)from, *(float4 *)(v + 4) = *(const float4 *)(from + 4);
    } else {
#pragma unroll
        for (int e = 0; e < 8; e++) { v[e] = there && j + e < width ? from[e * m.step] : 0.0f; }
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
        high[e] = pack_bf16(v[2 * e], v[2 * e + 1]);
        float2 kept = unpack_bf16(high[e]);
        low[e] = pack_bf16(v[2 * e] - kept.x, v[2 * e + 1] - kept.y);
    }
}

/* grid (tiles of 16 rows, tiles of 8 ranks): the warps share the width; a lane takes 8 neighbours of 32, in the same places of both
 * operands */
static __global__ void __launch_bounds__(DOWN_THREADS) down_kernel(float *u, const bf16 *z, factor_matrix m, int64_t t, int64_t width, int64_t r,
                                                              float factor, mask dropout) {
    __shared__ float sums[WARPS][16][RANKS];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4;
    int64_t row = (int64_t)blockIdx.x * 16, rank = (int64_t)blockIdx.y * RANKS;
    int64_t upper = min(row + g, t - 1), lower = min(row + g + 8, t - 1);
    float sum[4] = {};
    ql_cuda_wait_previous();
    ql_cuda_start_next();
#pragma unroll 2
    for (int64_t j = warp * WARP + lane % 4 * 8; j - lane % 4 * 8 < width; j += WARPS * WARP) {
        uint4 a = load_8(z, upper, j, width, dropout), b = load_8(z, lower, j, width, dropout);
        uint32_t high[4], low[4];
        load_factors(high, low, m, rank + g, rank + g < r, j, width);
        uint32_t first[4] = {a.x, b.x, a.y, b.y}, second[4] = {a.z, b.z, a.w, b.w};
        mma_bf16(sum, first, high[0], high[1]);
        mma_bf16(sum, second, high[2], high[3]);
        mma_bf16(sum, first, low[0], low[1]);
        mma_bf16(sum, second, low[2], low[3]);
    }
#pragma unroll
    for (int e = 0; e < 4; e++) { sums[warp][g + e / 2 * 8][lane % 4 * 2 + e % 2] = sum[e]; }
    __syncthreads();
    int token = threadIdx.x / RANKS, i = threadIdx.x % RANKS;
    if (token >= 16 || row + token >= t || rank + i >= r) { return; }
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) { total += sums[w][token][i]; }
    u[(row + token) * r + rank + i] = total * factor;
}

static void down(float *u, const bf16 *z, factor_matrix m, int64_t t, int64_t width, int64_t r, float factor, mask dropout) {
    dim3 grid((unsigned)((t + 15) / 16), (unsigned)((r + RANKS - 1) / RANKS));
    ql_cuda_launch(down_kernel, grid, dim3(DOWN_THREADS), 0, true, u, z, m, t, width, r, factor, dropout);
}

/* ---- up ---------------------------------------------------------------------------------------------------------------- */

enum { UP_ROWS = 16 };

static __device__ __forceinline__ void put_pair(bf16 *y, int64_t at, float a, float b, bool two, bool aligned) {
    if (two && aligned) {
        *(uint32_t *)(y + at) = pack_bf16(a, b);
        return;
    }
    y[at] = __float2bfloat16_rn(a);
    if (two) { y[at + 1] = __float2bfloat16_rn(b); }
}
static __device__ __forceinline__ void put_pair(float *y, int64_t at, float a, float b, bool two, bool) {
    y[at] += a;
    if (two) { y[at + 1] += b; }
}

/* grid (pieces of 512 columns, tiles of 16 rows); float32 y is added to, bf16 y is set */
template <typename T, bool drops>
static __global__ void __launch_bounds__(THREADS, 3) up_kernel(T *y, const float *u, factor_matrix m, int64_t t, int64_t width, int64_t r,
                                                            float factor, mask dropout) {
    __shared__ float us[RANKS][UP_ROWS];
    int64_t column = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * 2, row = (int64_t)blockIdx.y * UP_ROWS;
    bool there = column < width, two = column + 1 < width;
    float sum[UP_ROWS][2] = {};
    ql_cuda_wait_previous();
    ql_cuda_start_next();
    for (int64_t rank = 0; rank < r; rank += RANKS) {
        __syncthreads();
        if (threadIdx.x < RANKS * UP_ROWS) {
            int i = threadIdx.x / UP_ROWS, s = threadIdx.x % UP_ROWS;
            us[i][s] = rank + i < r && row + s < t ? u[(row + s) * r + rank + i] * factor : 0.0f;
        }
        __syncthreads();
        const float *from = m.values + rank * m.rank_step + column * m.step;
        float a[RANKS], b[RANKS];
#pragma unroll
        for (int i = 0; i < RANKS; i++) {
            a[i] = there && rank + i < r ? from[i * m.rank_step] : 0.0f;
            b[i] = two && rank + i < r ? from[i * m.rank_step + m.step] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < RANKS; i++) {
#pragma unroll
            for (int s = 0; s < UP_ROWS; s++) { sum[s][0] = fmaf(us[i][s], a[i], sum[s][0]), sum[s][1] = fmaf(us[i][s], b[i], sum[s][1]); }
        }
    }
#pragma unroll
    for (int s = 0; s < UP_ROWS; s++) {
        if (!there || row + s >= t) { break; }
        int64_t at = (row + s) * width + column;
        if (drops) { sum[s][0] = masked(dropout, at, sum[s][0]), sum[s][1] = masked(dropout, at + 1, sum[s][1]); }
        put_pair(y, at, sum[s][0], sum[s][1], two, width % 2 == 0);
    }
}

template <typename T>
static void up(T *y, const float *u, factor_matrix m, int64_t t, int64_t width, int64_t r, float factor, mask dropout) {
    dim3 grid((unsigned)((width + 2 * THREADS - 1) / (2 * THREADS)), (unsigned)((t + UP_ROWS - 1) / UP_ROWS));
    ql_cuda_launch(dropout.p > 0.0f ? up_kernel<T, true> : up_kernel<T, false>, grid, dim3(THREADS), 0, true, y, u, m, t, width, r, factor, dropout);
}

/* ---- gram --------------------------------------------------------------------------------------------------------------- */

enum { PART_ROWS = 64, MOST_PARTS = 32 };

/* grid (pieces of 512 columns, parts, tiles of 8 ranks): partial (parts, r, width) = u^T z over the rows of a part */
template <bool drops>
static __global__ void __launch_bounds__(THREADS, 3) gram_parts(float *partial, const float *u, const bf16 *z, int64_t t, int64_t width,
                                                             int64_t r, int64_t rows, mask dropout) {
    __shared__ __align__(16) float us[PART_ROWS][RANKS];
    int64_t column = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * 2, rank = (int64_t)blockIdx.z * RANKS;
    int64_t begin = blockIdx.y * rows, end = min(begin + rows, t);
    bool there = column < width, two = column + 1 < width, pairs = width % 2 == 0;
    float sum[RANKS][2] = {};
    ql_cuda_wait_previous();
    ql_cuda_start_next();
    for (int64_t first = begin; first < end; first += PART_ROWS) {
        int count = (int)min((int64_t)PART_ROWS, end - first);
        __syncthreads();
        for (int at = threadIdx.x; at < PART_ROWS * RANKS; at += THREADS) {
            int64_t row = first + at / RANKS, i = rank + at % RANKS;
            us[at / RANKS][at % RANKS] = row < end && i < r ? u[row * r + i] : 0.0f;
        }
        __syncthreads();
        if (!there) { continue; }
        const bf16 *from = z + first * width + column;
#pragma unroll 8
        for (int s = 0; s < count; s++, from += width) {
            float2 v = pairs ? unpack_bf16(*(const uint32_t *)from)
                             : make_float2(__bfloat162float(from[0]), two ? __bfloat162float(from[1]) : 0.0f);
            if (drops) { v.x = masked(dropout, from - z, v.x), v.y = masked(dropout, from - z + 1, v.y); }
#pragma unroll
            for (int i = 0; i < RANKS; i++) { sum[i][0] = fmaf(us[s][i], v.x, sum[i][0]), sum[i][1] = fmaf(us[s][i], v.y, sum[i][1]); }
        }
    }
#pragma unroll
    for (int i = 0; i < RANKS; i++) {
        if (!there || rank + i >= r) { break; }
        float *to = partial + ((int64_t)blockIdx.y * r + rank + i) * width + column;
        to[0] = sum[i][0];
        if (two) { to[1] = sum[i][1]; }
    }
}

/* M += factor times the sum of the parts; grid (columns, ranks) */
static __global__ void __launch_bounds__(THREADS) gram_sum(factor_matrix m, const float *partial, int64_t parts, int64_t width, int64_t r,
                                                           float factor) {
    int64_t column = (int64_t)blockIdx.x * THREADS + threadIdx.x, i = blockIdx.y;
    ql_cuda_wait_previous();
    ql_cuda_start_next();
    if (column >= width) { return; }
    float sum = 0.0f;
#pragma unroll 16
    for (int64_t part = 0; part < parts; part++) { sum += partial[(part * r + i) * width + column]; }
    m.values[i * m.rank_step + column * m.step] += sum * factor;
}

static void gram(factor_matrix m, const float *u, const bf16 *z, int64_t t, int64_t width, int64_t r, float factor, mask dropout) {
    int64_t rows = (t + MOST_PARTS - 1) / MOST_PARTS;
    rows = (rows + PART_ROWS - 1) / PART_ROWS * PART_ROWS;
    int64_t parts = (t + rows - 1) / rows;
    float *partial = (float *)ql_cuda_scratch(QL_SCRATCH_PARTIAL, (size_t)(parts * r * width) * sizeof(float));
    if (partial == NULL) { return; }
    dim3 grid((unsigned)((width + 2 * THREADS - 1) / (2 * THREADS)), (unsigned)parts, (unsigned)((r + RANKS - 1) / RANKS));
    ql_cuda_launch(dropout.p > 0.0f ? gram_parts<true> : gram_parts<false>, grid, dim3(THREADS), 0, true, partial, u, z, t, width, r, rows, dropout);
    ql_cuda_launch(gram_sum, dim3((unsigned)((width + THREADS - 1) / THREADS), (unsigned)r), dim3(THREADS), 0, true, m, partial, parts,
                   width, r, factor);
}

/* ---- the slots ---------------------------------------------------------------------------------------------------------- */

static mask mask_of(const ql_low_rank *l) { return {l->dropout, ql_stream_key(l->seed, l->stream)}; }
static const mask no_mask = {0.0f, 0};

/* x in the stored order of w's columns */
static const bf16 *stored_columns(const bf16 *x, const ql_weight *w, int64_t t) {
    if (w->perm == NULL) { return x; }
    bf16 *rows = (bf16 *)ql_cuda_scratch(QL_SCRATCH_ACTIVATION, (size_t)(t * w->k) * sizeof(bf16));
    ql_activations source = {NULL, x, NULL, 0.0f};
    if (rows != NULL) { ql_cuda_activations_rows(rows, &source, w->perm, t, w->k, w->k); }
    return rows;
}

/* The adapter's part goes first where y is bf16: the weight's sum then begins with it, and is rounded once. */
extern "C" void ql_adapted_forward_cuda(void *y, float *sum, float *u, const void *x, const ql_weight *w, const ql_low_rank *l, int64_t t) {
    if (t == 0) { return; }
    factor_matrix a = {(float *)l->a, w->k, 1}, b = {(float *)l->b, 1, l->r};
    bool adapted = l->r > 0;
    if (adapted) { down(u, (const bf16 *)x, a, t, w->k, l->r, l->scale / (1.0f - l->dropout), mask_of(l)); }
    if (adapted && y != NULL) { up((bf16 *)y, u, b, t, w->n, l->r, 1.0f, no_mask); }
    const bf16 *rows = stored_columns((const bf16 *)x, w, t);
    if (rows == NULL) { return; }
    if (y != NULL) { return ql_cuda_linear_large(y, CUDA_R_16BF, rows, w, t, adapted); }
    ql_cuda_linear_large(sum, CUDA_R_32F, rows, w, t, 1);
    if (adapted) { up(sum, u, b, t, w->n, l->r, 1.0f, no_mask); }
}

/* column perm[j] of out = column j of from, or += */
static __device__ __forceinline__ void put(bf16 *to, float x, int accumulate) {
    *to = __float2bfloat16_rn(accumulate ? __bfloat162float(*to) + x : x);
}
static __device__ __forceinline__ void put(float *to, float x, int accumulate) { *to = accumulate ? *to + x : x; }
template <typename T> static __global__ void put_columns(T *out, const float *from, const int32_t *perm, int64_t k, int accumulate) {
    ql_cuda_wait_previous();
    int64_t row = (int64_t)blockIdx.x * k;
    for (int64_t j = threadIdx.x; j < k; j += blockDim.x) { put(out + row + perm[j], from[row + j], accumulate); }
}

/* dx (t, k) = or += dy W */
template <typename T> static void weight_backward(T *dx, cudaDataType type, const bf16 *dy, const ql_weight *w, int64_t t, int accumulate) {
    if (w->perm == NULL) { return ql_cuda_linear_large_backward(dx, type, dy, w, t, accumulate); }
    float *stored = (float *)ql_cuda_scratch(QL_SCRATCH_OUTPUT, (size_t)(t * w->k) * sizeof(float));
    if (stored == NULL) { return; }
    ql_cuda_linear_large_backward(stored, CUDA_R_32F, dy, w, t, 0);
    ql_cuda_launch(put_columns<T>, dim3((unsigned)t), dim3(256), 0, true, dx, stored, w->perm, w->k, accumulate);
}

extern "C" void ql_adapted_backward_cuda(void *dx, float *sum, float *da, float *db, const void *dy, const void *x, const float *u, float *du,
                                         const ql_weight *w, const ql_low_rank *l, int64_t t, int accumulate) {
    if (t == 0) { return; }
    factor_matrix a = {(float *)l->a, w->k, 1}, b = {(float *)l->b, 1, l->r};
    float kept = 1.0f / (1.0f - l->dropout);
    const bf16 *slopes = (const bf16 *)dy;
    bool adapted = l->r > 0;
    if (adapted) {
        gram({db, 1, l->r}, u, slopes, t, w->n, l->r, 1.0f, no_mask);
        down(du, slopes, b, t, w->n, l->r, l->scale, no_mask);
        gram({da, w->k, 1}, du, (const bf16 *)x, t, w->k, l->r, kept, mask_of(l));
    }
    if (dx != NULL) {
        if (adapted) { up((bf16 *)dx, du, a, t, w->k, l->r, kept, mask_of(l)); }
        weight_backward((bf16 *)dx, CUDA_R_16BF, slopes, w, t, adapted);
    } else if (sum != NULL) {
        weight_backward(sum, CUDA_R_32F, slopes, w, t, accumulate);
        if (adapted) { up(sum, du, a, t, w->k, l->r, kept, mask_of(l)); }
    }
}
