/* bench.cu: times an op on the device: recorded over copies of its arrays, together larger than the L2 cache, and replayed.
 * So every launch finds its arrays in the device's memory, as the next layer of a model does, and launches cost what they
 * cost within a recorded step. But what products of a few tokens read and write beside weights and gains is the same for
 * all: in a model the op ahead has just left it in the L2 cache. Arrays hold random numbers: products of zeros are faster. */
#include "linear.cuh"
#include "state.h"

#include "../csrc/core/random.h"

#include <string.h>

enum { MOST_COPIES = 64, REPLAYS = 20, WARM_UPS = 3, FEW_TOKENS = 64 };

/* ---- roofs ----------------------------------------------------------------------------------------------------------- */

static __global__ void __launch_bounds__(512) read_kernel(const uint4 *x, int64_t count, uint32_t *out) {
    uint32_t sum = 0;
    int64_t step = (int64_t)gridDim.x * blockDim.x, i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i + 3 * step < count; i += 4 * step) {
        uint4 a = __ldcs(x + i), b = __ldcs(x + i + step), c = __ldcs(x + i + 2 * step), d = __ldcs(x + i + 3 * step);
        sum += (a.x ^ a.y ^ a.z ^ a.w) + (b.x ^ b.y ^ b.z ^ b.w) + (c.x ^ c.y ^ c.z ^ c.w) + (d.x ^ d.y ^ d.z ^ d.w);
    }
    for (; i < count; i += step) {
        uint4 a = __ldcs(x + i);
        sum += a.x ^ a.y ^ a.z ^ a.w;
    }
    if (sum == 0x9e3779b9u) { *out = sum; } /* never, but the compiler does not know */
}

static __global__ void __launch_bounds__(512) copy_kernel(uint4 *out, const uint4 *x, int64_t count) {
    int64_t step = (int64_t)gridDim.x * blockDim.x, i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i + 3 * step < count; i += 4 * step) {
        uint4 a = __ldcs(x + i), b = __ldcs(x + i + step), c = __ldcs(x + i + 2 * step), d = __ldcs(x + i + 3 * step);
        __stcs(out + i, a), __stcs(out + i + step, b), __stcs(out + i + 2 * step, c), __stcs(out + i + 3 * step, d);
    }
    for (; i < count; i += step) { __stcs(out + i, __ldcs(x + i)); }
}

/* ---- arrays ---------------------------------------------------------------------------------------------------------- */

/* uniform in [-1, 1), as bf16 or float32 */
static __global__ void random_kernel(void *out, int64_t count, int floats, uint64_t seed) {
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        float value = 2.0f * ql_uniform(seed, i, 0) - 1.0f;
        if (floats) {
            ((float *)out)[i] = value;
        } else {
            ((bf16 *)out)[i] = __float2bfloat16_rn(value);
        }
    }
}

typedef struct {
    const ql_bench *of;
    int copies;
    ql_weight weight[MOST_COPIES][3];
    int weights;
    void *memory[MOST_COPIES][4]; /* what else a launch reads and writes */
    int arrays;
    int32_t *numbers; /* positions and rows */
    int64_t *ranges;
} arrays;

static void *make_random(arrays *a, int copy, int index, int64_t count, int floats) {
    size_t bytes = (size_t)count * (floats ? sizeof(float) : sizeof(bf16));
    if (index >= a->arrays) { a->arrays = index + 1; }
    if (ql_cuda_alloc(&a->memory[copy][index], bytes) != QL_OK) { return NULL; }
    ql_cuda_launch(random_kernel, dim3(1024), dim3(256), 0, false, a->memory[copy][index], count, floats, (uint64_t)(7 * copy + index));
    return a->memory[copy][index];
}

static int64_t widest(int64_t a, int64_t b) { return a > b ? a : b; }

