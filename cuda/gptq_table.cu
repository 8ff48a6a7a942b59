/* gptq_table.cu: calibration and GPTQ on the device beside the column loop (gptq.cu): moments of the inputs on tensor cores,
 * the correction of W by them, and the table that quantlab sees. */
#include "../csrc/quant/gptq_device.h"
#include "cuda.h"
#include "device.cuh"
#include "gptq.cuh"

enum { THREADS = 256 };
static const int64_t PANEL = 2048, CORRECTED_ROWS = 1024; /* columns of a product; rows of W that are solved for at once */
enum { QL_CUBLAS_LEFT = 0, QL_CUBLAS_LOWER = 0, QL_CUBLAS_NON_UNIT = 0 };

static unsigned blocks_of(int64_t count) { return (unsigned)((count + THREADS - 1) / THREADS); }

/* ---- activations and their moments ----------------------------------------------------------------------------------- */

extern "C" void ql_norm_fused_forward_cuda(void *out, const float *x, const float *gain, int64_t t, int64_t c, float eps) {
    ql_cuda_rmsnorm_bf16((bf16 *)out, x, gain, t, c, eps);
}

template <typename T> static __global__ void difference_kernel(bf16 *out, const T *a, const T *b, int64_t count) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < count) { out[i] = __float2bfloat16_rn((float)a[i] - (float)b[i]); }
}

extern "C" void ql_difference_forward_cuda(void *out, const void *a, const void *b, int64_t count, int floats) {
    if (floats) {
        ql_cuda_launch(difference_kernel<float>, dim3(blocks_of(count)), dim3(THREADS), 0, false, out, a, b, count);
    } else {
        ql_cuda_launch(difference_kernel<bf16>, dim3(blocks_of(count)), dim3(THREADS), 0, false, out, a, b, count);
    }
}

/* Row-major h (ka, kb) is column-major (kb, ka), and so b^T a: op_b transposed. A lower triangle goes by panels of columns,
 * each from its first row on. */
extern "C" void ql_gram_fused_forward_cuda(float *h, const void *a, const void *b, int64_t t, int64_t ka, int64_t kb, int lower) {
    const ql_cublas *blas = ql_cuda_cublas();
    float one = 1.0f;
    if (blas == NULL || t == 0) { return; }
    for (int64_t j = 0; j < kb; j += lower ? PANEL : kb) {
        int64_t width = lower && kb - j > PANEL ? PANEL : kb - j, row = lower ? j : 0;
        int failed = blas->gemm_ex(blas->handle, QL_CUBLAS_N, QL_CUBLAS_T, (int)width, (int)(ka - row), (int)t, &one, (const bf16 *)b + j,
                                   CUDA_R_16BF, (int)kb, (const bf16 *)a + row, CUDA_R_16BF, (int)ka, &one, h + row * kb + j,
                                   CUDA_R_32F, (int)kb, QL_CUBLAS_COMPUTE_32F, QL_CUBLAS_ALGORITHM);
        if (!ql_cuda_check_library(failed, "cublasGemmEx")) { return; }
    }
}

/* ---- GPTQ ------------------------------------------------------------------------------------------------------------- */

static __global__ void diagonal_kernel(float *out, const float *h, int64_t k) {
    int64_t j = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (j < k) { out[j] = h[j * k + j]; }
}

static ql_status diagonal(float *host_diagonal, const float *h, int64_t k) {
    float *values = (float *)ql_cuda_scratch(QL_SCRATCH_GPTQ, (size_t)k * sizeof(float));
    if (values == NULL) { return QL_ENOMEM; }
    ql_cuda_launch(diagonal_kernel, dim3(blocks_of(k)), dim3(THREADS), 0, false, values, h, k);
    return ql_cuda_download(host_diagonal, values, (size_t)k * sizeof(float));
}

static __global__ void finite_kernel(int *not_finite, const float *x, int64_t count) {
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count; i += (int64_t)gridDim.x * THREADS) {
        if (!isfinite(x[i])) { *not_finite = 1; }
    }
}

static ql_status all_finite(int *host_finite, const float *x, int64_t count) {
    int *flag = (int *)ql_cuda_scratch(QL_SCRATCH_GPTQ, sizeof *flag), not_finite = 0;
    if (flag == NULL) { return QL_ENOMEM; }
    ql_cuda_check(cudaMemsetAsync(flag, 0, sizeof *flag, ql_cuda_stream()), "cudaMemsetAsync");
    unsigned blocks = count < (int64_t)THREADS << 12 ? blocks_of(count) : 1u << 12;
    ql_cuda_launch(finite_kernel, dim3(blocks), dim3(THREADS), 0, false, flag, x, count);
    ql_status status = ql_cuda_download(&not_finite, flag, sizeof not_finite);
    *host_finite = !not_finite;
    return status;
}

/* moments in the order of the factor, which is the reverse of the order of quantization; grid (columns, rows) */
static __global__ void gather_kernel(double *out, const float *moments, const int32_t *order, int64_t k, double scale) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, row = blockIdx.y;
    if (i < k) { out[row * k + i] = scale * (double)moments[row * k + order[k - 1 - i]]; }
}

static __global__ void add_back_kernel(float *w, const double *solved, const int32_t *order, int64_t k) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, row = blockIdx.y;
    if (i < k) { w[row * k + order[k - 1 - i]] += (float)solved[row * k + i]; }
}

static ql_status correct(float *w, const float *moments, const double *matrix, const int32_t *order, int64_t n, int64_t k, double scale) {
    const ql_cublas *blas = ql_cuda_cublas();
    int64_t most = n < CORRECTED_ROWS ? n : CORRECTED_ROWS;
    double *rows = blas == NULL ? NULL : (double *)ql_cuda_scratch(QL_SCRATCH_GPTQ, (size_t)(most * k) * sizeof(double)), one = 1.0;
    if (rows == NULL) { return QL_ENOMEM; }
    for (int64_t i = 0; i < n; i += most) { /* rows of row-major are columns of column-major: L L^T x = row */
        int64_t count = n - i < most ? n - i : most;
        dim3 grid(blocks_of(k), (unsigned)count);
        ql_cuda_launch(gather_kernel, grid, dim3(THREADS), 0, false, rows, moments + i * k, order, k, scale);
        for (int op = QL_CUBLAS_N; op <= QL_CUBLAS_T; op++) {
            int failed = blas->dtrsm(blas->handle, QL_CUBLAS_LEFT, QL_CUBLAS_LOWER, op, QL_CUBLAS_NON_UNIT, (int)k, (int)count, &one,
                                     matrix, (int)k, rows, (int)k);
            if (!ql_cuda_check_library(failed, "cublasDtrsm")) { return QL_ECUDA; }
        }
        ql_cuda_launch(add_back_kernel, grid, dim3(THREADS), 0, false, w + i * k, rows, order, k);
    }
    return QL_OK;
}

static int supports(const ql_gptq_problem *problem, const ql_gptq_options *options) { return ql_cuda_gptq_supports(problem, options); }

extern "C" const ql_gptq_device ql_cuda_gptq = {diagonal, all_finite, ql_cuda_gptq_matrix, ql_cuda_gptq_factor, correct, supports,
                                                ql_cuda_gptq_quantize};
