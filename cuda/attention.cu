/* attention.cu: the slots of attention, and the plain kernel behind them: float32 sums of float32 or bf16 values, any head
 * size. The slot of the float32 table is all its own; of the fused bf16 slot it serves what the fast kernels do not know.
 *
 * A block of 4 warps takes 16 queries of one head, a warp 4 of them; keys come in tiles of 32, one a lane for the scores, then
 * a lane owns columns for the sum of values, 128 columns of the output a block. The lengths lie on the device, so blocks are
 * dealt out over all sequences in a loop.
 *
 *   shared, float: Q (4 warps, d, 4) | K (32, d + 1) | V (32, 128) | weights (4 warps, 32, 4) */
#include "attention.cuh"
#include "linear.cuh"

enum { WARPS = 4, THREADS = WARPS * WARP, PER_WARP = 4, ROWS = WARPS * PER_WARP, KEYS = WARP, COLUMNS = 128 };

static __device__ __forceinline__ float to_float(float x) { return x; }
static __device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
static __device__ __forceinline__ void store(float *to, float x) { *to = x; }
static __device__ __forceinline__ void store(bf16 *to, float x) { *to = __float2bfloat16_rn(x); }

static size_t shared_bytes(int64_t d) {
    return (size_t)(ROWS * d + KEYS * (d + 1) + KEYS * COLUMNS + ROWS * KEYS) * sizeof(float);
}

/* 16 query rows of one head, `rows` of them there, the first of which sees `seen` keys; columns [column, column + columns) */
struct work {
    int64_t query, seen, kv_start;
    int rows, head, column, columns;
};

template <typename T> static __device__ void load_queries(const attention_args<T> &args, const work &w, float *q) {
    for (int i = threadIdx.x; i < ROWS * args.d; i += THREADS) {
        int row = i / args.d, at = i % args.d;
        q[(row / PER_WARP * args.d + at) * PER_WARP + row % PER_WARP] =
            row < w.rows ? to_float(args.q[((w.query + row) * args.hq + w.head) * args.d + at]) : 0.0f;
    }
}

/* keys and values [first, first + count) */
template <typename T>
static __device__ void load_tile(const attention_args<T> &args, const work &w, float *k, float *v, int64_t first, int count) {
    int64_t step = (int64_t)args.hkv * args.d, from = (w.kv_start + first) * step + w.head / (args.hq / args.hkv) * args.d;
    for (int i = threadIdx.x; i < KEYS * args.d; i += THREADS) {
        int row = i / args.d, at = i % args.d;
        k[row * (args.d + 1) + at] = row < count ? to_float(args.k[from + row * step + at]) : 0.0f;
    }
    for (int i = threadIdx.x; i < KEYS * COLUMNS; i += THREADS) {
        int row = i / COLUMNS, at = i % COLUMNS;
        v[i] = row < count && at < w.columns ? to_float(args.v[from + row * step + w.column + at]) : 0.0f;
    }
}

/* of the warp's 4 rows and the lane's key */
static __device__ __forceinline__ void score_key(float (&score)[PER_WARP], const float *q, const float *key, int d) {
    score[0] = score[1] = score[2] = score[3] = 0.0f;
    for (int i = 0; i < d; i++) {
        float4 mine = *(const float4 *)(q + i * PER_WARP);
        score[0] = fmaf(mine.x, key[i], score[0]), score[1] = fmaf(mine.y, key[i], score[1]);
        score[2] = fmaf(mine.z, key[i], score[2]), score[3] = fmaf(mine.w, key[i], score[3]);
    }
}

/* Of the warp's 4 rows and the lane's columns: the first row sees `seen` keys of the tile, each row after it one more. What a
 * row does not see is left out, not multiplied by zero: it need not be a number. */
static __device__ __forceinline__ void add_values(float (&out)[PER_WARP][COLUMNS / WARP], const float *weights, const float *v,
                                                  int seen, int count) {
    int all = min(max(seen, 0), count);
    for (int i = 0; i < all; i++) {
        float4 w = *(const float4 *)(weights + i * PER_WARP);
#pragma unroll
        for (int n = 0; n < COLUMNS / WARP; n++) {
            float value = v[i * COLUMNS + n * WARP + threadIdx.x % WARP];
            out[0][n] = fmaf(w.x, value, out[0][n]), out[1][n] = fmaf(w.y, value, out[1][n]);
            out[2][n] = fmaf(w.z, value, out[2][n]), out[3][n] = fmaf(w.w, value, out[3][n]);
        }
    }
    for (int i = all; i < min(count, seen + PER_WARP - 1); i++) {
#pragma unroll
        for (int r = 1; r < PER_WARP; r++) {
            if (i >= seen + r) { continue; }
#pragma unroll
            for (int n = 0; n < COLUMNS / WARP; n++) {
                out[r][n] = fmaf(weights[i * PER_WARP + r], v[i * COLUMNS + n * WARP + threadIdx.x % WARP], out[r][n]);
            }
        }
    }
}