/* what one launch needs beside its weights: numbers of elements of up to four arrays, and which are float32 */
static int needs(const ql_bench *c, int64_t count[4], int floats[4]) {
    const ql_weight *w = c->weights > 0 ? c->weight[0] : NULL;
    int64_t m = c->m, n = w != NULL ? w->n : c->n, k = w != NULL ? w->k : c->k;
    for (int i = 0; i < 4; i++) { floats[i] = 0, count[i] = 0; }
    switch (c->op) {
    case QL_BENCH_READ: count[0] = c->n / 2; return 1;
    case QL_BENCH_COPY: count[0] = count[1] = c->n / 4; return 2; /* half is read, half written */
    case QL_BENCH_MATMUL: count[0] = m * n, count[1] = m * k, count[2] = n * k; return 3;
    case QL_BENCH_MATMUL_BACKWARD: count[0] = m * k, count[1] = m * n, count[2] = n * k; return 3;
    case QL_BENCH_DEQUANTIZE: count[0] = n * k; return 1;
    case QL_BENCH_QUANTIZE: floats[2] = 1, count[0] = n * k / 2, count[1] = widest(n, n * k / c->group) * 2, count[2] = n * k; return 3;
    case QL_BENCH_LINEAR: floats[0] = floats[1] = 1, count[0] = m * n, count[1] = m * k; return 2;
    case QL_BENCH_LINEAR_BACKWARD: floats[0] = floats[1] = 1, count[0] = m * k, count[1] = m * n; return 2;
    case QL_BENCH_RESIDUAL: floats[0] = floats[2] = 1, count[0] = m * n, count[1] = m * k, count[2] = m * n + n; return 3;
    case QL_BENCH_GATE_UP: floats[1] = floats[2] = 1, count[0] = m * n, count[1] = m * k, count[2] = m * k + k; return 3;
    case QL_BENCH_QKV: floats[3] = 1, count[0] = count[1] = count[2] = m * n, count[3] = 2 * m * k + k + m * c->d; return 4;
    case QL_BENCH_ATTENTION: count[0] = count[1] = m * c->b * c->hq * c->d, count[2] = count[3] = c->b * c->keys * c->hkv * c->d; return 4;
    case QL_BENCH_ATTENTION_BACKWARD: {
        int64_t queries = m * c->b * c->hq, keys = c->b * c->keys * c->hkv;
        floats[3] = 1, count[0] = (queries + 2 * keys) * c->d, count[1] = 3 * queries * c->d, count[2] = 2 * keys * c->d, count[3] = queries;
        return 4;
    }
    }
    return 0;
}

static int64_t bytes_of(const ql_bench *c) {
    int64_t count[4], bytes = 0;
    int floats[4], number = needs(c, count, floats);
    for (int i = 0; i < number; i++) { bytes += count[i] * (floats[i] ? 4 : 2); }
    for (int i = 0; i < c->weights; i++) { bytes += c->weight[i]->n * c->weight[i]->k * (c->weight[i]->bits < 4 ? 2 : c->weight[i]->bits) / 8; }
    return bytes;
}

/* positions 0 … m - 1 and rows likewise; b sequences of m queries and `keys` keys */
static ql_status make_ranges(arrays *a) {
    const ql_bench *c = a->of;
    int64_t ranges[3 * 1024 + 1];
    int32_t numbers[8192];
    if (c->b > 1024 || c->m > 8192) { return ql_cuda_refuse(QL_EVALUE, "bench: at most 1024 sequences of 8192 tokens"); }
    for (int64_t i = 0; i <= c->b; i++) { ranges[i] = i * c->m; }
    for (int64_t i = 0; i < c->b; i++) { ranges[c->b + 1 + i] = i * c->keys, ranges[2 * c->b + 1 + i] = c->keys; }
    for (int64_t i = 0; i < c->m; i++) { numbers[i] = (int32_t)i; }
    ql_status status = ql_cuda_alloc((void **)&a->ranges, sizeof ranges);
    if (status == QL_OK) { status = ql_cuda_alloc((void **)&a->numbers, sizeof numbers); }
    if (status == QL_OK) { status = ql_cuda_upload(a->ranges, ranges, (size_t)(3 * c->b + 1) * sizeof *ranges); }
    if (status == QL_OK) { status = ql_cuda_upload(a->numbers, numbers, (size_t)c->m * sizeof *numbers); }
    return status;
}

