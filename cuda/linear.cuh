/* linear.cuh: what the matmul files share. Activations inside are bfloat16, sums float32. */
#ifndef QL_CUDA_LINEAR_CUH
#define QL_CUDA_LINEAR_CUH

#include "cuda.h"
#include "low_rank.cuh"
#include "norm_ahead.cuh"
#include "packed.h"

/* bytes of a weight at most that are decoded at once */
static const int64_t QL_DECODED_BYTES = (int64_t)512 << 20;

/* out (i1 - i0, k): rows i0 .. i1 of W in stored order of columns (decode.cu) */
void ql_cuda_dequantize(bf16 *out, const ql_weight *w, int64_t i0, int64_t i1);

/* ---- activations (activations.cu) -------------------------------------------------------------------------------- */

/* x (m, k): float32 (`floats`; normed over k first where gain is not NULL), or bf16 (`halves`) */
typedef struct {
    const float *floats;
    const bf16 *halves;
    const float *gain; /* (k,) */
    float eps;
    ql_norm_ahead made; /* of that norm, by the product ahead; halves NULL: nothing */
    int ordered;        /* halves have each column at its ordered_column; only where ql_cuda_takes_ordered says so */
} ql_activations;

/* each column of rows (m, k) to its ordered_column, or from there back; k a multiple of 32 */
void ql_cuda_order_columns(bf16 *rows, int64_t m, int64_t k);
/* out (m, line) bf16: column j from column perm[j] (perm may be NULL), zeros from k on; ordered: then each at its ordered_column, line
 * a multiple of 32. x->ordered is 0. */
void ql_cuda_activations_rows(bf16 *out, const ql_activations *x, const int32_t *perm, int64_t m, int64_t k, int64_t line, int ordered);

/* ---- low-rank adapters (adapted.cu) -------------------------------------------------------------------------------- */

/* terms (count,) of up to three adapters l (count,) of the same x (t, k), or of none where l is NULL; u is scratch memory. False:
 * memory is out. */
bool ql_cuda_low_rank_terms(ql_low_rank_term *terms, const ql_activations *x, const ql_low_rank *l, int count, int64_t t, int64_t k);
/* y (t, n) = term; sum (t, n) += term */
void ql_cuda_set_term(bf16 *y, const ql_low_rank_term *term, int64_t t, int64_t n);
void ql_cuda_add_term(float *sum, const ql_low_rank_term *term, int64_t t, int64_t n);

/* ---- products on the packed weight (linear_packed.cu) --------------------------------------- */

/* what becomes of a product: float32 set or added, bf16, bf16 after rotary embedding, swiglu of this and the next weight */
typedef enum { QL_OUT_FLOAT, QL_OUT_FLOAT_ADD, QL_OUT_BF16, QL_OUT_ROPE, QL_OUT_SWIGLU } ql_output;

typedef struct {
    const ql_weight *w;
    void *out;           /* (m, n), or where `rows` is not NULL, row rows[i] of it for token i */
    const int32_t *rows;
    ql_output output;
    int ordered;         /* QL_OUT_SWIGLU: each column to its ordered_column */
    ql_low_rank_term term; /* added to the product, ahead of what becomes of it */
    ql_norm_ahead next;    /* QL_OUT_FLOAT_ADD: to be made; halves NULL: nothing */
} ql_product;

typedef struct { /* QL_OUT_ROPE */
    const float *cos, *sin; /* (positions, d / 2) */
    const int32_t *positions;
    int64_t d;
} ql_rotation;

/* Up to three products of the same activations, in one launch where the weights are alike. False where a weight is not packed,
 * there are too many tokens, or a shape is not these kernels': all products are then still to be done (none was added). What is to be
 * made for a norm (one product, in one launch) is made where it returns true. */
bool ql_cuda_linear_packed(const ql_product *products, int count, const ql_activations *x, const ql_rotation *rotation, int64_t m);

/* tokens that one launch of them takes on this device; 0: a norm is not prepared here */
int ql_cuda_norm_ahead_tokens(void);
/* whether t normed tokens are handed over in the order of the fragments (ordered_column) */
bool ql_cuda_orders(int64_t t);

/* ---- products of many tokens (linear_large.cu) ----------------------------------------------------------------------- */

/* y (m, n) float32 or bf16 = or += x W^T; x is bf16 in the stored order of columns of w */
void ql_cuda_linear_large(void *y, cudaDataType type, const bf16 *x, const ql_weight *w, int64_t m, int accumulate);
/* dx (m, k) float32 or bf16, in the stored order of columns, = or += dy W */
void ql_cuda_linear_large_backward(void *dx, cudaDataType type, const bf16 *dy, const ql_weight *w, int64_t m, int accumulate);

#endif
