/* linear_large.cu: products of many tokens: the weight is decoded to bfloat16, a panel of rows at a time, then cuBLAS. */
#include "linear.cuh"

/* The whole weight where it fits: one product is faster than several. */
static int64_t panel_rows(const ql_weight *w) {
    int64_t rows = QL_DECODED_BYTES / (2 * (w->k > 0 ? w->k : 1)) / 256 * 256;
    return rows < 256 ? 256 : rows < w->n ? rows : w->n;
}

/* rows i0 .. i1 as bf16, NULL where memory is out */
static const bf16 *decoded_panel(const ql_weight *w, int64_t i0, int64_t i1) {
    if (w->format == QL_BF16) { return (const bf16 *)w->codes + i0 * w->k; }
    bf16 *panel = (bf16 *)ql_cuda_scratch(QL_SCRATCH_WEIGHT, (size_t)(panel_rows(w) * w->k) * sizeof(bf16));
    if (panel != NULL) { ql_cuda_dequantize(panel, w, i0, i1); }
    return panel;
}

static void gemm(int op_w, int rows, int columns, int depth, const bf16 *w, int ld_w, const bf16 *x, int ld_x, void *y, cudaDataType type,
                 int ld_y, float beta) {
    const ql_cublas *b = ql_cuda_cublas();
    float one = 1.0f;
    if (b == NULL) { return; }
    ql_cuda_check_library(b->gemm_ex(b->handle, op_w, QL_CUBLAS_N, rows, columns, depth, &one, w, CUDA_R_16BF, ld_w, x, CUDA_R_16BF, ld_x,
                                     &beta, y, type, ld_y, QL_CUBLAS_COMPUTE_32F, QL_CUBLAS_ALGORITHM), "cublasGemmEx");
}

void ql_cuda_linear_large(void *y, cudaDataType type, const bf16 *x, const ql_weight *w, int64_t m, int accumulate) {
    int64_t size = type == CUDA_R_32F ? 4 : 2, step = panel_rows(w);
    for (int64_t i0 = 0; i0 < w->n; i0 += step) {
        int64_t i1 = i0 + step < w->n ? i0 + step : w->n;
        const bf16 *panel = decoded_panel(w, i0, i1);
        if (panel == NULL) { return; }
        gemm(QL_CUBLAS_T, (int)(i1 - i0), (int)m, (int)w->k, panel, (int)w->k, x, (int)w->k, (char *)y + i0 * size, type, (int)w->n,
             accumulate ? 1.0f : 0.0f);
    }
}

void ql_cuda_linear_large_backward(void *dx, cudaDataType type, const bf16 *dy, const ql_weight *w, int64_t m, int accumulate) {
    int64_t step = panel_rows(w);
    for (int64_t i0 = 0; i0 < w->n; i0 += step) {
        int64_t i1 = i0 + step < w->n ? i0 + step : w->n;
        const bf16 *panel = decoded_panel(w, i0, i1);
        if (panel == NULL) { return; }
        gemm(QL_CUBLAS_N, (int)w->k, (int)m, (int)(i1 - i0), panel, (int)w->k, dy + i0, (int)w->n, dx, type, (int)w->k,
             accumulate || i0 > 0 ? 1.0f : 0.0f);
    }
}
