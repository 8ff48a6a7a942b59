/* lora.h: low-rank adapters (Hu et al. 2021): W x becomes W x + scale B A dropout(x), and the gradients of A and B. */
#ifndef QL_LORA_H
#define QL_LORA_H

#include "../quantlab.h"

typedef struct {
    ql_weight a, b;     /* float32 (r, k), (n, r); r == 0: the matrix has no adapter */
    int64_t r;
    int64_t a_at, b_at; /* where their gradients begin in the vector of all gradients */
    float scale;
} ql_lora;

static inline ql_weight ql_float_matrix(const float *values, int64_t n, int64_t k) {
    return (ql_weight){.format = QL_F32, .bits = 32, .n = n, .k = k, .group = k, .codes = values};
}

/* an adapter, or NULL, as the fused ops take it, without dropout */
static inline ql_low_rank ql_low_rank_of(const ql_lora *lora) {
    if (lora == NULL || lora->r == 0) { return (ql_low_rank){.r = 0}; }
    return (ql_low_rank){.a = lora->a.codes, .b = lora->b.codes, .r = lora->r, .scale = lora->scale};
}

/* of one product; p == 0: none */
typedef struct {
    float p;
    uint64_t seed;
    int64_t stream;
    float *memory; /* (t, k) to work in */
} ql_lora_dropout;

/* y (t, n) += scale dropout(x) A^T B^T; u (t, r) keeps scale dropout(x) A^T */
void ql_lora_forward(float *y, float *u, const float *x, const ql_lora *lora, const ql_lora_dropout *dropout, int64_t t,
                     const ql_backend *backend);

/* From dy (t, n), the x and u of the forward pass, and its dropout: gradients += those of A and B; dx (t, k) += that of x,
 * where dx is not NULL. Works in du (t, r). */
void ql_lora_backward(float *dx, float *gradients, const float *dy, const float *x, const float *u, const ql_lora *lora,
                      const ql_lora_dropout *dropout, float *du, int64_t t, const ql_backend *backend);

#endif
