/* attention_decode.cu: attention of one query a sequence over its cached keys, bf16 with float32 sums (split keys,
 * "Flash-Decoding", Dao et al. 2023).
 *
 * A block owns one chunk of the keys of one sequence and one kv head, and all the (up to 16) query heads of that group: they are
 * the 16 rows of the matrix products, so the keys are read once. Keys come in tiles of 64: each of 4 warps makes the scores
 * of 16 keys, all meet in shared memory, and each warp then weighs all 64 values for a quarter of the output's columns. Several
 * blocks an SM keep the memory busy, so tiles are not double-buffered. The block that ends last adds the chunks up in their
 * order. Chunks depend on the sequence's own length alone, so its result does not depend on the batch, and the grid depends
 * on `max_keys` alone, so a recorded launch stays right while the lengths on the device grow.
 *
 *   shared: Q (16, d + 8) | K (64, d + 8) | V (64, d + 8) | scores (16, 64 + 4) float
 *   partial results in device scratch: (b, hkv, splits, group, d) float, then maximum and sum (b, hkv, splits, group, 2) */
#include "attention.cuh"
#include "cuda.h"

enum { WARPS = 4, THREADS = WARPS * WARP, KEYS = 64, ROWS = 16, SCORE_STRIDE = KEYS + 4 };
enum { MAX_COUNTERS = 1 << 16 };

/* how many blocks of (sequence, kv head) have ended; each goes back to 0 by itself */
static __device__ unsigned int ended[MAX_COUNTERS];

/* keys of a chunk: few tiles while the sequence is short, so that it meets many SMs; at most 32 chunks up to 16k keys */
static __host__ __device__ inline int64_t chunk_keys(int64_t keys) {
    return keys <= 1024 ? 64 : keys <= 4096 ? 128 : keys <= 8192 ? 256 : 512;
}
static __host__ __device__ inline int64_t chunk_count(int64_t keys) {
    int64_t chunk = chunk_keys(keys);
    return (keys + chunk - 1) / chunk;
}

struct decode_args {
    attention_args<bf16> a;
    float *partial, *statistics;
    int splits; /* chunks that the scratch has room for */
};

/* 64 rows of keys or values to shared memory; zeros from row `valid` on */
template <int D> __device__ __forceinline__ void load_tile(bf16 *to, const bf16 *from, int64_t step, int valid) {
    constexpr int chunks = D / 8;
#pragma unroll
    for (int i = 0; i < KEYS * chunks / THREADS; i++) {
        int index = threadIdx.x + i * THREADS, row = index / chunks, chunk = index % chunks;
        copy_async_16(shared_address(to + row * (D + 8) + chunk * 8), from + (row < valid ? row : 0) * step + chunk * 8,
                      row < valid);
    }
}

/* scores of 16 rows and this warp's 16 keys, scaled, -inf beyond the last key, to shared memory */
template <int D>
__device__ __forceinline__ void score_keys(float *scores, uint32_t q, uint32_t k, int valid, float scale_log2) {
    float even[2][4] = {}, odd[2][4] = {}; /* two chains, so that one hides the latency of the other */
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        uint32_t a[4], b[4];
        load_matrix_4(a, q + i * 32);
        load_matrix_4(b, k + i * 32);
        mma_bf16(i % 2 ? odd[0] : even[0], a, b[0], b[1]);
        mma_bf16(i % 2 ? odd[1] : even[1], a, b[2], b[3]);
    }
    int lane = threadIdx.x % WARP, first = threadIdx.x / WARP * 16;
#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int key = first + n * 8 + lane % 4 * 2 + (e & 1), row = lane / 4 + (e >> 1) * 8;
            scores[row * SCORE_STRIDE + key] = key < valid ? (even[n][e] + odd[n][e]) * scale_log2 : -INFINITY;
        }
    }
}

/* the lane's 2 rows of weights of a tile, as A fragments of its four steps of 16 keys; running maximum, sum and factor */
__device__ __forceinline__ void weigh(uint32_t (&a)[KEYS / 16][4], const float *scores, float (&maximum)[2], float (&sum)[2],
                                      float (&keep)[2]) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float2 x[KEYS / 8];
        float top = maximum[r], part = 0.0f;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
            x[n] = *(const float2 *)(scores + (lane / 4 + r * 8) * SCORE_STRIDE + n * 8 + lane % 4 * 2);
            top = fmaxf(top, fmaxf(x[n].x, x[n].y));
        }
        top = fmaxf(top, __shfl_xor_sync(QL_FULL_WARP, top, 1));
        top = fmaxf(top, __shfl_xor_sync(QL_FULL_WARP, top, 2));
        keep[r] = exp2_fast(maximum[r] - top);
        maximum[r] = top;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
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
template <int D>
__device__ __forceinline__ void add_values(float (&out)[(D / 8 + WARPS - 1) / WARPS][4], const uint32_t (&a)[KEYS / 16][4],
                                           const bf16 *v) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (int i = 0; i < (D / 8 + WARPS - 1) / WARPS; i++) {
        int column = (warp + i * WARPS) * 8;
        if (D / 8 % WARPS != 0 && column >= D) { break; }
#pragma unroll
        for (int s = 0; s < KEYS / 32; s++) {
            uint32_t b[4];
            load_matrix_4_transposed(b, shared_address(v + (s * 32 + lane) * (D + 8) + column));
            mma_bf16(out[i], a[2 * s], b[0], b[1]);
            mma_bf16(out[i], a[2 * s + 1], b[2], b[3]);
        }
    }
}