static ql_status make_arrays(arrays *a, const ql_backend *table) {
    const ql_bench *c = a->of;
    int64_t count[4];
    int floats[4], number = needs(c, count, floats);
    int64_t copies = c->rotate / widest(bytes_of(c), 1) + 1;
    a->copies = copies < 2 ? 2 : copies > MOST_COPIES ? (int)MOST_COPIES : (int)copies;
    ql_status status = make_ranges(a);
    for (int copy = 0; copy < a->copies && status == QL_OK; copy++) {
        for (int i = 0; i < number; i++) {
            if (make_random(a, copy, i, count[i], floats[i]) == NULL) { return QL_ECUDA; }
        }
        for (int i = 0; i < c->weights && status == QL_OK; i++) {
            status = table->weight_upload(&a->weight[copy][i], c->weight[i]);
            if (status == QL_OK && i >= a->weights) { a->weights = i + 1; }
        }
    }
    return status;
}

static void release_arrays(arrays *a, const ql_backend *table) {
    for (int copy = 0; copy < a->copies; copy++) {
        for (int i = 0; i < a->arrays; i++) { ql_cuda_free(a->memory[copy][i]); }
        for (int i = 0; i < 3; i++) { table->weight_release(&a->weight[copy][i]); }
    }
    ql_cuda_free(a->numbers);
    ql_cuda_free(a->ranges);
}

/* ---- one launch --------------------------------------------------------------------------------------------------------- */

static dim3 roof_grid(const ql_bench *c) { return dim3((unsigned)(ql_cuda_multiprocessors() * c->m)); }

/* as in a model: prepared by the product ahead, where it can be; each: `count` floats, the gain behind them, which is the copy's own */
static ql_norm norm_of(void *shared, const void *own, int64_t count) {
    ql_norm norm = {(const float *)own + count, 1e-5f, (float *)shared, 1};
    return norm;
}

/* a product whose activations are in the L2 cache */
static bool is_small_product(const ql_bench *c) { return c->weights > 0 && c->op != QL_BENCH_DEQUANTIZE && c->m <= FEW_TOKENS; }

static void launch(const arrays *a, int copy, const ql_backend *be) {
    const ql_bench *c = a->of;
    void *const *own = a->memory[copy], *const *x = is_small_product(c) ? a->memory[0] : own;
    const ql_weight *w = a->weight[copy];
    int f = w->format;
    switch (c->op) {
    case QL_BENCH_READ:
        ql_cuda_launch(read_kernel, roof_grid(c), dim3(512), 0, false, (const uint4 *)x[0], c->n / 16, (uint32_t *)x[0]);
        break;
    case QL_BENCH_COPY:
        ql_cuda_launch(copy_kernel, roof_grid(c), dim3(512), 0, false, (uint4 *)x[0], (const uint4 *)x[1], c->n / 32);
        break;
    case QL_BENCH_MATMUL: ql_cuda_matmul(x[0], CUDA_R_16BF, (const bf16 *)x[1], (const bf16 *)x[2], c->m, c->n, c->k, 0); break;
    case QL_BENCH_MATMUL_BACKWARD:
        ql_cuda_matmul_backward(x[0], CUDA_R_16BF, (const bf16 *)x[1], (const bf16 *)x[2], c->m, c->n, c->k, 0);
        break;
    case QL_BENCH_DEQUANTIZE: ql_cuda_dequantize((bf16 *)x[0], w, 0, w->n); break;
    case QL_BENCH_QUANTIZE: be->quantize_forward[c->format](x[0], (float *)x[1], (const float *)x[2], c->format, c->n * c->k, c->group); break;
    case QL_BENCH_LINEAR: be->linear_forward[f]((float *)x[0], (const float *)x[1], w, c->m, 0); break;
    case QL_BENCH_LINEAR_BACKWARD: be->linear_backward_input[f]((float *)x[0], (const float *)x[1], w, c->m, 0); break;
    case QL_BENCH_RESIDUAL: {
        ql_norm next = norm_of(x[2], own[2], c->m * w->n);
        be->linear_residual_forward((float *)x[0], x[1], w, NULL, &next, c->m, be->takes_ordered(w, NULL, c->m));
        break;
    }
    case QL_BENCH_GATE_UP: {
        ql_norm norm = norm_of(x[2], own[2], c->m * w->k);
        int ordered = w->n % 32 == 0 && be->takes_ordered(w, NULL, c->m); /* gate stands in for down */
        be->gate_up_forward(x[0], (const float *)x[1], &norm, w, w + 1, NULL, c->m, ordered);
        break;
    }
    case QL_BENCH_QKV: {
        float *input = (float *)x[3];
        ql_norm norm = norm_of(input + c->m * w->k, (float *)own[3] + c->m * w->k, c->m * w->k);
        const float *table = input + 2 * c->m * w->k + w->k;
        be->qkv_forward(x[0], x[1], x[2], input, &norm, w, w + 1, w + 2, NULL, table, table, a->numbers, a->numbers, c->m, c->hq, c->hkv, c->d);
        break;
    }
    case QL_BENCH_ATTENTION:
        be->attention_fused_forward(x[0], NULL, x[1], x[2], x[3], a->ranges, a->ranges + c->b + 1, a->ranges + 2 * c->b + 1, c->m * c->b, c->b,
                                    c->hq, c->hkv, c->d, c->m, c->keys, 0.088f, 0);
        break;
    case QL_BENCH_ATTENTION_BACKWARD: {
        int64_t t = c->m * c->b, queries = t * c->hq * c->d, keys = c->b * c->keys * c->hkv * c->d;
        bf16 *dq = (bf16 *)x[0], *dk = dq + queries, *q = (bf16 *)x[1], *k = (bf16 *)x[2]; /* q, out, dout; k, v */
        be->attention_fused_backward(dq, dk, dk + keys, q + 2 * queries, q, k, k + keys, q + queries, (const float *)x[3], a->ranges,
                                     a->ranges + c->b + 1, a->ranges + 2 * c->b + 1, t, c->b, c->hq, c->hkv, c->d, c->m, c->keys, 0.088f);
        break;
    }
    }
}

