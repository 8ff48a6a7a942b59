/* lora.c: the product of a low-rank adapter and its gradients, from the ops that the base's products use. */
#include "lora.h"

/* x, or what dropout leaves of it */
static const float *dropped(const float *x, const ql_lora_dropout *dropout, int64_t count, const ql_backend *be) {
    if (dropout->p == 0.0f) { return x; }
    be->dropout_forward(dropout->memory, x, count, dropout->p, dropout->seed, dropout->stream);
    return dropout->memory;
}

void ql_lora_forward(float *y, float *u, const float *x, const ql_lora *lora, const ql_lora_dropout *dropout, int64_t t,
                     const ql_backend *be) {
    be->linear_forward[QL_F32](u, dropped(x, dropout, t * lora->a.k, be), &lora->a, t, 0);
    be->scale_forward(u, lora->scale, t * lora->r);
    be->linear_forward[QL_F32](y, u, &lora->b, t, 1);
}

void ql_lora_backward(float *dx, float *gradients, const float *dy, const float *x, const float *u, const ql_lora *lora,
                      const ql_lora_dropout *dropout, float *du, int64_t t, const ql_backend *be) {
    int64_t k = lora->a.k;
    be->gram_forward(gradients + lora->b_at, dy, u, t, lora->b.n, lora->r, 0);
    be->linear_backward_input[QL_F32](du, dy, &lora->b, t, 0);
    be->scale_forward(du, lora->scale, t * lora->r);
    be->gram_forward(gradients + lora->a_at, du, dropped(x, dropout, t * k, be), t, lora->r, k, 0);
    if (dx == NULL) { return; }
    if (dropout->p == 0.0f) {
        be->linear_backward_input[QL_F32](dx, du, &lora->a, t, 1);
        return;
    }
    be->linear_backward_input[QL_F32](dropout->memory, du, &lora->a, t, 0);
    dropped(dropout->memory, dropout, t * k, be);
    be->add_forward(dx, dropout->memory, t * k);
}
