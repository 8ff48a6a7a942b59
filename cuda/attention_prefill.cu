/* attention_prefill.cu: causal attention of many queries, bf16 with float32 sums (FlashAttention-2, Dao 2023).
 *
 * A block of 4 warps owns 64 * MT query rows of one head, a warp 16 * MT of them: MT tiles of 16 rows share each fragment of
 * K and V, which halves the traffic from shared memory, the limit of mma.sync on these sizes, at MT = 2. Keys come in tiles of
 * 64, or of 32 where no sequence has more, the next one on its way while this one is worked on. Rows of shared memory are d + 8
 * elements apart: an odd number of 16-byte chunks, so the 8 rows of an ldmatrix meet all 32 banks, and every address is a constant
 * away from the lane's own.
 *
 *   shared: Q (64 MT, d + 8) | K, V of tile 0 (2, keys, d + 8) | K, V of tile 1
 *   registers, d = 128, MT = 2: output 128, scores 64 (reused as the weights' fragments) */
#include "attention_tiles.cuh"
#include "cuda.h"

template <int D, int MT, int Keys> struct tiling {
    static constexpr int rows = 16 * MT * WARPS, stride = D + 8, chunks = D / 8; /* chunks: of 8 elements, in a row */
    static constexpr int tile = Keys * stride;                                   /* elements of K, or V, of a stage */
    static constexpr size_t shared_bytes = (size_t)(rows * stride + 4 * tile) * sizeof(bf16);
};

/* -inf where the key is after the query; `seen`: keys of this tile that the first row of the lane sees */
template <int MT, int Keys> __device__ __forceinline__ void mask_keys(float (&score)[MT][Keys / 8][4], int seen) {
    int column = 2 * (threadIdx.x % 4);
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int n = 0; n < Keys / 8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                if (n * 8 + column + (e & 1) >= seen + m * 16 + (e >> 1) * 8) { score[m][n][e] = -INFINITY; }
            }
        }
    }
}

/* scores become weights exp(scale (score - maximum)); the running maximum, sum and output follow */
template <int D, int MT, int Keys>
__device__ __forceinline__ void online_softmax(float (&score)[MT][Keys / 8][4], float (&out)[MT][D / 8][4],
                                               float (&maximum)[MT][2], float (&sum)[MT][2], float scale_log2) {
#pragma unroll
    for (int m = 0; m < MT; m++) {
        float keep[2], shift[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float top = maximum[m][r];
#pragma unroll
            for (int n = 0; n < Keys / 8; n++) { top = fmaxf(top, fmaxf(score[m][n][2 * r], score[m][n][2 * r + 1])); }
            top = fmaxf(top, __shfl_xor_sync(QL_FULL_WARP, top, 1));
            top = fmaxf(top, __shfl_xor_sync(QL_FULL_WARP, top, 2));
            keep[r] = exp2_fast((maximum[m][r] - top) * scale_log2);
            maximum[m][r] = top;
            shift[r] = top * scale_log2;
            float part = 0.0f;
#pragma unroll
            for (int n = 0; n < Keys / 8; n++) {
                score[m][n][2 * r] = exp2_fast(fmaf(score[m][n][2 * r], scale_log2, -shift[r]));
                score[m][n][2 * r + 1] = exp2_fast(fmaf(score[m][n][2 * r + 1], scale_log2, -shift[r]));
                part += score[m][n][2 * r] + score[m][n][2 * r + 1];
            }
            sum[m][r] = sum[m][r] * keep[r] + part; /* of this lane's columns; the four lanes of a row meet at the end */
        }
        /* where no maximum moved the factors are exactly 1 */
        if (__any_sync(QL_FULL_WARP, keep[0] != 1.0f || keep[1] != 1.0f)) {
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                out[m][n][0] *= keep[0], out[m][n][1] *= keep[0], out[m][n][2] *= keep[1], out[m][n][3] *= keep[1];
            }
        }
    }
}

/* out / sum as bf16 over the warp's own rows of Q in shared memory, then rows of 16 bytes to global memory */
template <int D, int MT>
__device__ __forceinline__ void write_rows(bf16 *to, int64_t step, int valid, bf16 *shared, float (&out)[MT][D / 8][4],
                                           float (&sum)[MT][2], const float (&maximum)[MT][2], float scale_log2, float *lse,
                                           int64_t lse_step, int ordered) {
    constexpr int stride = D + 8, chunks = D / 8;
    int lane = threadIdx.x % WARP, row = lane / 4, column = 2 * (lane % 4);
    __syncwarp(); /* all lanes have read these rows */
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float total = sum[m][r];
            total += __shfl_xor_sync(QL_FULL_WARP, total, 1);
            total += __shfl_xor_sync(QL_FULL_WARP, total, 2);
            float inverse = 1.0f / total;
            if (lse != NULL && column == 0 && m * 16 + r * 8 + row < valid) {
                lse[(m * 16 + r * 8 + row) * lse_step] = log_sum(maximum[m][r], total, scale_log2);
            }
            bf16 *line = shared + (m * 16 + r * 8 + row) * stride + (ordered ? 4 * column : column); /* 8 n + column, or its ordered_column */
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                *(uint32_t *)(line + (ordered ? n / 4 * 32 + n % 4 * 2 : n * 8)) = pack_bf16(out[m][n][2 * r] * inverse, out[m][n][2 * r + 1] * inverse);
            }
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < MT * 16 * chunks / WARP; i++) {
        int index = lane + i * WARP, line = index / chunks, chunk = index % chunks;
        if (line < valid) { *(uint4 *)(to + line * step + chunk * 8) = *(uint4 *)(shared + line * stride + chunk * 8); }
    }
}

