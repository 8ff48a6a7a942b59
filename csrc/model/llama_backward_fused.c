/* llama_backward_fused.c: a layer of training by fused ops: activations in the backend's own type, the residual stream and the
 * gradients of sums float32. */
#include "training_pass.h"

#include <math.h> /* sqrtf */

int ql_training_fused(const ql_backend *be) {
    return be->norm_fused_forward != NULL && be->adapted_forward != NULL && be->adapted_backward != NULL &&
           be->attention_fused_forward != NULL && be->attention_fused_backward != NULL && be->rmsnorm_fused_backward != NULL &&
           be->rope_fused_forward != NULL && be->swiglu_fused_forward != NULL && be->swiglu_fused_backward != NULL &&
           be->round_forward != NULL;
}

static ql_low_rank low_rank_of(const ql_training_pass *p, int64_t i, int slot) {
    const ql_lora *lora = p->m->layer[i].lora;
    ql_low_rank low = ql_low_rank_of(lora != NULL ? &lora[slot] : NULL);
    low.dropout = p->call->dropout, low.seed = p->call->seed, low.stream = ql_mask_stream(p, i, slot);
    return low;
}

/* ---- forward -------------------------------------------------------------------------------------------------------- */

/* y = x times matrix `slot` and its adapter, or, where y is NULL, sum += it */
static void product(const ql_training_pass *p, int64_t i, int slot, void *y, float *sum, const void *x, const ql_activations_kept *s) {
    ql_low_rank lora = low_rank_of(p, i, slot);
    p->be->adapted_forward(y, sum, s->u[slot], x, p->m->layer[i].matrix[slot], &lora, p->t);
}

void ql_fused_layer_forward(const ql_training_pass *p, int64_t i, const ql_activations_kept *s, float *out) {
    const ql_llama *m = p->m;
    const ql_llama_batch *batch = &p->call->batch;
    const ql_backend *be = p->be;
    int64_t t = p->t;
    size_t stream_bytes = (size_t)(t * m->c) * sizeof(float);
    be->norm_fused_forward(s->h, s->x, m->layer[i].input_norm, t, m->c, m->eps);
    product(p, i, QL_SLOT_Q, s->q, NULL, s->h, s);
    product(p, i, QL_SLOT_K, s->k, NULL, s->h, s);
    product(p, i, QL_SLOT_V, s->v, NULL, s->h, s);
    be->rope_fused_forward(s->q, batch->cos, batch->sin, batch->positions, t, m->hq, m->d);
    be->rope_fused_forward(s->k, batch->cos, batch->sin, batch->positions, t, m->hkv, m->d);
    be->attention_fused_forward(s->a, s->lse, s->q, s->k, s->v, batch->q_start, batch->kv_start, batch->kv_len, t, batch->b, m->hq,
                                m->hkv, m->d, batch->max_queries, batch->max_keys, 1.0f / sqrtf((float)m->d), 0);
    (void)be->copy(s->x2, s->x, stream_bytes); /* a failure is told by end */
    product(p, i, QL_SLOT_O, NULL, s->x2, s->a, s);
    be->norm_fused_forward(s->h2, s->x2, m->layer[i].post_norm, t, m->c, m->eps);
    product(p, i, QL_SLOT_GATE, s->gate, NULL, s->h2, s);
    product(p, i, QL_SLOT_UP, s->up, NULL, s->h2, s);
    if (out != NULL || ql_has_adapter(&m->layer[i], QL_SLOT_DOWN)) { be->swiglu_fused_forward(s->act, s->gate, s->up, t * m->f); }
    if (out == NULL) { return; }
    (void)be->copy(out, s->x2, stream_bytes);
    product(p, i, QL_SLOT_DOWN, NULL, out, s->act, s);
}

/* ---- backward ------------------------------------------------------------------------------------------------------- */

