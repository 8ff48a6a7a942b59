/* adapted.cu: a product with a low-rank adapter beside it, and its gradients: bf16 activations, float32 adapters. The weight's part
 * is decoded and goes through cuBLAS; the adapter's are three kernels here, each bound by reading the activations once:
 *
 *   down  u (t, r) = factor z (t, k) M^T      M (r, k): tensor cores, M split into two bf16 numbers
 *   up    y (t, n) = or += u (t, r) M         M (r, n)
 *   gram  M (r, n) += u (t, r)^T z (t, n)     in parts of rows, added in order
 *
 * M is A, or B transposed, wherever its strides say. Where nothing is learned (fused.cu), `down` takes all adapters of an input at
 * once, and for few tokens the products themselves add what `up` would (low_rank.cuh). */
#include "linear.cuh"
#include "pipeline.cuh"

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

enum { DOWN_PARTS = 3, DOWN_TOKENS = 16, DOWN_CLUSTER = 8, DOWN_STEPS = 2 /* of a warp whose loads are on their way at once */ };

struct down_part {
    factor_matrix m;
    int64_t r;
    float factor;
};

struct down_args {
    float *u;       /* (t, line): the parts side by side */
    ql_activations x; /* (t, width) */
    down_part part[DOWN_PARTS];
    int64_t t, width, line;
    mask dropout;
};

/* eight values as pairs */
static __device__ __forceinline__ uint4 pack_8(const float (&v)[8]) {
    return make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
}

/* v = from[0 .. 7], zeros from `width` on, of which j is the place of from[0] */
static __device__ __forceinline__ void load_floats(float (&v)[8], const float *from, int64_t step, int64_t j, int64_t width) {
    if (step == 1 && j + 8 <= width && (uintptr_t)from % 16 == 0) {
        float4 low = *(const float4 *)from, high = *(const float4 *)(from + 4);
        v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w, v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
        return;
    }
#pragma unroll
    for (int e = 0; e < 8; e++) { v[e] = j + e < width ? from[e * step] : 0.0f; }
}

/* x[j .. j + 7] of a row, zeros from `limit` on, the width or 0; squares += theirs, ahead of the gain */
template <bool Floats>
static __device__ __forceinline__ uint4 load_8(const down_args &a, int64_t row, int64_t j, int64_t limit, float &squares) {
    __align__(16) float v[8];
    if constexpr (Floats) {
        float gain[8];
        load_floats(v, a.x.floats + row * a.width + j, 1, j, limit);
        load_floats(gain, a.x.gain + j, 1, j, limit);
#pragma unroll
        for (int e = 0; e < 8; e++) { squares += v[e] * v[e], v[e] *= gain[e]; }
    } else {
        const bf16 *from = a.x.halves + row * a.width + j;
        if (a.dropout.p == 0.0f && a.width % 8 == 0) { return j < limit ? *(const uint4 *)from : make_uint4(0, 0, 0, 0); }
#pragma unroll
        for (int e = 0; e < 8; e++) { v[e] = j + e < limit ? masked(a.dropout, row * a.width + j + e, __bfloat162float(from[e])) : 0.0f; }
    }
    return pack_8(v);
}

/* as pairs: what bf16 holds of v, and what it leaves */
static __device__ __forceinline__ void split(uint32_t (&high)[4], uint32_t (&low)[4], const float (&v)[8]) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
        high[e] = pack_bf16(v[2 * e], v[2 * e + 1]);
        float2 kept = unpack_bf16(high[e]);
        low[e] = pack_bf16(v[2 * e] - kept.x, v[2 * e + 1] - kept.y);
    }
}

/* the sums of the blocks of a cluster into the first one's `totals`, of which its barrier `arrived` counts the bytes, and whether this is the first */
static __device__ __forceinline__ bool gather_sums(float (*totals)[DOWN_TOKENS][RANKS + 1], uint32_t arrived, float sum, bool there, int token, int i) {
#ifdef QL_HAS_BULK_COPY
    if (cluster_size() > 1) {
        int rank = cluster_rank();
        cluster_wait(); /* the first has begun */
        if (there) { cluster_store_async(cluster_address(shared_address(&totals[rank][token][i]), 0), sum, cluster_address(arrived, 0)); }
        if (rank == 0) { barrier_wait(arrived, 0); }
        return rank == 0;
    }
#endif
    if (there) { totals[0][token][i] = sum; }
    __syncthreads();
    return true;
}

