/* linear.cu: the slots linear_forward and linear_backward_input. Up to 1,024 or 2,048 tokens: kernels on the packed weight. More: cuBLAS
 * on the decoded weight. Both take activations as bfloat16 and sum in float32; float32 weights are multiplied in float32. */
#include "linear.cuh"

/* out[i, j] = in[i, perm[j]] */
static __global__ void gather_columns(float *out, const float *in, const int32_t *perm, int64_t k) {
    ql_cuda_wait_previous();
    int64_t row = (int64_t)blockIdx.x * k;
    for (int64_t j = threadIdx.x; j < k; j += blockDim.x) { out[row + j] = in[row + perm[j]]; }
}

/* dx[i, perm[j]] = or += from[i, j] */
static __global__ void scatter_columns(float *dx, const float *from, const int32_t *perm, int64_t k, int accumulate) {
    ql_cuda_wait_previous();
    int64_t row = (int64_t)blockIdx.x * k;
    for (int64_t j = threadIdx.x; j < k; j += blockDim.x) {
        float *to = dx + row + perm[j];
        *to = accumulate ? *to + from[row + j] : from[row + j];
    }
}

/* float32 weights: y = x W^T, or dx = dy W; columns as stored */
static void float_product(float *out, const float *in, const ql_weight *w, int64_t m, int accumulate, bool backward) {
    const ql_cublas *b = ql_cuda_cublas();
    float one = 1.0f, beta = accumulate ? 1.0f : 0.0f;
    if (b == NULL) { return; }
    int n = (int)w->n, k = (int)w->k, rows = backward ? k : n, depth = backward ? n : k;
    ql_cuda_check_library(b->sgemm(b->handle, backward ? QL_CUBLAS_N : QL_CUBLAS_T, QL_CUBLAS_N, rows, (int)m, depth, &one,
                                   (const float *)w->codes, k, in, depth, &beta, out, rows), "cublasSgemm");
}

static void float_forward(float *y, const float *x, const ql_weight *w, int64_t m, int accumulate) {
    if (w->perm == NULL) { return float_product(y, x, w, m, accumulate, false); }
    float *stored = (float *)ql_cuda_scratch(QL_SCRATCH_ACTIVATION, (size_t)(m * w->k) * sizeof(float));
    if (stored == NULL) { return; }
    ql_cuda_launch(gather_columns, dim3((unsigned)m), dim3(256), 0, true, stored, x, w->perm, w->k);
    float_product(y, stored, w, m, accumulate, false);
}

static bf16 *activation_rows(const float *x, const int32_t *perm, int64_t m, int64_t k) {
    bf16 *rows = (bf16 *)ql_cuda_scratch(QL_SCRATCH_ACTIVATION, (size_t)(m * k) * sizeof(bf16));
    ql_activations source = {x, NULL, NULL, 0.0f, {}, 0};
    if (rows != NULL) { ql_cuda_activations_rows(rows, &source, perm, m, k, k, 0); }
    return rows;
}

extern "C" void ql_linear_forward_cuda(float *y, const float *x, const ql_weight *w, int64_t m, int accumulate) {
    if (m == 0 || w->n == 0) { return; }
    if (w->format == QL_F32) { return float_forward(y, x, w, m, accumulate); }
    ql_activations source = {x, NULL, NULL, 0.0f, {}, 0};
    ql_product product = {w, y, NULL, accumulate ? QL_OUT_FLOAT_ADD : QL_OUT_FLOAT, 0, {}, {}};
    if (ql_cuda_linear_packed(&product, 1, &source, NULL, m)) { return; }
    const bf16 *rows = activation_rows(x, w->perm, m, w->k);
    if (rows != NULL) { ql_cuda_linear_large(y, CUDA_R_32F, rows, w, m, accumulate); }
}

extern "C" void ql_linear_many_forward_cuda(const ql_linear_product *products, int64_t count, const float *x, int64_t m) {
    for (int64_t i = 0; i < count; i++) { ql_linear_forward_cuda(products[i].y, x, products[i].w, m, 0); }
}

/* columns as stored */
static void backward_product(float *dx, const float *dy, const ql_weight *w, int64_t m, int accumulate) {
    if (w->format == QL_F32) { return float_product(dx, dy, w, m, accumulate, true); }
    const bf16 *rows = activation_rows(dy, NULL, m, w->n);
    if (rows != NULL) { ql_cuda_linear_large_backward(dx, CUDA_R_32F, rows, w, m, accumulate); }
}

extern "C" void ql_linear_backward_input_cuda(float *dx, const float *dy, const ql_weight *w, int64_t m, int accumulate) {
    if (m == 0 || w->k == 0) { return; }
    if (w->perm == NULL) { return backward_product(dx, dy, w, m, accumulate); }
    float *stored = (float *)ql_cuda_scratch(QL_SCRATCH_OUTPUT, (size_t)(m * w->k) * sizeof(float));
    if (stored == NULL) { return; }
    backward_product(stored, dy, w, m, 0);
    ql_cuda_launch(scatter_columns, dim3((unsigned)m), dim3(256), 0, true, dx, stored, w->perm, w->k, accumulate);
}