template <typename T> static __device__ void attend(const attention_args<T> &args, const work &w, float *shared) {
    int d = args.d, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float *q = shared, *k = q + ROWS * d, *v = k + KEYS * (d + 1), *weights = v + KEYS * COLUMNS + warp * KEYS * PER_WARP;
    int64_t keys = w.seen + w.rows - 1;
    __syncthreads(); /* the queries before have been read */
    load_queries(args, w, q);
    float out[PER_WARP][COLUMNS / WARP] = {}, maximum[PER_WARP], sum[PER_WARP] = {}, score[PER_WARP];
    for (int r = 0; r < PER_WARP; r++) { maximum[r] = -INFINITY; }
    for (int64_t first = 0; first < keys; first += KEYS) {
        int count = (int)min((int64_t)KEYS, keys - first);
        __syncthreads(); /* the tile before has been read */
        load_tile(args, w, k, v, first, count);
        __syncthreads();
        score_key(score, q + warp * d * PER_WARP, k + lane * (d + 1), d);
#pragma unroll
        for (int r = 0; r < PER_WARP; r++) {
            score[r] = first + lane < w.seen + warp * PER_WARP + r ? score[r] * args.scale : -INFINITY;
            float top = fmaxf(maximum[r], warp_max(score[r])), keep = expf(maximum[r] - top), weight = expf(score[r] - top);
            maximum[r] = top;
            sum[r] = sum[r] * keep + weight; /* of this lane's keys */
            weights[lane * PER_WARP + r] = weight;
#pragma unroll
            for (int n = 0; n < COLUMNS / WARP; n++) { out[r][n] *= keep; }
        }
        __syncwarp();
        add_values(out, weights, v, (int)min((int64_t)KEYS, w.seen + warp * PER_WARP - first), count);
    }
#pragma unroll
    for (int r = 0; r < PER_WARP; r++) {
        int row = warp * PER_WARP + r;
        float total = warp_sum(sum[r]);
        if (row >= w.rows) { break; }
        int64_t at = (w.query + row) * args.hq + w.head;
#pragma unroll
        for (int n = 0; n < COLUMNS / WARP; n++) {
            if (n * WARP + lane < w.columns) { store(args.out + at * d + w.column + n * WARP + lane, out[r][n] / total); }
        }
        if (args.lse != NULL && w.column == 0 && lane == 0) { args.lse[at] = maximum[r] + logf(total); }
    }
}

/* any grid: work item i (16 queries of a head and up to 128 columns) belongs to block i % grid */
template <typename T> static __global__ void __launch_bounds__(THREADS) attention_plain_kernel(attention_args<T> args) {
    extern __shared__ __align__(16) float plain_shared[];
    ql_cuda_wait_previous();
    ql_cuda_start_next();
    int panels = (args.d + COLUMNS - 1) / COLUMNS;
    int64_t next = blockIdx.x, begin = 0; /* items of the sequences before */
    for (int sequence = 0; sequence < args.b; sequence++) {
        int64_t first = args.q_start[sequence], queries = args.q_start[sequence + 1] - first;
        int64_t tiles = (queries + ROWS - 1) / ROWS, end = begin + tiles * args.hq * panels;
        for (; next < end; next += gridDim.x) {
            int64_t item = next - begin, row = (tiles - 1 - item / (args.hq * panels)) * ROWS; /* long ones first */
            int column = (int)(item % panels) * COLUMNS;
            work w = {first + row, args.kv_len[sequence] - queries + row + 1, args.kv_start[sequence],
                      (int)min((int64_t)ROWS, queries - row), (int)(item / panels % args.hq), column,
                      min(COLUMNS, args.d - column)};
            attend(args, w, plain_shared);
        }
        begin = end;
    }
}

template <typename T> static void launch_plain(const attention_args<T> &args) {
    ql_cuda_launch(attention_plain_kernel<T>, dim3((unsigned)ql_cuda_multiprocessors() * 4), dim3(THREADS),
                   shared_bytes(args.d), true, args);
}

extern "C" void ql_attention_forward_cuda(float *out, float *lse, const float *q, const float *k, const float *v,
                                          const int64_t *q_start, const int64_t *kv_start, const int64_t *kv_len, int64_t b,
                                          int64_t hq, int64_t hkv, int64_t d, float scale) {
    if (b == 0) { return; }
    attention_args<float> args = {out, lse, q, k, v, q_start, kv_start, kv_len, (int)b, (int)hq, (int)hkv, (int)d, scale, 0};
    launch_plain(args);
}

extern "C" void ql_attention_fused_forward_cuda(void *out, float *lse, const void *q, const void *k, const void *v,
                                                const int64_t *q_start, const int64_t *kv_start, const int64_t *kv_len,
                                                int64_t t, int64_t b, int64_t hq, int64_t hkv, int64_t d, int64_t max_queries,
                                                int64_t max_keys, float scale, int ordered) {
    if (t == 0) { return; }
    attention_args<bf16> args = {(bf16 *)out, lse,      (const bf16 *)q, (const bf16 *)k, (const bf16 *)v, q_start, kv_start,
                                 kv_len,      (int)b,   (int)hq,         (int)hkv,        (int)d,          scale, ordered};
    if (lse == NULL && max_queries == 1 && ql_attention_decode(args, max_keys)) { return; }
    args.ordered = ordered && d % 32 == 0;
    if (max_queries > 64 && ql_attention_wgmma(args, max_queries)) { return; }
    bool prefilled = ql_attention_prefill(args, max_queries, max_keys);
    if (!prefilled) { launch_plain(args); }
    if (ordered && !(prefilled && args.ordered)) { ql_cuda_order_columns(args.out, t, hq * d); }
}