static ql_status time_step(double *seconds, ql_step *step, int copies, const ql_backend *be) {
    cudaEvent_t from, to;
    float milliseconds = 0;
    if (!ql_cuda_check(cudaEventCreate(&from), "cudaEventCreate") || !ql_cuda_check(cudaEventCreate(&to), "cudaEventCreate")) { return QL_ECUDA; }
    ql_status status = QL_OK;
    for (int i = 0; i < WARM_UPS && status == QL_OK; i++) { status = be->replay(step); }
    ql_cuda_check(cudaEventRecord(from, ql_cuda_stream()), "cudaEventRecord");
    for (int i = 0; i < REPLAYS && status == QL_OK; i++) { status = be->replay(step); }
    ql_cuda_check(cudaEventRecord(to, ql_cuda_stream()), "cudaEventRecord");
    if (status == QL_OK) { status = ql_cuda_finish(); }
    ql_cuda_check(cudaEventElapsedTime(&milliseconds, from, to), "cudaEventElapsedTime");
    cudaEventDestroy(from);
    cudaEventDestroy(to);
    *seconds = 1e-3 * milliseconds / REPLAYS / copies;
    return status;
}

static ql_status run(double *seconds, const ql_bench *c, int samples, const ql_backend *be) {
    static arrays a; /* under the lock; too large for a stack */
    memset(&a, 0, sizeof a);
    a.of = c;
    ql_step *step = NULL;
    ql_status status = make_arrays(&a, be);
    for (int copy = 0; copy < a.copies && status == QL_OK; copy++) { launch(&a, copy, be); } /* packed weights, scratch memory and libraries are there before the record */
    if (status == QL_OK) { status = ql_cuda_finish(); }
    if (status == QL_OK) { status = be->record(); }
    if (status == QL_OK) {
        for (int copy = 0; copy < a.copies; copy++) { launch(&a, copy, be); }
        status = be->record_end(&step);
    }
    for (int i = 0; i < samples && status == QL_OK; i++) { status = time_step(&seconds[i], step, a.copies, be); }
    be->step_release(step);
    release_arrays(&a, be);
    return status;
}

ql_status ql_cuda_bench(double *seconds, const ql_bench *c, int samples, int device) {
    const ql_backend *be = ql_cuda(device);
    if (be == NULL) { return QL_ECUDA; }
    ql_status status = be->begin(device);
    if (status != QL_OK) { return status; }
    status = run(seconds, c, samples, be);
    ql_status first = be->end();
    return first != QL_OK ? first : status;
}