/* what a block of the kernel below works on: tokens from `row` on, columns first .. end, ranks from `rank` on of a part */
struct down_place {
    const down_part *part;
    int64_t row, first, end, rank, at; /* at: the part's first column of u */
    int blocks;                        /* of the cluster */
};

static __device__ __forceinline__ down_place locate_down(const down_args &a) {
    int block = 0;
    down_place p = {a.part, 0, 0, 0, (int64_t)blockIdx.y * RANKS, 0, 1};
#ifdef QL_HAS_BULK_COPY
    p.blocks = cluster_size(), block = cluster_rank();
#endif
    for (int64_t ranks; p.rank >= (ranks = (p.part->r + RANKS - 1) / RANKS * RANKS); p.part++) { p.rank -= ranks, p.at += p.part->r; }
    int64_t steps = (a.width + WARP - 1) / WARP;
    p.row = (int64_t)blockIdx.x / p.blocks * DOWN_TOKENS;
    p.first = steps * block / p.blocks * WARP, p.end = steps * (block + 1) / p.blocks * WARP;
    return p;
}

/* A warp's part of the products, as mma has them, and of the squares of rows lane / 4 and lane / 4 + 8; the kernel ahead is awaited
 * here. A lane takes 8 neighbours of 32 columns, in the same places of both operands. */
template <bool Floats>
static __device__ __forceinline__ void multiply_down(float (&sum)[4], float (&squares)[2], const down_args &a, const down_place &p) {
    int lane = threadIdx.x % WARP, g = lane / 4, ahead = WARPS * WARP;
    int64_t upper = min(p.row + g, a.t - 1), lower = min(p.row + g + 8, a.t - 1), first = p.first + threadIdx.x / WARP * WARP;
    const factor_matrix &m = p.part->m;
    const float *factors = m.values + (p.rank + g) * m.rank_step;
    int64_t width = p.rank + g < p.part->r ? a.width : 0; /* of this lane's factors */
    float v[DOWN_STEPS][8];
    auto load_factors = [&](int64_t from) {
#pragma unroll
        for (int s = 0; s < DOWN_STEPS; s++) {
            int64_t j = from + s * ahead + lane % 4 * 8;
            load_floats(v[s], factors + j * m.step, m.step, j, from + s * ahead < p.end ? width : 0);
        }
    };
    load_factors(first); /* nothing writes them beside a step of training, which the host awaits */
    ql_cuda_start_next();
    ql_cuda_wait_previous();
    for (; first < p.end; first += DOWN_STEPS * ahead) {
        uint4 x[DOWN_STEPS], y[DOWN_STEPS];
        uint32_t high[DOWN_STEPS][4], low[DOWN_STEPS][4];
#pragma unroll
        for (int s = 0; s < DOWN_STEPS; s++) {
            int64_t j = first + s * ahead + lane % 4 * 8, limit = first + s * ahead < p.end ? a.width : 0;
            x[s] = load_8<Floats>(a, upper, j, limit, squares[0]), y[s] = load_8<Floats>(a, lower, j, limit, squares[1]);
            split(high[s], low[s], v[s]);
        }
        load_factors(first + DOWN_STEPS * ahead);
#pragma unroll
        for (int s = 0; s < DOWN_STEPS; s++) {
            uint32_t left[4] = {x[s].x, y[s].x, x[s].y, y[s].y}, right[4] = {x[s].z, y[s].z, x[s].w, y[s].w};
            mma_bf16(sum, left, high[s][0], high[s][1]);
            mma_bf16(sum, right, high[s][2], high[s][3]);
            mma_bf16(sum, left, low[s][0], low[s][1]);
            mma_bf16(sum, right, low[s][2], low[s][3]);
        }
    }
}

/* grid (tiles of 16 tokens x blocks of a cluster, which share the width, as the warps of a block do; tiles of 8 ranks of all parts).
 * Floats: x is float32, and normed. */