/* Adds up the chunks of the group: a warp takes each fourth chunk, then the warps meet in shared memory, always in one order.
 * weights: 4 * D floats of shared memory */
template <int D>
__device__ void combine(const decode_args &c, int64_t slot, int chunks, int group, bf16 *out, float *shared) {
    constexpr int per_lane = (D + WARP - 1) / WARP;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const float *partial = c.partial + slot * c.splits * group * D, *statistics = c.statistics + slot * c.splits * group * 2;
    for (int row = 0; row < group; row++) {
        float top = -INFINITY, total = 0.0f, sum[per_lane] = {};
        for (int s = lane; s < chunks; s += WARP) { top = fmaxf(top, __ldcg(statistics + (s * group + row) * 2)); }
        top = warp_max(top);
#pragma unroll 4
        for (int s = warp; s < chunks; s += WARPS) {
            float2 mine = __ldcg((const float2 *)(statistics + (s * group + row) * 2));
            float weight = exp2_fast(mine.x - top);
            total += weight * mine.y;
#pragma unroll
            for (int i = 0; i < per_lane; i++) {
                int column = lane + i * WARP;
                if (column < D) { sum[i] += weight * __ldcg(partial + (int64_t)(s * group + row) * D + column); }
            }
        }
        __syncthreads(); /* the row before has been read */
#pragma unroll
        for (int i = 0; i < per_lane; i++) {
            int column = lane + i * WARP;
            if (column < D) { shared[warp * (D + 1) + column] = sum[i]; }
        }
        if (lane == 0) { shared[warp * (D + 1) + D] = total; }
        __syncthreads();
        for (int column = threadIdx.x; column < D; column += THREADS) {
            float value = 0.0f, weight = 0.0f;
            for (int w = 0; w < WARPS; w++) {
                value += shared[w * (D + 1) + column];
                weight += shared[w * (D + 1) + D];
            }
            out[row * D + column] = __float2bfloat16_rn(value / weight);
        }
    }
}

/* The lane's 2 rows: as results where there is one chunk; else as a part, and the block that ends last combines the parts. */
template <int D>
__device__ __forceinline__ void finish(const decode_args &c, int64_t sequence, int chunks, int group,
                                       const float (&out)[(D / 8 + WARPS - 1) / WARPS][4], const float (&maximum)[2],
                                       const float (&sum)[2], bf16 *result, float *shared) {
    __shared__ bool last;
    int64_t slot = sequence * c.a.hkv + blockIdx.y, part = (slot * c.splits + blockIdx.x) * group;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = lane / 4 + r * 8;
        if (row >= group) { break; }
        if (chunks > 1 && warp == 0 && lane % 4 == 0) {
            *(float2 *)(c.statistics + (part + row) * 2) = make_float2(maximum[r], sum[r]);
        }
#pragma unroll
        for (int i = 0; i < (D / 8 + WARPS - 1) / WARPS; i++) {
            int column = (warp + i * WARPS) * 8 + lane % 4 * 2;
            if (column >= D) { break; }
            if (chunks > 1) {
                *(float2 *)(c.partial + (part + row) * D + column) = make_float2(out[i][2 * r], out[i][2 * r + 1]);
            } else {
                *(uint32_t *)(result + row * D + column) = pack_bf16(out[i][2 * r] / sum[r], out[i][2 * r + 1] / sum[r]);
            }
        }
    }
    if (chunks == 1) { return; }
    __threadfence(); /* each thread's part is seen by all before the block counts as ended */
    __syncthreads();
    if (threadIdx.x == 0) { last = atomicInc(&ended[slot], (unsigned)chunks - 1) == (unsigned)chunks - 1; }
    __syncthreads();
    if (!last) { return; }
    __threadfence();
    combine<D>(c, slot, chunks, group, result, shared);
}

