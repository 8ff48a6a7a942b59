/* attention_decode.cuh: what the kernels of attention of one query a sequence share: chunks of keys, tiles in shared memory, and what a block of
 * four warps makes of a tile. Both kernels add up the same parts in the same order, so their results have the same bits. */
#ifndef QL_CUDA_ATTENTION_DECODE_CUH
#define QL_CUDA_ATTENTION_DECODE_CUH

#include "attention.cuh"
#include "cuda.h"
#include "norm_ahead.cuh" /* ordered_column */
#include "pipeline.cuh"

enum { WARPS = 4, THREADS = WARPS * WARP, ROWS = 16, FEW_KEYS = 32 };

/* keys of a chunk: few tiles while the sequence is short, so that it meets many SMs; at most 32 chunks up to 16k keys */
static __host__ __device__ constexpr int64_t chunk_keys(int64_t keys) {
    return keys <= 1024 ? 64 : keys <= 4096 ? 128 : keys <= 8192 ? 256 : 512;
}
static __host__ __device__ inline int64_t chunk_count(int64_t keys) {
    int64_t chunk = chunk_keys(keys);
    return (keys + chunk - 1) / chunk;
}

template <int Keys> __host__ __device__ constexpr int score_stride() { return Keys + 4; }

/* a tile of keys or values to shared memory, but for row `skip`; zeros from row `valid` on */
template <int D, int Keys> __device__ __forceinline__ void load_tile(bf16 *to, const bf16 *from, int64_t step, int valid, int skip) {
    constexpr int chunks = D / 8;
#pragma unroll
    for (int i = 0; i < Keys * chunks / THREADS; i++) {
        int index = threadIdx.x + i * THREADS, row = index / chunks, chunk = index % chunks;
        if (row == skip) { continue; }
        copy_async_16(shared_address(to + row * (D + 8) + chunk * 8), from + (row < valid ? row : 0) * step + chunk * 8,
                      row < valid);
    }
}

/* scores of 16 rows and this warp's 16 keys, scaled, -inf beyond the last key, to shared memory; queries(a, i): the fragment of columns 16 i ..;
 * halves: 1 where only the first 8 rows are asked for */
template <int D, int Keys, int Halves, typename Queries>
__device__ __forceinline__ void score_keys(float *scores, Queries queries, uint32_t k, int valid, float scale_log2) {
    float even[2][4] = {}, odd[2][4] = {}; /* two chains, so that one hides the latency of the other */
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        uint32_t a[4], b[4];
        queries(a, i);
        load_matrix_4(b, k + i * 32);
        mma_bf16(i % 2 ? odd[0] : even[0], a, b[0], b[1]);
        mma_bf16(i % 2 ? odd[1] : even[1], a, b[2], b[3]);
    }
    int lane = threadIdx.x % WARP, first = threadIdx.x / WARP * 16;
#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
        for (int e = 0; e < 2 * Halves; e++) {
            int key = first + n * 8 + lane % 4 * 2 + (e & 1), row = lane / 4 + (e >> 1) * 8;
            scores[row * score_stride<Keys>() + key] = key < valid ? (even[n][e] + odd[n][e]) * scale_log2 : -INFINITY;
        }
    }
}

/* the lane's rows of weights of a tile, one a half, as A fragments of its steps of 16 keys; running maximum, sum and factor */
template <int Keys, int Halves>
__device__ __forceinline__ void weigh(uint32_t (&a)[Keys / 16][4], const float *scores, float (&maximum)[2], float (&sum)[2],
                                      float (&keep)[2]) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int n = 0; n < Keys / 8 && Halves < 2; n++) { a[n / 2][n % 2 * 2 + 1] = 0; }
