/* attention_backward_tiles.cu: the gradient of causal attention, bf16 with float32 sums, in two passes (FlashAttention-2, Dao
 * 2023): one makes dk and dv, one dq, each sum in a block of its own, so that the bits are the same each time.
 *
 * A block of 4 warps owns 64 rows, a warp 16 of them: keys and values, or queries and gradients of their outputs. The other
 * side comes in tiles of 64 rows, the next one on its way while this one is worked on. Of queries, whose sums take half as many
 * registers, a warp has twice as many, in tiles of 32, so that each fragment of keys and values is read for two products.
 * With A, B the own rows and Y, Z the tile's, p = exp(scale A Y^T - lse), ds = p (B Z^T - delta), and then, of keys (A, B = k, v; Y, Z = q, dout):
 * dk += ds Y, dv += p Z; of queries (A, B = q, dout; Y, Z = k, v): dq += ds Y.
 *
 *   shared: A, B (2, own, d + 8) | Y, Z of tile 0 (2, tile, d + 8) | Y, Z of tile 1 | keys: lse, delta of both tiles (2, 2, 64) */
#include "attention_backward.cuh"
#include "attention_tiles.cuh"
#include "cuda.h"

#define LOG2_E 1.4426950408889634f

/* ---- delta ----------------------------------------------------------------------------------------------------------- */

enum { DELTA_ROWS = 4 }; /* of a warp */

/* delta (rows,) = the sum of dout out along a row of d */
static __global__ void __launch_bounds__(THREADS) delta_kernel(float *delta, const bf16 *dout, const bf16 *out, int64_t rows, int d) {
    ql_cuda_wait_previous();
    ql_cuda_start_next();
    int64_t first = ((int64_t)blockIdx.x * WARPS + threadIdx.x / WARP) * DELTA_ROWS;
    float sum[DELTA_ROWS] = {};
    for (int i = 4 * (threadIdx.x % WARP); i < d; i += 4 * WARP) {
#pragma unroll
        for (int r = 0; r < DELTA_ROWS; r++) {
            int64_t at = (first + r < rows ? first + r : rows - 1) * d + i;
            uint2 x = *(const uint2 *)(dout + at), y = *(const uint2 *)(out + at);
            float2 a = unpack_bf16(x.x), b = unpack_bf16(y.x), c = unpack_bf16(x.y), e = unpack_bf16(y.y);
            sum[r] += a.x * b.x + a.y * b.y + c.x * e.x + c.y * e.y;
        }
    }
#pragma unroll
    for (int r = 0; r < DELTA_ROWS; r++) {
        sum[r] = warp_sum(sum[r]);
        if (threadIdx.x % WARP == 0 && first + r < rows) { delta[first + r] = sum[r]; }
    }
}

/* ---- tiles ----------------------------------------------------------------------------------------------------------- */

/* one sequence's part of a block's work, from own row `first` on */
struct strip {
    int64_t first_query, first_key; /* rows of q, of k */
    int queries, keys, before;      /* query r sees keys [0, before + r] */
    int first;
};

template <int D, bool keys> struct backward_block {
    static constexpr int MT = keys || D == 80 ? 1 : 2, N = MT == 1 ? KEYS : KEYS / 2; /* 16-row tiles a warp, rows a tile */
    static constexpr int rows = 16 * MT * WARPS, stride = D + 8, own = rows * stride, tile = N * stride;
    static constexpr size_t shared_bytes = (size_t)(2 * own + 4 * tile) * sizeof(bf16) + (keys ? 4 * KEYS * sizeof(float) : 0);
};

/* the tile of the other side from row `from` on, for head `head` of q */
template <int D, bool keys>
static __device__ __forceinline__ void load_tile(const gradient_args<bf16> &a, const strip &s, bf16 *tile, float *statistics,
                                                 int from, int head) {
    constexpr int size = backward_block<D, keys>::tile, N = backward_block<D, keys>::N;
    int64_t q_step = (int64_t)a.hq * D, kv_step = (int64_t)a.hkv * D;
    if constexpr (keys) {
        int64_t at = (s.first_query + from) * q_step + head * D;
        load_rows<D, N>(tile, a.q + at, q_step, s.queries - from);
        load_rows<D, N>(tile + size, a.dout + at, q_step, s.queries - from);
        int row = threadIdx.x % KEYS;
        bool there = from + row < s.queries;
        int64_t place = (s.first_query + from + (there ? row : 0)) * a.hq + head;
        if (threadIdx.x < KEYS) {
            statistics[row] = there ? a.lse[place] * LOG2_E : INFINITY; /* a weight of 0 */
        } else {
            statistics[KEYS + row] = there ? a.delta[place] : 0.0f;
        }
    } else {
        int64_t at = (s.first_key + from) * kv_step + head / (a.hq / a.hkv) * D;
        load_rows<D, N>(tile, a.k + at, kv_step, s.keys - from);
        load_rows<D, N>(tile + size, a.v + at, kv_step, s.keys - from);
    }
}

