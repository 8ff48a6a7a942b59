/* sample.cu: the choice of the next tokens (csrc/ops/sample.c): a block of 1024 threads a row. Thread i holds elements i,
 * i + 1024, … in registers where the row has at most 32 k of them, else it reads them again in each pass. Thresholds of top-k
 * and top-p are found by halving the range of floats, a pass each step; all sums have a fixed order.
 *
 * Weights are float32 here and float64 in the reference: a token whose share ends within 1e-6 of the number drawn may differ. */
#include "../csrc/core/keys.h"
#include "../csrc/core/random.h"
#include "cuda.h"
#include "device.cuh"

enum { THREADS = 1024, WARPS = THREADS / WARP };

/* a row, and what became of it; E: elements a thread holds, 0: none */
template <int E> struct row {
    const float *logits; /* (v,) */
    int v;
    float held[E > 0 ? E : 1];          /* logits, from weigh() on weights */
    float best, temperature, threshold; /* the largest logit; the least of the top k */
    double *scratch;                    /* 32 in shared memory */

    __device__ __forceinline__ int rounds() const { return E > 0 ? E : (v + THREADS - 1) / THREADS; }
    /* NaN, and what is beyond the row, count as -inf */
    __device__ __forceinline__ float read(int i) const {
        int j = i * THREADS + (int)threadIdx.x;
        float x = j < v ? logits[j] : -INFINITY;
        return x == x ? x : -INFINITY;
    }
    /* its weight against the largest one's, 0 where it is not of the top k */
    __device__ __forceinline__ float weight_of(float x) const { return x >= threshold ? expf((x - best) / temperature) : 0.0f; }
    /* f(i, logit or weight of the thread's i'th element) for all of them */
    template <bool weights, typename F> __device__ __forceinline__ void each(F f) const {
        if constexpr (E > 0) {
#pragma unroll
            for (int i = 0; i < E; i++) { f(i, held[i]); }
        } else {
            for (int i = 0; i < rounds(); i++) { f(i, weights ? weight_of(read(i)) : read(i)); }
        }
    }

    __device__ __forceinline__ void load() {
#pragma unroll
        for (int i = 0; i < E; i++) { held[i] = read(i); }
    }
    __device__ __forceinline__ void weigh() {
#pragma unroll
        for (int i = 0; i < E; i++) { held[i] = weight_of(held[i]); }
    }
};

/* the first of the largest: the largest of (key, v - index); -0 + 0 is +0, which it equals */
template <int E> static __device__ __forceinline__ int largest(const row<E> &r, unsigned long long *scratch) {
    unsigned long long best = 0;
    r.template each<false>([&](int i, float x) {
        unsigned index = i * THREADS + threadIdx.x;
        if (index < (unsigned)r.v) { best = max(best, (unsigned long long)ql_key_of_float(x + 0.0f) << 32 | (r.v - index)); }
    });
#pragma unroll
    for (int i = WARP / 2; i > 0; i /= 2) { best = max(best, __shfl_xor_sync(QL_FULL_WARP, best, i)); }
    if (threadIdx.x % WARP == 0) { scratch[threadIdx.x / WARP] = best; }
    __syncthreads();
    best = scratch[threadIdx.x % WARP];
#pragma unroll
    for (int i = WARP / 2; i > 0; i /= 2) { best = max(best, __shfl_xor_sync(QL_FULL_WARP, best, i)); }
    return r.v - (int)(best & 0xffffffffu);
}

/* of the logits from `threshold` on their number, or of the weights from it on the sum */
template <bool weights, int E> static __device__ __forceinline__ double amount(const row<E> &r, float threshold) {
    float sum = 0.0f;
    r.template each<weights>([&](int, float x) { sum += x >= threshold ? (weights ? x : 1.0f) : 0.0f; });
    return block_sum((double)sum, r.scratch);
}

/* the highest threshold of `low` to `high` whose amount reaches `wanted`; that of `low` does */
template <bool weights, int E>
static __device__ __forceinline__ float threshold_of(const row<E> &r, float lowest, float highest, double wanted) {
    uint32_t low = ql_key_of_float(lowest), high = ql_key_of_float(highest);
    while (low < high) {
        uint32_t middle = low + (high - low) / 2 + 1;
        if (amount<weights>(r, ql_float_of_key(middle)) >= wanted) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return ql_float_of_key(low);
}

/* Inclusive sums of a value a thread, in order of threads; sums: THREADS in shared memory */
static __device__ __forceinline__ void block_scan(double x, double *sums) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int i = 1; i < WARP; i *= 2) {
        double before = __shfl_up_sync(QL_FULL_WARP, x, i);
        if (lane >= i) { x += before; }
    }
    sums[threadIdx.x] = x;
    __syncthreads();
    double before = 0.0;
    for (int w = 0; w < (int)threadIdx.x / WARP; w++) { before += sums[w * WARP + WARP - 1]; }
    __syncthreads();
    sums[threadIdx.x] = before + x;
    __syncthreads();
}

