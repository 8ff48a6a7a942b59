/* sample.cu: the choice of the next tokens (csrc/ops/sample.c). A block of 1024 threads a row, which stays in the caches.
 * Thresholds of top-k and top-p are found by halving the range of floats, each step one pass over the row; sums are float64 in
 * a fixed order. */
#include "../csrc/core/half.h"
#include "../csrc/core/random.h"
#include "cuda.h"
#include "device.cuh"

enum { THREADS = 1024 };

struct row_args {
    const float *logits; /* (v,) */
    int v;
    float best, temperature;
    double *scratch; /* 32 in shared memory */
};

/* an order-preserving integer of a float: larger floats have larger keys; NaN counts as the least of all */
static __device__ __forceinline__ uint32_t key_of(float x) {
    uint32_t bits = __float_as_uint(x);
    return x != x ? 0u : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
static __device__ __forceinline__ float of_key(uint32_t key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

/* the first of the largest: the largest of (key, v - index) */
static __device__ int largest(const float *logits, int v, unsigned long long *scratch) {
    unsigned long long best = 0;
    for (int j = threadIdx.x; j < v; j += THREADS) {
        best = max(best, (unsigned long long)key_of(logits[j]) << 32 | (unsigned)(v - j));
    }
#pragma unroll
    for (int i = WARP / 2; i > 0; i /= 2) { best = max(best, __shfl_xor_sync(QL_FULL_WARP, best, i)); }
    if (threadIdx.x % WARP == 0) { scratch[threadIdx.x / WARP] = best; }
    __syncthreads();
    best = scratch[threadIdx.x % WARP];
#pragma unroll
    for (int i = WARP / 2; i > 0; i /= 2) { best = max(best, __shfl_xor_sync(QL_FULL_WARP, best, i)); }
    return v - (int)(best & 0xffffffffu);
}

static __device__ __forceinline__ double weight_of(const row_args &r, float logit) {
    return expf((logit - r.best) / r.temperature); /* float64 has no speed to spare here: 32 passes */
}

/* of the logits from `threshold` on: their number, or the sum of their weights */
static __device__ double amount(const row_args &r, float threshold, bool weights) {
    double sum = 0.0;
    for (int j = threadIdx.x; j < r.v; j += THREADS) {
        float logit = r.logits[j];
        if (logit >= threshold) { sum += weights ? weight_of(r, logit) : 1.0; }
    }
    return block_sum(sum, r.scratch);
}

/* the highest threshold, at least `lowest`, whose amount reaches `wanted` */
static __device__ float threshold_of(const row_args &r, bool weights, float lowest, double wanted) {
    uint32_t low = key_of(lowest), high = key_of(r.best); /* the amount of everything reaches it */
    while (low < high) {
        uint32_t middle = low + (high - low) / 2 + 1;
        if (amount(r, of_key(middle), weights) >= wanted) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return of_key(low);
}

/* the first index at which the weights of the set, summed in order of index, pass the share; thread i owns indices from i * part */
static __device__ int walk(const row_args &r, float threshold, float share, int *last) {
    __shared__ double ends[THREADS];
    int part = (r.v + THREADS - 1) / THREADS, first = min((int)threadIdx.x * part, r.v), end = min(first + part, r.v);
    double mine = 0.0;
    for (int j = first; j < end; j++) {
        if (r.logits[j] >= threshold) {
            mine += weight_of(r, r.logits[j]);
            atomicMax(last, j);
        }
    }
    ends[threadIdx.x] = mine;
    __syncthreads();
    for (int i = 1; i < THREADS; i *= 2) { /* inclusive sums */
        double before = (int)threadIdx.x >= i ? ends[threadIdx.x - i] : 0.0;
        __syncthreads();
        ends[threadIdx.x] += before;
        __syncthreads();
    }
    __shared__ int found;
    if (threadIdx.x == 0) { found = r.v; }
    __syncthreads();
    double goal = share * ends[THREADS - 1], passed = threadIdx.x > 0 ? ends[threadIdx.x - 1] : 0.0;
    if (passed <= goal && ends[threadIdx.x] > goal) {
        for (int j = first; j < end; j++) {
            if (r.logits[j] < threshold) { continue; }
            passed += weight_of(r, r.logits[j]);
            if (passed > goal) {
                atomicMin(&found, j);
                break;
            }
        }
    }
    __syncthreads();
    return found < r.v ? found : *last; /* rounding: the last of the set */
}

static __global__ void __launch_bounds__(THREADS) sample_kernel(int32_t *tokens, const float *logits, const int32_t *streams,
                                                                const int64_t *step, int v, float temperature, int64_t top_k,
                                                                float top_p, uint64_t seed) {
    __shared__ unsigned long long keys[WARP];
    __shared__ double scratch[WARP];
    __shared__ int last;
    ql_cuda_wait_previous();
    ql_cuda_start_next();
    const float *row = logits + (int64_t)blockIdx.x * v;
    if (threadIdx.x == 0) { last = 0; }
    int token = largest(row, v, keys);
    if (temperature > 0.0f) {
        row_args r = {row, v, row[token], temperature, scratch};
        float threshold = of_key(0x00800000u); /* the lowest finite float */
        if (top_k > 0 && top_k < v) { threshold = threshold_of(r, false, threshold, (double)top_k); }
        if (top_p < 1.0f) { threshold = threshold_of(r, true, threshold, top_p * amount(r, threshold, true)); }
        token = walk(r, threshold, ql_uniform(seed, streams[blockIdx.x], step[0]), &last);
    }
    if (threadIdx.x == 0) { tokens[blockIdx.x] = token; }
}

extern "C" void ql_sample_forward_cuda(int32_t *tokens, const float *logits, const int32_t *streams, const int64_t *step,
                                       int64_t b, int64_t v, float temperature, int64_t top_k, float top_p, uint64_t seed) {
    if (b == 0) { return; }
    ql_cuda_launch(sample_kernel, dim3((unsigned)b), dim3(THREADS), 0, true, tokens, logits, streams, step, v, temperature, top_k,
                   top_p, seed);
}