/* score -> p, dp -> ds of this warp's rows. seen: keys: column of the tile from which on the lane's first row is seen; queries:
 * keys of the tile that it sees. lse, delta: of keys those of the tile, else of the lane's rows */
template <bool keys, int MT, int N>
static __device__ __forceinline__ void weigh(float (&score)[MT][N / 8][4], float (&dp)[MT][N / 8][4], const float *lse,
                                             const float *delta, float scale_log2, int seen, bool masked) {
    int column = 2 * (threadIdx.x % 4);
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int at = n * 8 + column + (e & 1), row = m * 16 + (e >> 1) * 8, of = keys ? at : 2 * m + (e >> 1);
                float p = exp2_fast(fmaf(score[m][n][e], scale_log2, -lse[of]));
                bool hidden = keys ? at < seen + row : at >= seen + row;
                if (masked && hidden) { p = 0.0f; }
                score[m][n][e] = p;
                dp[m][n][e] = p * (dp[m][n][e] - delta[of]);
            }
        }
    }
}

/* the warp's rows of sums * factor as bf16, through its rows of `shared` */
template <int D, int MT>
static __device__ __forceinline__ void write_rows(bf16 *to, int64_t step, int valid, bf16 *shared, const float (&sums)[MT][D / 8][4],
                                                  float factor) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                *(uint32_t *)(shared + (m * 16 + r * 8 + lane / 4) * (D + 8) + n * 8 + 2 * (lane % 4)) =
                    pack_bf16(sums[m][n][2 * r] * factor, sums[m][n][2 * r + 1] * factor);
            }
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < MT * 16 * (D / 8) / WARP; i++) {
        int index = lane + i * WARP, row = index / (D / 8), chunk = index % (D / 8);
        if (row < valid) { *(uint4 *)(to + row * step + chunk * 8) = *(const uint4 *)(shared + row * (D + 8) + chunk * 8); }
    }
    __syncwarp();
}

/* false where this block has no rows */
template <bool keys> static __device__ __forceinline__ bool find(strip &s, const gradient_args<bf16> &a, int rows) {
    s.first_query = a.q_start[blockIdx.y], s.first_key = a.kv_start[blockIdx.y];
    s.queries = (int)(a.q_start[blockIdx.y + 1] - s.first_query), s.keys = (int)a.kv_len[blockIdx.y];
    s.before = s.keys - s.queries;
    s.first = (keys ? blockIdx.z : gridDim.z - 1 - blockIdx.z) * rows; /* the longest first */
    return s.first < (keys ? s.keys : s.queries);
}

/* of the lane's rows of queries, from `row` on; rows that are not there take those of the last */
template <int MT>
static __device__ __forceinline__ void load_statistics(float (&lse)[2 * MT], float (&delta)[2 * MT], const gradient_args<bf16> &a,
                                                       const strip &s, int row, int head) {
#pragma unroll
    for (int r = 0; r < 2 * MT; r++) {
        int64_t place = (s.first_query + min(row + 8 * r, s.queries - 1)) * a.hq + head;
        lse[r] = a.lse[place] * LOG2_E, delta[r] = a.delta[place];
    }
}

/* Grid (heads: of k, or of q, b, tiles of own rows). The pass of queries comes second and fills up what the first leaves idle:
 * it may start once all blocks of that have begun, so after delta has been made, and waits for its end at its own. */