void ql_fused_inputs(const ql_training_pass *p, int64_t i, const ql_activations_kept *s) {
    const ql_llama *m = p->m;
    const ql_llama_layer *layer = &m->layer[i];
    if (ql_has_adapter(layer, QL_SLOT_Q) || ql_has_adapter(layer, QL_SLOT_K) || ql_has_adapter(layer, QL_SLOT_V)) {
        p->be->norm_fused_forward(s->h, s->x, layer->input_norm, p->t, m->c, m->eps);
    }
    if (ql_has_adapter(layer, QL_SLOT_GATE) || ql_has_adapter(layer, QL_SLOT_UP)) {
        p->be->norm_fused_forward(s->h2, s->x2, layer->post_norm, p->t, m->c, m->eps);
    }
    if (ql_has_adapter(layer, QL_SLOT_DOWN)) { p->be->swiglu_fused_forward(s->act, s->gate, s->up, p->t * m->f); }
}

/* dx = dy times matrix `slot`, or, where dx is NULL, sum = or += it, or neither; its adapter's gradients from x, its input */
static void product_backward(const ql_training_pass *p, int64_t i, int slot, void *dx, float *sum, const void *dy, const void *x,
                             const ql_activations_kept *s, int accumulate) {
    const ql_llama_layer *layer = &p->m->layer[i];
    ql_low_rank lora = low_rank_of(p, i, slot);
    float *da = lora.r > 0 ? p->call->gradients + layer->lora[slot].a_at : NULL;
    float *db = lora.r > 0 ? p->call->gradients + layer->lora[slot].b_at : NULL;
    p->be->adapted_backward(dx, sum, da, db, dy, x, s->u[slot], p->du, layer->matrix[slot], &lora, p->t, accumulate);
}

static void mlp_backward(const ql_training_pass *p, int64_t i, const ql_activations_kept *s) {
    const ql_llama *m = p->m;
    void *dact = ql_dact(p, s);
    product_backward(p, i, QL_SLOT_DOWN, dact, NULL, p->dx_own, s->act, s, 0);
    p->be->swiglu_fused_backward(s->gate, s->up, dact, s->gate, s->up, p->t * m->f);
    product_backward(p, i, QL_SLOT_GATE, NULL, p->dh, s->gate, s->h2, s, 0);
    product_backward(p, i, QL_SLOT_UP, NULL, p->dh, s->up, s->h2, s, 1);
    p->be->rmsnorm_fused_backward(p->dx, p->dx_own, p->dh, s->x2, m->layer[i].post_norm, p->t, m->c, m->eps);
}

void ql_fused_layer_backward(const ql_training_pass *p, int64_t i, const ql_activations_kept *s) {
    const ql_llama *m = p->m;
    const ql_llama_batch *batch = &p->call->batch;
    const ql_backend *be = p->be;
    float *dh = i > p->first ? p->dh : NULL; /* nothing to learn below */
    mlp_backward(p, i, s);
    product_backward(p, i, QL_SLOT_O, p->da, NULL, p->dx_own, s->a, s, 0);
    be->attention_fused_backward(p->dq, p->dk, p->dv, p->da, s->q, s->k, s->v, s->a, s->lse, batch->q_start, batch->kv_start,
                                 batch->kv_len, p->t, batch->b, m->hq, m->hkv, m->d, batch->max_queries, batch->max_keys,
                                 1.0f / sqrtf((float)m->d));
    be->rope_fused_forward(p->dq, batch->cos, p->minus_sin, batch->positions, p->t, m->hq, m->d);
    be->rope_fused_forward(p->dk, batch->cos, p->minus_sin, batch->positions, p->t, m->hkv, m->d);
    product_backward(p, i, QL_SLOT_Q, NULL, dh, p->dq, s->h, s, 0);
    product_backward(p, i, QL_SLOT_K, NULL, dh, p->dk, s->h, s, 1);
    product_backward(p, i, QL_SLOT_V, NULL, dh, p->dv, s->h, s, 1);
    if (dh != NULL) { be->rmsnorm_fused_backward(p->dx, p->dx_own, dh, s->x, m->layer[i].input_norm, p->t, m->c, m->eps); }
}
