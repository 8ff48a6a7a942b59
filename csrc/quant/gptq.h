/* gptq.h: GPTQ (Frantar et al. 2022) without an inverse.
 *
 * With the permuted, damped Hessian H = R R^T, R upper triangular, GPTQ's weight of column j just before it is rounded is
 *     z_j = w_j + sum over i < j of (w_i - q_i) R_ij / R_jj,
 * so the method needs one Cholesky factor and only reads finished columns. R comes from the Cholesky factor L of the
 * index-reversed H, and reversing the flat row-major array reverses both indices: R[i][j] = L[k-1-i][k-1-j].
 * All arithmetic is float64. */
#ifndef QL_GPTQ_H
#define QL_GPTQ_H

#include "../quantlab.h"

typedef enum { QL_SEARCH_NONE, QL_SEARCH_MSE, QL_SEARCH_HESSIAN } ql_scale_search;

typedef struct {
    int bits, symmetric;
    ql_scale_search search;
    int fixed_scales;  /* scales of every group come from W before the first column (static groups, whole rows) */
    int keep_dead;     /* fixed scales see the weights of dead columns, as the reference does for whole rows */
    int stale_scales;  /* scales ignore the updates of earlier columns of the same block of 128, as the reference does */
    int half_scales;   /* scales are rounded to what a float16 holds before codes are computed */
    int store_ordered; /* codes are stored in the order of quantization instead of that of W */
} ql_gptq_options;

typedef struct {
    const float *w;           /* (n, k) */
    const double *feedback;   /* (k, k): R_ij / R_jj above the diagonal, in the order of quantization */
    const double *diagonal;   /* (k,): R_jj */
    const int32_t *order;     /* (k,): column of W that is quantized at step j */
    const double *importance; /* (k,): H_jj + damping, by column of W */
    const uint8_t *dead;      /* (k,): 1 for a column of W without any input, by column of W */
    int64_t n, k, group;      /* columns that share a scale; the steps of a group follow each other unless scales are fixed */
} ql_gptq_problem;

typedef struct {
    uint32_t *codes; /* (n, words per row) zeroed */
    float *scales;   /* (n, groups) */
    uint8_t *zeros;  /* (n, groups) */
    double *loss;    /* (n,): set to the sum over columns of (z - q)^2 R_jj^2 / 2 */
} ql_gptq_result;

/* out (k, k) = the lower triangle of the reversed, permuted Hessian: factor * H + damp on the diagonal; h (k, k) lower.
 * A zero on the diagonal of H becomes 1. QL_ENUMERIC where H is not finite. */
ql_status ql_gptq_matrix(double *out, const float *h, const int32_t *order, int64_t k, double factor, double damp);

/* Its Cholesky factor L, in place, a block of at most QL_GPTQ_PANEL columns after the other: the first of these takes from
 * rows first .. k of the block what the finished columns contribute (QL_ENOMEM: no scratch memory), LAPACK factors the block on
 * the diagonal, and the second multiplies the rows below by `inverse` (count, count), that of the factor's transpose. */
enum { QL_GPTQ_PANEL = 64 };
ql_status ql_gptq_factor_update(double *l, int64_t k, int64_t first, int64_t count);
void ql_gptq_factor_solve(double *l, const double *inverse, int64_t k, int64_t first, int64_t count);

/* in place: Cholesky factor L of that matrix (lower, row-major) -> feedback; diagonal (k,) is set */
void ql_gptq_feedback(double *l, double *diagonal, int64_t k);

/* work: work_bytes = ql_gptq_work_bytes(k) bytes, aligned to 64: a part for each thread */
int64_t ql_gptq_work_bytes(int64_t k);
void ql_gptq_quantize(const ql_gptq_result *result, const ql_gptq_problem *problem, const ql_gptq_options *options, void *work,
                      int64_t work_bytes);

#endif