template <bool Floats> static __global__ void __launch_bounds__(DOWN_THREADS) down_kernel(const __grid_constant__ down_args a) {
    __shared__ float sums[WARPS][DOWN_TOKENS][RANKS + 1], totals[DOWN_CLUSTER][DOWN_TOKENS][RANKS + 1]; /* the last: of squares */
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4;
    __shared__ uint64_t received; /* the barrier of `totals` */
    down_place p = locate_down(a);
    uint32_t arrived = shared_address(&received);
    float sum[4] = {}, squares[2] = {};
#ifdef QL_HAS_BULK_COPY
    if (p.blocks > 1) { cluster_arrive_expect(arrived, (uint32_t)(p.blocks * DOWN_TOKENS * (RANKS + 1) * (int)sizeof(float))); }
#endif
    multiply_down<Floats>(sum, squares, a, p);
#pragma unroll
    for (int e = 0; e < 4; e++) { sums[warp][g + e / 2 * 8][lane % 4 * 2 + e % 2] = sum[e]; }
#pragma unroll
    for (int e = 0; e < 2; e++) {
        squares[e] += __shfl_xor_sync(QL_FULL_WARP, squares[e], 1);
        squares[e] += __shfl_xor_sync(QL_FULL_WARP, squares[e], 2);
        if (lane % 4 == 0) { sums[warp][g + 8 * e][RANKS] = squares[e]; }
    }
    __syncthreads();
    int token = threadIdx.x / (RANKS + 1), i = threadIdx.x % (RANKS + 1);
    bool there = token < DOWN_TOKENS;
    float total = 0.0f, square = 0.0f;
    for (int w = 0; w < WARPS && there; w++) { total += sums[w][token][i]; }
    if (!gather_sums(totals, arrived, total, there, token, i)) { return; }
    if (!there || i == RANKS || p.row + token >= a.t || p.rank + i >= p.part->r) { return; }
    total = 0.0f;
    for (int s = 0; s < p.blocks; s++) { total += totals[s][token][i], square += totals[s][token][RANKS]; }
    float inverse = Floats ? 1.0f / sqrtf(square / (float)a.width + a.x.eps) : 1.0f;
    a.u[(p.row + token) * a.line + p.at + p.rank + i] = total * p.part->factor * inverse;
}

static void launch_down(const down_args *a) {
    int64_t tokens = (a->t + DOWN_TOKENS - 1) / DOWN_TOKENS, ranks = 0;
    for (const down_part &p : a->part) { ranks += (p.r + RANKS - 1) / RANKS; }
    int cluster = 1; /* few tokens: more blocks, while each has loads for all its warps */
    while (ql_cuda_capability() >= 90 && cluster < DOWN_CLUSTER && a->width > (int64_t)cluster * DOWN_STEPS * DOWN_THREADS &&
           tokens * ranks * cluster * 2 <= ql_cuda_multiprocessors()) {
        cluster *= 2;
    }
    ql_cuda_launch_cluster(a->x.floats != NULL ? down_kernel<true> : down_kernel<false>, dim3((unsigned)(tokens * cluster), (unsigned)ranks),
                           dim3(DOWN_THREADS), 0, true, (unsigned)cluster, *a);
}

static void down(float *u, const bf16 *z, factor_matrix m, int64_t t, int64_t width, int64_t r, float factor, mask dropout) {
    down_args a = {u, {NULL, z, NULL, 0.0f, {}, 0}, {{m, r, factor}}, t, width, r, dropout};
    launch_down(&a);
}