template <int D, bool keys> static __global__ void __launch_bounds__(THREADS, 2) backward_kernel(gradient_args<bf16> a) {
    typedef backward_block<D, keys> block;
    constexpr int MT = block::MT, N = block::N;
    extern __shared__ __align__(16) bf16 shared[];
    if (keys) {
        ql_cuda_wait_previous();
        ql_cuda_start_next();
    }
    strip s;
    if (!find<keys>(s, a, block::rows)) { return keys ? (void)0 : ql_cuda_wait_previous(); }
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, group = a.hq / a.hkv;
    int64_t q_step = (int64_t)a.hq * D, kv_step = (int64_t)a.hkv * D;
    int64_t own = keys ? (s.first_key + s.first) * kv_step + blockIdx.x * D : (s.first_query + s.first) * q_step + blockIdx.x * D;
    int valid = (keys ? s.keys : s.queries) - s.first;
    bf16 *stages = shared + 2 * block::own;
    float *statistics = (float *)(stages + 4 * block::tile);
    load_rows<D, block::rows>(shared, (keys ? a.k : a.q) + own, keys ? kv_step : q_step, valid);
    load_rows<D, block::rows>(shared + block::own, (keys ? a.v : a.dout) + own, keys ? kv_step : q_step, valid);

    /* tiles of the other side: of keys, from the first query that sees one of them, for each head of the group */
    int begin = keys ? max(0, s.first - s.before) / N : 0;
    int end = ((keys ? s.queries : min(s.before + s.first + block::rows, s.keys)) + N - 1) / N;
    int tiles = end - begin, steps = keys ? tiles * group : tiles;
    int head = keys ? blockIdx.x * group : blockIdx.x;
    if (steps > 0) { load_tile<D, keys>(a, s, stages, statistics, begin * N, head); }
    copy_async_commit();

    float first_sum[MT][D / 8][4] = {}, second_sum[1][keys ? D / 8 : 1][4] = {}; /* dk or dq; dv */
    float row_lse[2 * MT] = {}, row_delta[2 * MT] = {};
    int row = s.first + warp * 16 * MT + lane / 4; /* the lane's first */
    if constexpr (!keys) { load_statistics<MT>(row_lse, row_delta, a, s, row, head); }
    uint32_t a_lane = row_address<D>(shared, warp * 16 * MT), own_bytes = block::own * sizeof(bf16), tile_bytes = block::tile * sizeof(bf16);
    uint32_t score_lane = key_address<D>(stages), sum_lane = value_address<D>(stages);
    for (int j = 0; j < steps; j++) {
        copy_async_wait<0>();
        __syncthreads(); /* tile j is here, and nobody reads tile j - 1 any more */
        int next = j + 1;
        if (next < steps) {
            load_tile<D, keys>(a, s, stages + next % 2 * 2 * block::tile, statistics + next % 2 * 2 * KEYS,
                               (begin + next % tiles) * N, head + next / tiles);
        }
        copy_async_commit();
        int from = (begin + j % tiles) * N;
        uint32_t stage = j % 2 * 2 * tile_bytes;
        const float *of_tile = statistics + j % 2 * 2 * KEYS;
        float score[MT][N / 8][4], dp[MT][N / 8][4];
        multiply_keys<D, MT, N>(score, a_lane, score_lane + stage);
        multiply_keys<D, MT, N>(dp, a_lane + own_bytes, score_lane + stage + tile_bytes);
        /* a query sees keys up to before + itself */
        int seen = keys ? row - s.before - from : s.before + row + 1 - from;
        bool masked = keys ? s.first + block::rows - 1 - s.before > from : s.before + s.first + 1 < from + N;
        weigh<keys, MT, N>(score, dp, keys ? of_tile : row_lse, keys ? of_tile + KEYS : row_delta, a.scale * LOG2_E, seen, masked);
        if constexpr (keys) { multiply_values<D, 1, N>(second_sum, score, sum_lane + stage + tile_bytes); }
        multiply_values<D, MT, N>(first_sum, dp, sum_lane + stage);
    }
    copy_async_wait<0>();
    __syncthreads(); /* also where no tile came: the own rows are here, and give way */
    bf16 *rows = shared + warp * 16 * MT * block::stride;
    int64_t step = keys ? kv_step : q_step, at = own + warp * 16 * MT * step;
    write_rows<D, MT>((keys ? a.dk : a.dq) + at, step, valid - warp * 16 * MT, rows, first_sum, a.scale);
    if constexpr (keys) { write_rows<D, 1>(a.dv + at, step, valid - warp * 16, rows, second_sum, 1.0f); }
    if (!keys) { ql_cuda_wait_previous(); }
}

template <int D> static void launch(const gradient_args<bf16> &args, int64_t max_queries, int64_t max_keys) {
    constexpr int key_rows = backward_block<D, true>::rows, query_rows = backward_block<D, false>::rows;
    dim3 keys((unsigned)args.hkv, (unsigned)args.b, (unsigned)((max_keys + key_rows - 1) / key_rows));
    dim3 queries((unsigned)args.hq, (unsigned)args.b, (unsigned)((max_queries + query_rows - 1) / query_rows));
    ql_cuda_launch(backward_kernel<D, true>, keys, dim3(THREADS), backward_block<D, true>::shared_bytes, true, args);
    ql_cuda_launch(backward_kernel<D, false>, queries, dim3(THREADS), backward_block<D, false>::shared_bytes, true, args);
}

bool ql_attention_backward_tiles(gradient_args<bf16> args, int64_t t, int64_t max_queries, int64_t max_keys) {
    if (args.b > 65535 || max_queries > 65535 * KEYS || max_keys > 65535 * KEYS) { return false; }
    if (args.d != 64 && args.d != 80 && args.d != 96 && args.d != 128) { return false; }
    int64_t rows = t * args.hq;
    float *delta = (float *)ql_cuda_scratch(QL_SCRATCH_ATTENTION, (size_t)rows * sizeof(float));
    if (delta == NULL) { return true; }
    int64_t block_rows = WARPS * DELTA_ROWS;
    ql_cuda_launch(delta_kernel, dim3((unsigned)((rows + block_rows - 1) / block_rows)), dim3(THREADS), 0, true, delta, args.dout, args.out,
                   rows, args.d);
    args.delta = delta;
    switch (args.d) {
    case 64: launch<64>(args, max_queries, max_keys); break;
    case 80: launch<80>(args, max_queries, max_keys); break;
    case 96: launch<96>(args, max_queries, max_keys); break;
    default: launch<128>(args, max_queries, max_keys); break;
    }
    return true;
}