#pragma unroll
    for (int r = 0; r < Halves; r++) {
        float2 x[Keys / 8];
        float top = maximum[r], part = 0.0f;
#pragma unroll
        for (int n = 0; n < Keys / 8; n++) {
            x[n] = *(const float2 *)(scores + (lane / 4 + r * 8) * score_stride<Keys>() + n * 8 + lane % 4 * 2);
            top = fmaxf(top, fmaxf(x[n].x, x[n].y));
        }
        top = fmaxf(top, __shfl_xor_sync(QL_FULL_WARP, top, 1));
        top = fmaxf(top, __shfl_xor_sync(QL_FULL_WARP, top, 2));
        keep[r] = exp2_fast(maximum[r] - top);
        maximum[r] = top;
#pragma unroll
        for (int n = 0; n < Keys / 8; n++) {
            float2 w = make_float2(exp2_fast(x[n].x - top), exp2_fast(x[n].y - top));
            part += w.x + w.y;
            a[n / 2][n % 2 * 2 + r] = pack_bf16(w.x, w.y);
        }
        part += __shfl_xor_sync(QL_FULL_WARP, part, 1);
        part += __shfl_xor_sync(QL_FULL_WARP, part, 2);
        sum[r] = sum[r] * keep[r] + part;
    }
}

/* the warp's columns of out += weights V: columns 8 (warp + 4 i) .. + 8 */
template <int D, int Keys>
__device__ __forceinline__ void add_values(float (&out)[(D / 8 + WARPS - 1) / WARPS][4], const uint32_t (&a)[Keys / 16][4],
                                           const bf16 *v) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (int i = 0; i < (D / 8 + WARPS - 1) / WARPS; i++) {
        int column = (warp + i * WARPS) * 8;
        if (D / 8 % WARPS != 0 && column >= D) { break; }
#pragma unroll
        for (int s = 0; s < Keys / 32; s++) {
            uint32_t b[4];
            load_matrix_4_transposed(b, shared_address(v + (s * 32 + lane) * (D + 8) + column));
            mma_bf16(out[i], a[2 * s], b[0], b[1]);
            mma_bf16(out[i], a[2 * s + 1], b[2], b[3]);
        }
    }
}

/* Parts are added up in their order. The maximum and the sum of weights of a row so far take those of a part; factors of the weighted values
 * so far, and of the part's. Roundings are written out: every kernel has the same. */
static __device__ __forceinline__ float2 join_part(float &top, float &total, float2 part) {
    float now = fmaxf(top, part.x), keep = exp2_fast(top - now), weight = exp2_fast(part.x - now);
    top = now;
    total = fmaf(total, keep, weight * part.y);
    return make_float2(keep, weight);
}
static __device__ __forceinline__ float joined(float value, float2 factors, float part) { return fmaf(value, factors.x, factors.y * part); }

/* columns `column` and the next of row `row` of the heads of `kv_head` */
template <int D>
__device__ __forceinline__ void store_pair(const attention_args<bf16> &args, int64_t query, int kv_head, int row, int column, float2 values, float total) {
    int at = (kv_head * (args.hq / args.hkv) + row) * D + column;
    *(uint32_t *)(args.out + query * args.hq * D + (args.ordered ? ordered_column(at) : at)) = pack_bf16(__fdividef(values.x, total), __fdividef(values.y, total));
}

/* Calls send(row, column, values, sum) for each two columns of this lane, and state(row, maximum, sum) once a row of the block. */
template <int D, typename Send, typename State>
__device__ __forceinline__ void each_pair(const float (&out)[(D / 8 + WARPS - 1) / WARPS][4], const float (&maximum)[2],
                                          const float (&sum)[2], int group, Send send, State state) {
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = lane / 4 + r * 8;
        if (row >= group) { break; }
        if (warp == 0 && lane % 4 == 0) { state(row, make_float2(maximum[r], sum[r])); }
#pragma unroll
        for (int i = 0; i < (D / 8 + WARPS - 1) / WARPS; i++) {
            int column = (warp + i * WARPS) * 8 + lane % 4 * 2;
            if (column < D) { send(row, column, make_float2(out[i][2 * r], out[i][2 * r + 1]), sum[r]); }
        }
    }
}

/* ql_attention_decode where there are so many (sequence, kv head) that each can be one block's, and no long ones among them (attention_decode_many.cu).
 * False, and nothing is done: where it is not so. */
bool ql_attention_decode_many(const attention_args<bf16> &args, int64_t max_keys);

#endif