bool ql_cuda_low_rank_terms(ql_low_rank_term *terms, const ql_activations *x, const ql_low_rank *l, int count, int64_t t, int64_t k) {
    down_args a = {NULL, *x, {}, t, k, 0, {0.0f, 0}};
    for (int i = 0; i < count; i++) {
        terms[i] = {NULL, NULL, 0, 0};
        if (l == NULL || l[i].r == 0) { continue; }
        a.part[i] = {{(float *)l[i].a, k, 1}, l[i].r, l[i].scale};
        a.line += l[i].r;
    }
    if (a.line == 0) { return true; }
    a.u = (float *)ql_cuda_scratch(QL_SCRATCH_LOW_RANK, (size_t)(t * a.line) * sizeof(float));
    if (a.u == NULL) { return false; }
    const float *u = a.u;
    for (int i = 0; i < count; u += a.part[i++].r) {
        if (a.part[i].r > 0) { terms[i] = {u, l[i].b, l[i].r, a.line}; }
    }
    launch_down(&a);
    return true;
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
static __global__ void __launch_bounds__(THREADS, 3) up_kernel(T *y, const float *u, int64_t line, factor_matrix m, int64_t t,
                                                            int64_t width, int64_t r, float factor, mask dropout) {
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
            us[i][s] = rank + i < r && row + s < t ? u[(row + s) * line + rank + i] * factor : 0.0f;
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
static void up(T *y, const float *u, int64_t line, factor_matrix m, int64_t t, int64_t width, int64_t r, float factor, mask dropout) {
    dim3 grid((unsigned)((width + 2 * THREADS - 1) / (2 * THREADS)), (unsigned)((t + UP_ROWS - 1) / UP_ROWS));
    ql_cuda_launch(dropout.p > 0.0f ? up_kernel<T, true> : up_kernel<T, false>, grid, dim3(THREADS), 0, true, y, u, line, m, t, width, r,
                   factor, dropout);
}

static const mask no_mask = {0.0f, 0};

void ql_cuda_set_term(bf16 *y, const ql_low_rank_term *term, int64_t t, int64_t n) {
    up(y, term->u, term->line, {(float *)term->b, 1, term->r}, t, n, term->r, 1.0f, no_mask);
}

void ql_cuda_add_term(float *sum, const ql_low_rank_term *term, int64_t t, int64_t n) {
    up(sum, term->u, term->line, {(float *)term->b, 1, term->r}, t, n, term->r, 1.0f, no_mask);
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

/* x in the stored order of w's columns */
static const bf16 *stored_columns(const bf16 *x, const ql_weight *w, int64_t t) {
    if (w->perm == NULL) { return x; }
    bf16 *rows = (bf16 *)ql_cuda_scratch(QL_SCRATCH_ACTIVATION, (size_t)(t * w->k) * sizeof(bf16));
    ql_activations source = {NULL, x, NULL, 0.0f, {}, 0};
    if (rows != NULL) { ql_cuda_activations_rows(rows, &source, w->perm, t, w->k, w->k, 0); }
    return rows;
}

/* The adapter's part goes first where y is bf16: the weight's sum then begins with it, and is rounded once. */
extern "C" void ql_adapted_forward_cuda(void *y, float *sum, float *u, const void *x, const ql_weight *w, const ql_low_rank *l, int64_t t) {
    if (t == 0) { return; }
    factor_matrix a = {(float *)l->a, w->k, 1}, b = {(float *)l->b, 1, l->r};
    bool adapted = l->r > 0;
    if (adapted) { down(u, (const bf16 *)x, a, t, w->k, l->r, l->scale / (1.0f - l->dropout), mask_of(l)); }
    if (adapted && y != NULL) { up((bf16 *)y, u, l->r, b, t, w->n, l->r, 1.0f, no_mask); }
    const bf16 *rows = stored_columns((const bf16 *)x, w, t);
    if (rows == NULL) { return; }
    if (y != NULL) { return ql_cuda_linear_large(y, CUDA_R_16BF, rows, w, t, adapted); }
    ql_cuda_linear_large(sum, CUDA_R_32F, rows, w, t, 1);
    if (adapted) { up(sum, u, l->r, b, t, w->n, l->r, 1.0f, no_mask); }
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
        if (adapted) { up((bf16 *)dx, du, l->r, a, t, w->k, l->r, kept, mask_of(l)); }
        weight_backward((bf16 *)dx, CUDA_R_16BF, slopes, w, t, adapted);
    } else if (sum != NULL) {
        weight_backward(sum, CUDA_R_32F, slopes, w, t, accumulate);
        if (adapted) { up(sum, du, l->r, a, t, w->k, l->r, kept, mask_of(l)); }
    }
}