/* The index at which the weights from `threshold` on, summed in order of index, pass the share. parts: one float in shared
 * memory for each 32 neighbouring elements, which one warp holds in one round. `otherwise` where no weight is a number. */
template <int E>
static __device__ __forceinline__ int walk(const row<E> &r, float threshold, float share, float *parts, int otherwise) {
    __shared__ double sums[THREADS], passed_before;
    __shared__ int part_found, found;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int count = r.rounds() * WARPS, each = (count + THREADS - 1) / THREADS;
    r.template each<true>([&](int i, float x) {
        float sum = warp_sum(x >= threshold ? x : 0.0f);
        if (lane == 0) { parts[i * WARPS + warp] = sum; }
    });
    __syncthreads();
    if (threadIdx.x == 0) { part_found = 0, passed_before = 0.0; }
    int first = min((int)threadIdx.x * each, count), end = min(first + each, count);
    double mine = 0.0;
    for (int i = first; i < end; i++) { mine += parts[i]; }
    block_scan(mine, sums);
    double goal = share * sums[THREADS - 1], passed = threadIdx.x > 0 ? sums[threadIdx.x - 1] : 0.0;
    if (passed <= goal && sums[threadIdx.x] > goal) { /* one thread: the sums never fall */
        int i = first;
        while (i < end - 1 && passed + parts[i] <= goal) { passed += parts[i++]; }
        part_found = i, passed_before = passed;
    }
    __syncthreads();
    if (warp == part_found % WARPS) {
        float x = 0.0f;
        r.template each<true>([&](int i, float w) { x += i == part_found / WARPS ? w : 0.0f; }); /* no index: registers */
        x = x >= threshold ? x : 0.0f;
        double sum = x;
#pragma unroll
        for (int i = 1; i < WARP; i *= 2) {
            double before = __shfl_up_sync(QL_FULL_WARP, sum, i);
            if (lane >= i) { sum += before; }
        }
        unsigned there = __ballot_sync(QL_FULL_WARP, x > 0.0f);
        unsigned over = __ballot_sync(QL_FULL_WARP, x > 0.0f && passed_before + sum > goal);
        int at = over != 0 ? __ffs((int)over) - 1 : WARP - 1 - __clz((int)there); /* rounding left none over it: the last */
        if (lane == 0) { found = there != 0 ? part_found * WARP + at : otherwise; }
    }
    __syncthreads();
    return found;
}

/* shared: a float for each 32 elements */
template <int E>
static __global__ void __launch_bounds__(THREADS) sample_kernel(int32_t *tokens, const float *logits, const int32_t *streams,
                                                                const int64_t *step, int v, float temperature, int64_t top_k,
                                                                float top_p, uint64_t seed) {
    extern __shared__ float parts[];
    __shared__ unsigned long long keys[WARPS];
    __shared__ double scratch[WARPS];
    ql_cuda_wait_previous();
    ql_cuda_start_next();
    row<E> r;
    r.logits = logits + (int64_t)blockIdx.x * v, r.v = v, r.temperature = temperature, r.scratch = scratch;
    r.load();
    int token = largest(r, keys);
    if (temperature > 0.0f) {
        float lowest = -3.402823466e38f;
        r.best = r.logits[token], r.threshold = lowest;
        if (top_k > 0 && top_k < v) { r.threshold = threshold_of<false>(r, lowest, r.best, (double)top_k); }
        r.weigh();
        float threshold = 0.0f;
        if (top_p < 1.0f) { threshold = threshold_of<true>(r, 0.0f, 1.0f, top_p * amount<true>(r, 0.0f)); }
        token = walk(r, threshold, ql_uniform(seed, streams[blockIdx.x], step[0]), parts, token);
    }
    if (threadIdx.x == 0) { tokens[blockIdx.x] = token; }
}

extern "C" void ql_sample_forward_cuda(int32_t *tokens, const float *logits, const int32_t *streams, const int64_t *step,
                                       int64_t b, int64_t v, float temperature, int64_t top_k, float top_p, uint64_t seed) {
    if (b == 0) { return; }
    size_t parts = (size_t)((v + THREADS - 1) / THREADS) * WARPS;
    auto kernel = v <= 8 * THREADS ? sample_kernel<8> : v <= 32 * THREADS ? sample_kernel<32> : sample_kernel<0>;
    parts = v <= 8 * THREADS ? 8 * WARPS : v <= 32 * THREADS ? 32 * WARPS : parts;
    ql_cuda_launch(kernel, dim3((unsigned)b), dim3(THREADS), parts * sizeof(float), true, tokens, logits, streams, step, v,
                   temperature, top_k, top_p, seed);
}
