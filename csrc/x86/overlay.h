/* overlay.h: each ISA group exports one function that puts its kernels over the table below it. setup.py defines
 * QL_BUILT_<ISA> where the compiler could build the group. */
#ifndef QL_X86_OVERLAY_H
#define QL_X86_OVERLAY_H

#include "../quantlab.h"

#include <string.h> /* memcmp */

void ql_overlay_avx2(ql_backend *table);
void ql_overlay_avx512(ql_backend *table);
void ql_overlay_avx512_vnni(ql_backend *table);
void ql_overlay_avx512_bf16(ql_backend *table);
void ql_overlay_amx(ql_backend *table);

/* the ops that have a kernel for every ISA, written once as <op>_body.h */
#define QL_X86_PLAIN_OPS(X)    \
    X(embedding_forward)       \
    X(linear_many_forward)     \
    X(rmsnorm_forward)         \
    X(rmsnorm_backward)        \
    X(rope_forward)            \
    X(attention_forward)       \
    X(attention_backward)      \
    X(swiglu_forward)          \
    X(swiglu_backward)         \
    X(dropout_forward)         \
    X(add_forward)             \
    X(cross_entropy_forward)   \
    X(sample_forward)          \
    X(quantize_affine_forward) \
    X(gram_forward)            \
    X(feedback_forward)        \
    X(gptq_panel_forward)      \
    X(gptq_steps_forward)      \
    X(gptq_error_forward)      \
    X(gptq_power_forward)

#define QL_X86_FORMAT_OPS(X) \
    X(decode_forward)        \
    X(linear_forward)        \
    X(linear_backward_input)

/* y = x W^T for a few rows (gemv_body.h, bytes_body.h), of `count` products that are alike; 0: nothing done, these weights or this m
 * have no such kernel */
int ql_gemv_forward_avx2(const ql_linear_product *products, int64_t count, const float *x, int64_t m, int accumulate);
int ql_gemv_forward_avx512(const ql_linear_product *products, int64_t count, const float *x, int64_t m, int accumulate);
int ql_gemv_forward_amx(const ql_linear_product *products, int64_t count, const float *x, int64_t m, int accumulate);

/* whether the columns of two weights of one k are stored in the same order */
static inline int ql_same_order(const ql_weight *a, const ql_weight *b) {
    if (a->perm == b->perm) { return 1; }
    return a->perm != NULL && b->perm != NULL && memcmp(a->perm, b->perm, (size_t)a->k * sizeof *a->perm) == 0;
}

/* Whether all of them are stored in the same way, so that kernels read the same of x: then they can share what is made of x, and their tasks. */
static inline int ql_products_alike(const ql_linear_product *products, int64_t count) {
    const ql_weight *a = products[0].w;
    for (int64_t i = 0; i < count; i++) {
        const ql_weight *b = products[i].w;
        int coded_alike = a->format == b->format && a->bits == b->bits && a->group == b->group && (a->zeros == NULL) == (b->zeros == NULL);
        if (b->n < 1 || !coded_alike || !ql_same_order(a, b)) { return 0; }
    }
    return 1;
}

/* the arguments of attention_forward */
typedef struct {
    float *out, *lse;
    const float *q, *k, *v;
    const int64_t *q_start, *kv_start, *kv_len;
    int64_t b, hq, hkv, d;
    float scale;
    int64_t positions; /* queries of later positions are left out, but for sequences with one query */
} attention_call;

void ql_attention_first_avx2(attention_call *call); /* d <= 256, even */
void ql_attention_first_avx512(attention_call *call);

/* rows or columns of a float32 operand: products with at most so many have kernels of their own (narrow_body.h, gram_body.h),
 * for others pack the other operand, which costs more than such a product */
enum { QL_FEW = 16 };

#define X(op, params)                                                                                 \
    void ql_##op##_avx2 params; void ql_##op##_avx512 params; void ql_##op##_avx512_vnni params; \
    void ql_##op##_avx512_bf16 params; void ql_##op##_amx params;
QL_OPS(X)
QL_FORMAT_OPS(X)
#undef X

#endif
