/* linear_dense.cu: y = x W^T for up to 16 tokens and a float weight in its rows as they are stored, each value rounded to bfloat16.
 * Tiles, activations and what becomes of the sums are those of linear_small.cuh (linear_parts.cuh, linear_epilogue.cuh); a block takes a tile, its warps share K, and the first
 * weights are on their way before the kernel ahead has ended. */
#include "linear_family.cuh"

#include <cuda_fp16.h>

enum { DENSE_WARPS = 8, DENSE_AHEAD = 64 /* bytes a lane and row that are on their way at once */ };

/* eight values from `from` on as pairs */
static __device__ __forceinline__ uint4 pairs_of(const uint4 (&raw)[1], bf16) { return raw[0]; }
static __device__ __forceinline__ uint4 pairs_of(const uint4 (&raw)[1], __half) {
    const uint32_t words[] = {raw[0].x, raw[0].y, raw[0].z, raw[0].w};
    uint32_t out[4];
#pragma unroll
    for (int i = 0; i < 4; i++) { out[i] = pack_bf16(half_bits_to_float(words[i] & 0xffffu), half_bits_to_float(words[i] >> 16)); }
    return make_uint4(out[0], out[1], out[2], out[3]);
}
static __device__ __forceinline__ uint4 pairs_of(const uint4 (&raw)[2], float) {
    return make_uint4(pack_bf16(__uint_as_float(raw[0].x), __uint_as_float(raw[0].y)), pack_bf16(__uint_as_float(raw[0].z), __uint_as_float(raw[0].w)),
                      pack_bf16(__uint_as_float(raw[1].x), __uint_as_float(raw[1].y)), pack_bf16(__uint_as_float(raw[1].z), __uint_as_float(raw[1].w)));
}

/* 32 columns of the rows of a warp's lanes: `parts` of them from step `step` on, every DENSE_WARPS-th; zeros from k on */
template <typename T> struct dense_rows {
    enum { words = sizeof(T) / 2, parts = DENSE_AHEAD / (16 * words) };
    uint4 upper[parts][words], lower[parts][words];

    __device__ __forceinline__ void load(const small_args &a, const small_tile &tile, int step, int lane) {
        int64_t line = (int64_t)(lane / 4) * a.k;
#pragma unroll
        for (int s = 0; s < parts; s++) {
            int64_t j = (int64_t)(step + s * DENSE_WARPS) * TWO_STEPS + lane % 4 * 8;
            const uint4 *up = (const uint4 *)((const T *)tile.upper + line + j), *down = (const uint4 *)((const T *)tile.lower + line + j);
#pragma unroll
            for (int i = 0; i < words; i++) {
                upper[s][i] = j < a.k ? __ldg(up + i) : make_uint4(0, 0, 0, 0);
                lower[s][i] = j < a.k ? __ldg(down + i) : make_uint4(0, 0, 0, 0);
            }
        }
    }
};

template <typename T, int Tokens8, bool Single>
static __global__ void __launch_bounds__(DENSE_WARPS *WARP, 2) dense_kernel(const __grid_constant__ small_args a) {
    constexpr int bytes = fragment_bytes<Single>();
    __shared__ __align__(128) uint8_t partial[Tokens8 * DENSE_WARPS * bytes];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4;
    small_tile tile = locate_tile(a, blockIdx.x);
    dense_rows<T> rows;
    float sums[Tokens8][4] = {};
    rows.load(a, tile, warp, lane);
    ql_cuda_start_next();
    ql_cuda_wait_previous();
    for (int step = warp; step * TWO_STEPS < a.k; step += dense_rows<T>::parts * DENSE_WARPS) {
        uint4 upper[dense_rows<T>::parts], lower[dense_rows<T>::parts];
#pragma unroll
        for (int s = 0; s < dense_rows<T>::parts; s++) { upper[s] = pairs_of(rows.upper[s], T()), lower[s] = pairs_of(rows.lower[s], T()); }
        rows.load(a, tile, step + dense_rows<T>::parts * DENSE_WARPS, lane);
#pragma unroll
        for (int s = 0; s < dense_rows<T>::parts; s++) {
            int64_t j = (int64_t)(step + s * DENSE_WARPS) * TWO_STEPS + lane % 4 * 8;
            uint32_t left[4] = {upper[s].x, lower[s].x, upper[s].y, lower[s].y}, right[4] = {upper[s].z, lower[s].z, upper[s].w, lower[s].w};
#pragma unroll
            for (int nt = 0; nt < Tokens8; nt++) {
                int token = Single ? 0 : 8 * nt + g;
                bool there = token < a.m && j < a.k;
                uint4 x = there ? *(const uint4 *)(a.x + (int64_t)token * a.x_line + j) : make_uint4(0, 0, 0, 0);
                mma_units(sums[nt], left, x.x, x.y);
                mma_units(sums[nt], right, x.z, x.w);
            }
        }
    }
    uint32_t base = shared_address(partial);
#pragma unroll
    for (int nt = 0; nt < Tokens8; nt++) { put_fragment<Single>(base + (nt * DENSE_WARPS + warp) * bytes, lane, sums[nt]); }
    small_lines lines;
    small_target to;
    if (warp < Tokens8) { lines = fragment_lines<Single>(a, a.part[tile.part], lane, warp, {1.0f, 0}), to = aim_fragment<Single>(a, tile, lines, lane, warp); }
    __syncthreads();
    if (warp < Tokens8) { store_fragment<Single>(a, tile, lines, to, add_fragments<Single>(base + warp * DENSE_WARPS * bytes, lane, DENSE_WARPS, bytes)); }
}

template <typename T> static void launch(const small_args *a) {
    ql_cuda_launch(a->m == 1 ? dense_kernel<T, 1, true> : a->m <= 8 ? dense_kernel<T, 1, false> : dense_kernel<T, 2, false>,
                   dim3((unsigned)a->tiles), dim3(DENSE_WARPS * WARP), 0, true, *a);
}

bool ql_cuda_launch_dense(const small_args *a, ql_units_kind kind) {
    if (a->m > 16) { return false; }
    if (kind == QL_ROWS_F32) { return launch<float>(a), true; }
    if (kind == QL_ROWS_F16) { return launch<__half>(a), true; }
    return launch<bf16>(a), true;
}
