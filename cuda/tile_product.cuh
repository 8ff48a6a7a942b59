/* tile_product.cuh: C (m, n) += A B in float32 or float64 without tensor cores, for sums that must not be rounded below their
 * type. A block of 256 threads makes a tile of 16 R x 16 R, a thread R x R of it: rows ty + 16 i and columns tx + 16 j, so that
 * neighbours read and write neighbours. Depth comes in steps of 16 through shared memory, the next one in registers meanwhile.
 * Sums are in order of depth: where `from_c` is set they begin with C itself, else they are added to it at the end. */
#ifndef QL_CUDA_TILE_PRODUCT_CUH
#define QL_CUDA_TILE_PRODUCT_CUH

#include "cuda.h"
#include "device.cuh"

enum { PRODUCT_THREADS = 256, PRODUCT_DEPTH = 16 };

/* A(i, s) = a[s * lda + i] where transposed, else a[i * lda + s]; B(s, j) = b[s * ldb + j]; C(i, j) = c[i * ldc + j] */
template <typename T> struct product_args {
    T *c;
    const T *a, *b;
    int64_t m, n, depth, ldc, lda, ldb;
};

/* the thread's part of A (tile rows, 16) or B (16, tile columns) from step `s` on; zeros outside */
template <typename T, int R, bool transposed>
static __device__ __forceinline__ void fetch(T (&part)[R], const T *from, int64_t ld, int64_t first, int64_t count, int64_t s,
                                             int64_t depth) {
#pragma unroll
    for (int r = 0; r < R; r++) {
        int index = threadIdx.x + r * PRODUCT_THREADS;
        int64_t at = first + (transposed ? index % (16 * R) : index / PRODUCT_DEPTH);
        int64_t step = s + (transposed ? index / (16 * R) : index % PRODUCT_DEPTH);
        part[r] = at < count && step < depth ? from[transposed ? step * ld + at : at * ld + step] : (T)0;
    }
}
template <typename T, int R, bool transposed>
static __device__ __forceinline__ void keep(T (&tile)[PRODUCT_DEPTH][16 * R + 1], const T (&part)[R]) {
#pragma unroll
    for (int r = 0; r < R; r++) {
        int index = threadIdx.x + r * PRODUCT_THREADS;
        if (transposed) {
            tile[index / (16 * R)][index % (16 * R)] = part[r];
        } else {
            tile[index % PRODUCT_DEPTH][index / PRODUCT_DEPTH] = part[r];
        }
    }
}

/* grid (column tiles, row tiles); lower: only elements with row >= column are written */
template <typename T, int R, bool transposed, bool from_c, bool lower>
static __global__ void __launch_bounds__(PRODUCT_THREADS) product_kernel(product_args<T> p) {
    __shared__ T a[PRODUCT_DEPTH][16 * R + 1], b[PRODUCT_DEPTH][16 * R + 1];
    int64_t row = (int64_t)blockIdx.y * 16 * R, column = (int64_t)blockIdx.x * 16 * R;
    if (lower && column > row + 16 * R - 1) { return; }
    ql_cuda_wait_previous();
    ql_cuda_start_next();
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    T sum[R][R], next_a[R], next_b[R];
#pragma unroll
    for (int i = 0; i < R; i++) {
#pragma unroll
        for (int j = 0; j < R; j++) {
            int64_t r = row + ty + 16 * i, c = column + tx + 16 * j;
            sum[i][j] = from_c && r < p.m && c < p.n ? p.c[r * p.ldc + c] : (T)0;
        }
    }
    fetch<T, R, transposed>(next_a, p.a, p.lda, row, p.m, 0, p.depth);
    fetch<T, R, true>(next_b, p.b, p.ldb, column, p.n, 0, p.depth);
    for (int64_t s = 0; s < p.depth; s += PRODUCT_DEPTH) {
        __syncthreads();
        keep<T, R, transposed>(a, next_a);
        keep<T, R, true>(b, next_b);
        __syncthreads();
        if (s + PRODUCT_DEPTH < p.depth) {
            fetch<T, R, transposed>(next_a, p.a, p.lda, row, p.m, s + PRODUCT_DEPTH, p.depth);
            fetch<T, R, true>(next_b, p.b, p.ldb, column, p.n, s + PRODUCT_DEPTH, p.depth);
        }
#pragma unroll
        for (int k = 0; k < PRODUCT_DEPTH; k++) {
            T x[R], y[R];
#pragma unroll
            for (int i = 0; i < R; i++) { x[i] = a[k][ty + 16 * i], y[i] = b[k][tx + 16 * i]; }
#pragma unroll
            for (int i = 0; i < R; i++) {
#pragma unroll
                for (int j = 0; j < R; j++) { sum[i][j] += x[i] * y[j]; }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < R; i++) {
#pragma unroll
        for (int j = 0; j < R; j++) {
            int64_t r = row + ty + 16 * i, c = column + tx + 16 * j;
            if (r < p.m && c < p.n && (!lower || r >= c)) { p.c[r * p.ldc + c] = from_c ? sum[i][j] : p.c[r * p.ldc + c] + sum[i][j]; }
        }
    }
}

template <typename T, int R, bool transposed, bool from_c, bool lower> static void launch_product(const product_args<T> &p) {
    if (p.m == 0 || p.n == 0 || p.depth == 0) { return; }
    dim3 grid((unsigned)((p.n + 16 * R - 1) / (16 * R)), (unsigned)((p.m + 16 * R - 1) / (16 * R)));
    ql_cuda_launch(product_kernel<T, R, transposed, from_c, lower>, grid, dim3(PRODUCT_THREADS), 0, true, p);
}

#endif