/* grid (hq, b, tiles of queries): the tiles with most keys first, so that none of them is left for the end */
template <int D, int MT, int Keys> __global__ void __launch_bounds__(THREADS, 2) attention_prefill_kernel(attention_args<bf16> args) {
    typedef tiling<D, MT, Keys> shape;
    constexpr int rows = shape::rows, stride = shape::stride, tile = shape::tile;
    extern __shared__ __align__(16) bf16 shared[];
    ql_cuda_wait_previous();
    ql_cuda_start_next();
    int head = blockIdx.x, first_row = (gridDim.z - 1 - blockIdx.z) * rows, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int64_t first_query = args.q_start[blockIdx.y];
    int queries = (int)(args.q_start[blockIdx.y + 1] - first_query), keys = (int)args.kv_len[blockIdx.y];
    if (first_row >= queries) { return; }

    int before = keys - queries; /* query r sees keys [0, before + r] */
    int tiles = (min(before + first_row + rows, keys) + Keys - 1) / Keys;
    int64_t q_step = (int64_t)args.hq * D, kv_step = (int64_t)args.hkv * D;
    const bf16 *q = args.q + (first_query + first_row) * q_step + head * D;
    int64_t kv_first = args.kv_start[blockIdx.y] * kv_step + head / (args.hq / args.hkv) * D;
    const bf16 *k = args.k + kv_first, *v = args.v + kv_first;
    bf16 *stages = shared + rows * stride;
    load_rows<D, rows>(shared, q, q_step, queries - first_row);
    load_rows<D, Keys>(stages, k, kv_step, keys);
    load_rows<D, Keys>(stages + tile, v, kv_step, keys);
    copy_async_commit();

    float out[MT][D / 8][4] = {}, maximum[MT][2], sum[MT][2] = {};
#pragma unroll
    for (int m = 0; m < MT; m++) { maximum[m][0] = maximum[m][1] = -INFINITY; }
    int warp_row = warp * 16 * MT;
    int seen = before + first_row + warp_row + lane / 4 + 1;      /* keys that the lane's first row sees */
    int warp_first = before + first_row + warp_row + 1, warp_last = warp_first + 16 * MT - 1;
    uint32_t q_lane = row_address<D>(shared, warp_row);
    uint32_t k_lane = key_address<D>(stages);
    uint32_t v_lane = value_address<D>(stages + tile);

    for (int j = 0; j < tiles; j++) {
        copy_async_wait<0>();
        __syncthreads(); /* tile j is here, and nobody reads tile j - 1 any more */
        if (j + 1 < tiles) {
            bf16 *next = stages + (j + 1) % 2 * 2 * tile;
            int64_t key = (int64_t)(j + 1) * Keys;
            load_rows<D, Keys>(next, k + key * kv_step, kv_step, keys - (int)key);
            load_rows<D, Keys>(next + tile, v + key * kv_step, kv_step, keys - (int)key);
        }
        copy_async_commit();
        if (j * Keys >= warp_last) { continue; } /* no row of this warp sees a key of this tile */
        uint32_t stage = j % 2 * 2 * tile * (uint32_t)sizeof(bf16);
        float score[MT][Keys / 8][4];
        multiply_keys<D, MT, Keys>(score, q_lane, k_lane + stage);
        if ((j + 1) * Keys > warp_first) { mask_keys<MT, Keys>(score, seen - j * Keys); }
        online_softmax<D, MT, Keys>(score, out, maximum, sum, args.scale);
        multiply_values<D, MT, Keys>(out, score, v_lane + stage);
    }
    int64_t row = first_query + first_row + warp_row;
    write_rows<D, MT>(args.out + row * q_step + head * D, q_step, queries - first_row - warp_row, shared + warp_row * stride, out,
                      sum, maximum, args.scale, args.lse != NULL ? args.lse + row * args.hq + head : NULL, args.hq, args.ordered);
}

template <int D, int MT, int Keys> static void launch(attention_args<bf16> args, int64_t max_queries) {
    constexpr int rows = tiling<D, MT, Keys>::rows;
    dim3 grid((unsigned)args.hq, (unsigned)args.b, (unsigned)((max_queries + rows - 1) / rows));
    args.scale *= 1.4426950408889634f; /* log2 e: weights are powers of two */
    ql_cuda_launch(attention_prefill_kernel<D, MT, Keys>, grid, dim3(THREADS), tiling<D, MT, Keys>::shared_bytes, true, args);
}

template <int D> static void launch_rows(const attention_args<bf16> &args, int64_t max_queries, int64_t max_keys) {
    constexpr int few = D % 32 == 0 ? KEYS / 2 : KEYS; /* whole rounds of load_rows */
    if (max_keys <= few) {
        launch<D, 1, few>(args, max_queries);
    } else if (max_queries <= tiling<D, 1, KEYS>::rows) {
        launch<D, 1, KEYS>(args, max_queries);
    } else {
        launch<D, 2, KEYS>(args, max_queries);
    }
}

bool ql_attention_prefill(const attention_args<bf16> &args, int64_t max_queries, int64_t max_keys) {
    if (args.b > 65535 || max_queries > 65535 * 64) { return false; }
    switch (args.d) {
    case 64: launch_rows<64>(args, max_queries, max_keys); return true;
    case 80: launch_rows<80>(args, max_queries, max_keys); return true;
    case 96: launch_rows<96>(args, max_queries, max_keys); return true;
    case 128: launch_rows<128>(args, max_queries, max_keys); return true;
    default: return false;
    }
}
