/* gptq_device.h: GPTQ on a backend with memory of its own: what `gptq` of its table points to. Pointers are of the device
 * unless a name begins with host. All are called between begin and end. Shapes and meanings: gptq.h. */
#ifndef QL_GPTQ_DEVICE_H
#define QL_GPTQ_DEVICE_H

#include "gptq.h"

typedef struct ql_gptq_device {
    /* host_diagonal (k,): of h (k, k) */
    ql_status (*diagonal)(float *host_diagonal, const float *h, int64_t k);
    /* *host_finite = whether all of x (count,) is finite */
    ql_status (*finite)(int *host_finite, const float *x, int64_t count);
    /* out (k, k) = transposed result of ql_gptq_matrix: element (i, j), j <= i, is out[j, i]; the rest is not set */
    ql_status (*matrix)(double *out, const float *h, const int32_t *order, int64_t k, double factor, double damp);
    /* matrix -> its Cholesky factor in place; feedback (k, k), diagonal (k,). *host_info not 0: not positive definite */
    ql_status (*factor)(double *feedback, double *diagonal, double *matrix, int64_t k, int *host_info);
    /* w (n, k) += scale * moments (n, k) (H + damp)^-1, by the factor that `factor` left in matrix */
    ql_status (*correct)(float *w, const float *moments, const double *matrix, const int32_t *order, int64_t n, int64_t k,
                         double scale);
    /* whether quantize can do it; only the sizes of the problem are read */
    int (*supports)(const ql_gptq_problem *problem, const ql_gptq_options *options);
    ql_status (*quantize)(const ql_gptq_result *result, const ql_gptq_problem *problem, const ql_gptq_options *options,
                          const int32_t *host_order);
} ql_gptq_device;

#endif
