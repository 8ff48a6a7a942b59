/* norm_ahead.cuh: RMSNorm between two products without a kernel of its own: the product that adds to the residual stream also leaves
 * what the norm needs, and the product behind it multiplies its sums by what follows from it. */
#ifndef QL_CUDA_NORM_AHEAD_CUH
#define QL_CUDA_NORM_AHEAD_CUH

#include "pipeline.cuh"

enum { NORM_COLUMNS = 16, NORM_BLOCK = 32 };

/* of m tokens x (m, n), n a multiple of NORM_BLOCK */
typedef struct {
    const float *gain; /* (n,) */
    bf16 *halves;      /* (m, n): x gain, not yet divided by the root mean square of its row; NULL: nothing is left */
    float *squares;    /* (n / NORM_COLUMNS, line): sums of squares of a token's columns */
    int line;          /* a power of two from 8 on, at least m */
    int ordered;       /* whether halves has each column at its ordered_column */
} ql_norm_ahead;

/* The place of column j among those in the order of the fragments of linear_group.cuh, which reads them in it: of NORM_BLOCK,
 * pair p of the 8 columns from 8 t on is pair t of the 8 from 8 p on. */
__device__ __forceinline__ int ordered_column(int j) { return (j & ~31) | (j & 6) << 2 | (j >> 2 & 6) | (j & 1); }

/* squares of columns 16 tile .. of tokens `token` and token + 1, of which a lane has s0 and s1 of some; lane l: token l % 4 * 2 of 8 */
__device__ __forceinline__ void put_squares(const ql_norm_ahead &ahead, int tile, int token, float s0, float s1, int lane) {
#pragma unroll
    for (int apart = 4; apart < WARP; apart *= 2) {
        s0 += __shfl_xor_sync(QL_FULL_WARP, s0, apart), s1 += __shfl_xor_sync(QL_FULL_WARP, s1, apart);
    }
    if (lane < 4) { *(float2 *)(ahead.squares + (int64_t)tile * ahead.line + token) = make_float2(s0, s1); }
}

/* bytes in shared memory that `warps` warps need for make_norms of up to `tokens` tokens */
__host__ __device__ constexpr uint32_t norms_bytes(int warps, int tokens) { return (uint32_t)((1 + warps) * tokens * 4); }

/* Makes 1 / sqrt(mean(x^2) + eps) of each token, floats from `norms` in shared memory on, by `warps` warps of which this is number
 * `self`; they meet at block barrier `barrier`. */
__device__ __forceinline__ void make_norms(uint32_t norms, const ql_norm_ahead &ahead, int k, float eps, int self, int warps, int lane, int barrier) {
    int vectors = ahead.line / 4, tiles = k / NORM_COLUMNS, step = warps * (WARP / vectors); /* a lane adds four tokens of every step'th tile */
    const float4 *from = (const float4 *)ahead.squares + lane % vectors;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
    for (int tile = self * (WARP / vectors) + lane / vectors; tile < tiles; tile += step) {
        float4 v = from[(int64_t)tile * vectors];
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    for (int apart = vectors; apart < WARP; apart *= 2) {
        sum.x += __shfl_xor_sync(QL_FULL_WARP, sum.x, apart), sum.y += __shfl_xor_sync(QL_FULL_WARP, sum.y, apart);
        sum.z += __shfl_xor_sync(QL_FULL_WARP, sum.z, apart), sum.w += __shfl_xor_sync(QL_FULL_WARP, sum.w, apart);
    }
    uint32_t parts = norms + ahead.line * 4;
    if (lane < vectors) { store_shared(parts + (self * vectors + lane) * 16, sum); }
    block_barrier(barrier, warps * WARP);
    for (int token = self * WARP + lane; token < ahead.line; token += warps * WARP) {
        float total = 0.0f;
        for (int i = 0; i < warps; i++) { total += load_shared<float>(parts + (i * ahead.line + token) * 4); }
        store_shared(norms + token * 4, 1.0f / sqrtf(total / (float)k + eps));
    }
    block_barrier(barrier, warps * WARP);
}

#endif
