/* low_rank.cuh: what a low-rank adapter adds to a product: u = scale x A^T of a few columns is made first (adapted.cu), and B is
 * multiplied where the product's own sum ends. */
#ifndef QL_CUDA_LOW_RANK_CUH
#define QL_CUDA_LOW_RANK_CUH

#include "device.cuh"

/* y (m, n) += u B^T; r 0: nothing */
typedef struct {
    const float *u, *b; /* u[i * line + j], token i, rank j; b (n, r) */
    int64_t r, line;
} ql_low_rank_term;

/* from[j] and from[j + 1], zeros from r on or where from is NULL, as pairs: what bf16 holds of them, and what it leaves in low */
__device__ __forceinline__ uint32_t low_rank_pair(uint32_t &low, const float *from, int64_t j, int64_t r) {
    float2 v = make_float2(0.0f, 0.0f);
    if (from != NULL && j + 1 < r && (uintptr_t)(from + j) % 8 == 0) {
        v = *(const float2 *)(from + j);
    } else if (from != NULL) {
        v = make_float2(j < r ? from[j] : 0.0f, j + 1 < r ? from[j + 1] : 0.0f);
    }
    uint32_t high = pack_bf16(v.x, v.y);
    float2 held = unpack_bf16(high);
    low = pack_bf16(v.x - held.x, v.y - held.y);
    return high;
}

/* c, 16 rows x 8 tokens as mma.m16n8k16 has them, += rows of B times u: of lane l, b[0] and b[1] are the rows of B for rows l / 4 and
 * l / 4 + 8, u that of token l / 4 (NULL: zeros) */
__device__ __forceinline__ void low_rank_fragment(float (&c)[4], const float *const (&b)[2], const float *u, int64_t r, int lane) {
#pragma unroll 2
    for (int64_t j = lane % 4 * 2; j - lane % 4 * 2 < r; j += 16) {
        uint32_t high[4], low[4], x[2], x_low[2];
#pragma unroll
        for (int i = 0; i < 4; i++) { high[i] = low_rank_pair(low[i], b[i % 2], j + i / 2 * 8, r); }
#pragma unroll
        for (int i = 0; i < 2; i++) { x[i] = low_rank_pair(x_low[i], u, j + i * 8, r); }
        mma_bf16(c, high, x[0], x[1]);
        mma_bf16(c, low, x[0], x[1]);
        mma_bf16(c, high, x_low[0], x_low[1]);
    }
}

#endif
