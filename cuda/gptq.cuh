/* gptq.cuh: GPTQ on the device (gptq.cu). Pointers are of the device unless said. */
#ifndef QL_CUDA_GPTQ_CUH
#define QL_CUDA_GPTQ_CUH

extern "C" {
#include "../csrc/quant/gptq.h"
}

/* what the kernels of the column loop get */
struct gptq_args {
    ql_gptq_result r;
    ql_gptq_problem p;
    ql_gptq_options options;
    double *error;  /* (n, k), by step: w - q of finished steps */
    uint8_t *codes; /* (n, k), a byte each */
};

/* out (k, k): as ql_gptq_matrix, but transposed: element (i, j), j <= i, is out[j, i]. Waits for the device. */
ql_status ql_cuda_gptq_matrix(double *out, const float *h, const int32_t *order, int64_t k, double factor, double damp);
/* feedback (k, k), diagonal (k,) of that matrix, which is overwritten. *info (host) not 0: it is not positive definite. */
ql_status ql_cuda_gptq_factor(double *feedback, double *diagonal, double *matrix, int64_t k, int *info);

/* whether ql_cuda_gptq_quantize can do it: fixed scales, or groups of up to 128 columns, within a block where they are stale */
bool ql_cuda_gptq_supports(const ql_gptq_problem *problem, const ql_gptq_options *options);
/* ql_gptq_quantize; host_order: problem->order on the host */
ql_status ql_cuda_gptq_quantize(const ql_gptq_result *result, const ql_gptq_problem *problem, const ql_gptq_options *options,
                                const int32_t *host_order);

#endif
