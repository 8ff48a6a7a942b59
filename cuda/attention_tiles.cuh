/* attention_tiles.cuh: products of tiles of N keys by mma.sync, for blocks of 4 warps. Rows of shared memory are D + 8
 * elements apart: an odd number of 16-byte chunks, so the 8 rows of an ldmatrix meet all 32 banks, and every address is a
 * constant away from the lane's own. */
#ifndef QL_CUDA_ATTENTION_TILES_CUH
#define QL_CUDA_ATTENTION_TILES_CUH

#include "attention.cuh"

enum { WARPS = 4, THREADS = WARPS * WARP, KEYS = 64 };

/* what the lane reads first of a tile's rows: as rows of the left factor from `row` on, as columns of the right one, and
 * as rows of the right one */
template <int D> __device__ __forceinline__ uint32_t row_address(const bf16 *tile, int row) {
    int lane = threadIdx.x % WARP;
    return shared_address(tile + (row + lane % 16) * (D + 8) + lane / 16 * 8);
}
template <int D> __device__ __forceinline__ uint32_t key_address(const bf16 *tile) {
    int lane = threadIdx.x % WARP;
    return shared_address(tile + (lane % 8 + lane / 16 * 8) * (D + 8) + lane / 8 % 2 * 8);
}
template <int D> __device__ __forceinline__ uint32_t value_address(const bf16 *tile) { return row_address<D>(tile, 0); }

/* `rows` rows from global memory, `step` elements apart, to shared memory; zeros from row `valid` on */
template <int D, int rows>
__device__ __forceinline__ void load_rows(bf16 *to, const bf16 *from, int64_t step, int valid) {
    constexpr int chunks = D / 8;
    static_assert(rows * chunks % THREADS == 0, "whole rounds");
#pragma unroll
    for (int i = 0; i < rows * chunks / THREADS; i++) {
        int index = threadIdx.x + i * THREADS, row = index / chunks, chunk = index % chunks;
        copy_async_16(shared_address(to + row * (D + 8) + chunk * 8), from + (row < valid ? row : 0) * step + chunk * 8,
                      row < valid);
    }
}

/* score (16 MT, N) = Q K^T of this warp; q, k: the lane's addresses in shared memory (row_address, key_address) */
template <int D, int MT, int N>
__device__ __forceinline__ void multiply_keys(float (&score)[MT][N / 8][4], uint32_t q, uint32_t k) {
    constexpr int row_bytes = (D + 8) * 2;
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int n = 0; n < N / 8; n++) { score[m][n][0] = score[m][n][1] = score[m][n][2] = score[m][n][3] = 0.0f; }
    }
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        uint32_t a[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++) { load_matrix_4(a[m], q + m * 16 * row_bytes + i * 32); }
#pragma unroll
        for (int n = 0; n < N / 16; n++) {
            uint32_t b[4];
            load_matrix_4(b, k + n * 16 * row_bytes + i * 32);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma_bf16(score[m][2 * n], a[m], b[0], b[1]);
                mma_bf16(score[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

/* out (16 MT, D) += weights V; v: value_address */
template <int D, int MT, int N>
__device__ __forceinline__ void multiply_values(float (&out)[MT][D / 8][4], const float (&weight)[MT][N / 8][4],
                                                uint32_t v) {
    constexpr int row_bytes = (D + 8) * 2;
#pragma unroll
    for (int i = 0; i < N / 16; i++) {
        uint32_t a[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++) {
            a[m][0] = pack_bf16(weight[m][2 * i][0], weight[m][2 * i][1]);
            a[m][1] = pack_bf16(weight[m][2 * i][2], weight[m][2 * i][3]);
            a[m][2] = pack_bf16(weight[m][2 * i + 1][0], weight[m][2 * i + 1][1]);
            a[m][3] = pack_bf16(weight[m][2 * i + 1][2], weight[m][2 * i + 1][3]);
        }
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            uint32_t b[4];
            load_matrix_4_transposed(b, v + i * 16 * row_bytes + n * 32);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma_bf16(out[m][2 * n], a[m], b[0], b[1]);
                mma_bf16(out[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

#endif