/* grid (chunks, hkv, b) */
template <int D> __global__ void __launch_bounds__(THREADS) attention_decode_kernel(decode_args c) {
    constexpr int stride = D + 8, tiles_n = (D / 8 + WARPS - 1) / WARPS;
    extern __shared__ __align__(16) bf16 shared[];
    const attention_args<bf16> &args = c.a;
    ql_cuda_wait_previous();
    ql_cuda_start_next();
    int64_t sequence = blockIdx.z, query = args.q_start[sequence];
    int64_t keys = args.kv_len[sequence], chunk = chunk_keys(keys), first_key = blockIdx.x * chunk;
    if (args.q_start[sequence + 1] == query || first_key >= keys) { return; }

    int group = args.hq / args.hkv, chunks = (int)chunk_count(keys);
    int64_t step = (int64_t)args.hkv * D;
    bf16 *q = shared, *k = q + ROWS * stride, *v = k + KEYS * stride;
    float *scores = (float *)(v + KEYS * stride);
    const bf16 *from_q = args.q + (query * args.hq + (int64_t)blockIdx.y * group) * D;
    int64_t kv_first = (args.kv_start[sequence] + first_key) * step + (int64_t)blockIdx.y * D;
    const bf16 *from_k = args.k + kv_first, *from_v = args.v + kv_first;
    for (int i = threadIdx.x; i < ROWS * (D / 8); i += THREADS) {
        int row = i / (D / 8), column = i % (D / 8) * 8;
        copy_async_16(shared_address(q + row * stride + column), from_q + (row < group ? row * D : 0) + column, row < group);
    }
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, left = (int)min(chunk, keys - first_key);
    uint32_t q_lane = shared_address(q + lane % 16 * stride + lane / 16 * 8);
    uint32_t k_lane = shared_address(k + (warp * 16 + lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
    float out[tiles_n][4] = {}, maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    for (int done = 0; done < left; done += KEYS) {
        if (done > 0) { __syncthreads(); } /* the tile before has been read */
        load_tile<D>(k, from_k + done * step, step, left - done);
        copy_async_commit();
        load_tile<D>(v, from_v + done * step, step, left - done);
        copy_async_commit();
        copy_async_wait<1>();
        __syncthreads();
        score_keys<D>(scores, q_lane, k_lane, left - done, args.scale);
        copy_async_wait<0>();
        __syncthreads();
        uint32_t weights[KEYS / 16][4];
        float keep[2];
        weigh(weights, scores, maximum, sum, keep);
#pragma unroll
        for (int i = 0; i < tiles_n; i++) {
            out[i][0] *= keep[0], out[i][1] *= keep[0], out[i][2] *= keep[1], out[i][3] *= keep[1];
        }
        add_values<D>(out, weights, v);
    }

    finish<D>(c, sequence, chunks, group, out, maximum, sum, args.out + (query * args.hq + (int64_t)blockIdx.y * group) * D,
              scores);
}

template <int D> static void launch_decode(decode_args args, dim3 grid) {
    size_t bytes = (size_t)(ROWS + 2 * KEYS) * (D + 8) * sizeof(bf16) + (size_t)ROWS * SCORE_STRIDE * sizeof(float);
    ql_cuda_launch(attention_decode_kernel<D>, grid, dim3(THREADS), bytes, true, args);
}

bool ql_attention_decode(const attention_args<bf16> &args, int64_t max_keys) {
    int64_t slots = (int64_t)args.b * args.hkv, group = args.hq / args.hkv;
    if (group > ROWS || args.b > 65535 || args.hkv > 65535 || slots > MAX_COUNTERS) { return false; }
    decode_args decode = {args, NULL, NULL, 1};
    /* the count of chunks is not monotonic in the number of keys: it is largest at the end of a step of chunk_keys */
    for (int64_t keys : {(int64_t)1024, (int64_t)4096, (int64_t)8192, max_keys}) {
        if (keys <= max_keys && chunk_count(keys) > decode.splits) { decode.splits = (int)chunk_count(keys); }
    }
    decode.a.scale *= 1.4426950408889634f; /* log2 e: weights are powers of two */
    decode.partial = (float *)ql_cuda_scratch(QL_SCRATCH_ATTENTION, (size_t)(slots * decode.splits * group * (args.d + 2)) * 4);
    if (decode.partial == NULL) { return true; }
    decode.statistics = decode.partial + slots * decode.splits * group * args.d;
    dim3 grid((unsigned)decode.splits, (unsigned)args.hkv, (unsigned)args.b);
    switch (args.d) {
    case 64: launch_decode<64>(decode, grid); return true;
    case 80: launch_decode<80>(decode, grid); return true;
    case 96: launch_decode<96>(decode, grid); return true;
    case 128: launch_decode<128>(decode, grid); return true;
    default: return false;
    }
}
