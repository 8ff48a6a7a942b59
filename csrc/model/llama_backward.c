/* llama_backward.c: the gradient of an adapter over the table of ops: a forward pass that keeps what the way back reads, the
 * losses by chunks of rows, and the layers in reverse. The model's own matrices are frozen. */
#include "training_pass.h"
#include "workspace.h"

#include <math.h> /* sqrtf */

enum { LOSS_ROWS = 256 }; /* rows of logits held at once */

typedef ql_activations_kept activations;
typedef ql_training_pass pass;

/* ---- memory --------------------------------------------------------------------------------------------------------- */

/* `count` activations */
static void *take_activations(const pass *p, ql_workspace *w, int64_t count) {
    int64_t bytes = count * (p->fused ? p->be->kv_bytes : (int64_t)sizeof(float));
    return ql_take(w, (bytes + (int64_t)sizeof(float) - 1) / (int64_t)sizeof(float));
}

/* `own` is the layer's, `shared` that of all */
static void cut_layer(activations *s, const pass *p, ql_workspace *own, ql_workspace *shared) {
    const ql_llama *m = p->m;
    const int *adapted = p->adapted;
    int64_t t = p->t;
    int remakes = p->call->recompute != QL_RECOMPUTE_NONE;
    ql_workspace *most = p->call->recompute == QL_RECOMPUTE_FULL ? shared : own;
    s->x = ql_take(own, t * m->c);
    s->q = take_activations(p, most, t * m->hq * m->d);
    s->k = take_activations(p, most, t * m->hkv * m->d);
    s->v = take_activations(p, most, t * m->hkv * m->d);
    s->a = take_activations(p, most, t * m->hq * m->d);
    s->lse = ql_take(most, t * m->hq);
    s->x2 = ql_take(most, t * m->c);
    s->gate = take_activations(p, most, t * m->f);
    s->up = take_activations(p, most, t * m->f);
    s->inv_rms = ql_take(most, t);
    s->inv_rms2 = ql_take(most, t);
    for (int slot = 0; slot < QL_SLOTS; slot++) { /* a layer that is made again ends before its down product */
        s->u[slot] = ql_take(slot == QL_SLOT_DOWN ? own : most, adapted[slot] ? t * m->rank : 0);
    }
    int reads_h = adapted[QL_SLOT_Q] || adapted[QL_SLOT_K] || adapted[QL_SLOT_V];
    int reads_h2 = adapted[QL_SLOT_GATE] || adapted[QL_SLOT_UP];
    s->h = take_activations(p, remakes || !reads_h ? shared : own, t * m->c);
    s->act = take_activations(p, remakes || !adapted[QL_SLOT_DOWN] ? shared : own, t * m->f);
    /* where nothing reads h2 later, it is gone before act begins */
    s->h2 = !reads_h2 && m->f >= m->c ? s->act : take_activations(p, remakes || !reads_h2 ? shared : own, t * m->c);
}

/* of layer i; those before `first` all work in the memory of `first`, which they leave before it begins */
static activations layer_activations(const pass *p, int64_t i) {
    activations s;
    int64_t place = i > p->first ? i - p->first : 0;
    ql_workspace own = {p->layers + place * p->layer_floats, 0}, shared = {p->shared, 0};
    cut_layer(&s, p, &own, &shared);
    return s;
}

static int64_t widest_input(const pass *p) {
    const int64_t k[QL_SLOTS] = {p->m->c, p->m->c, p->m->c, p->m->hq * p->m->d, p->m->c, p->m->c, p->m->f};
    int64_t widest = 0;
    for (int slot = 0; slot < QL_SLOTS; slot++) { widest = p->adapted[slot] && k[slot] > widest ? k[slot] : widest; }
    return widest;
}

static void cut_losses(pass *p, ql_workspace *w) {
    int64_t chunk = ql_product_rows(p->call->count < LOSS_ROWS ? p->call->count : LOSS_ROWS, p->be);
    p->rows = ql_take(w, chunk * p->m->c);
    p->hidden = ql_take(w, chunk * p->m->c);
    p->inv = ql_take(w, chunk);
    p->logits = ql_take(w, chunk * p->call->head->n);
}

static void cut(pass *p, ql_workspace *w) {
    const ql_llama *m = p->m;
    int64_t t = p->t, layers = m->layers > p->first ? m->layers - p->first : 1;
    activations none;
    ql_workspace own = {NULL, 0}, shared = {NULL, 0};
    cut_layer(&none, p, &own, &shared);
    p->layer_floats = own.used;
    p->layers = ql_take(w, layers * own.used);
    ql_workspace losses = {NULL, 0};
    cut_losses(p, &losses);
    p->shared = ql_take(w, shared.used > losses.used ? shared.used : losses.used);
    losses = (ql_workspace){p->shared, 0}; /* they are taken between the layers' forward pass and the way back */
    cut_losses(p, &losses);
    p->last = ql_take(w, t * m->c);
    p->minus_sin = ql_take(w, p->call->positions * (m->d / 2));
    p->dx = ql_take(w, t * m->c);
    p->dh = ql_take(w, t * m->c);
    p->dx_own = take_activations(p, w, p->fused ? t * m->c : 0);
    p->dact = take_activations(p, w, p->adapted[QL_SLOT_DOWN] ? t * m->f : 0);
    p->da = take_activations(p, w, t * m->hq * m->d);
    p->dq = take_activations(p, w, t * m->hq * m->d);
    p->dk = take_activations(p, w, t * m->hkv * m->d);
    p->dv = take_activations(p, w, t * m->hkv * m->d);
    p->du = ql_take(w, t * m->rank);
    p->dropped = ql_take(w, p->call->dropout > 0.0f && !p->fused ? t * widest_input(p) : 0);
}

static pass begin(const ql_llama_training *call, float *memory, int64_t *floats, const ql_backend *be) {
    pass p = {.call = call, .m = call->model, .be = be, .fused = ql_training_fused(be), .t = call->batch.t, .first = call->model->layers};
    for (int64_t i = p.m->layers - 1; i >= 0; i--) {
        for (int slot = 0; slot < QL_SLOTS; slot++) {
            if (ql_has_adapter(&p.m->layer[i], slot)) { p.adapted[slot] = 1, p.first = i; }
        }
    }
    ql_workspace w = {memory, 0};
    cut(&p, &w);
    *floats = w.used;
    return p;
}

int64_t ql_llama_training_workspace(const ql_llama_training *call, const ql_backend *be) {
    int64_t floats;
    begin(call, NULL, &floats, be);
    return floats;
}

/* ---- forward -------------------------------------------------------------------------------------------------------- */

static ql_lora_dropout dropout_of(const pass *p, int64_t i, int slot) {
    return (ql_lora_dropout){p->call->dropout, p->call->seed, ql_mask_stream(p, i, slot), p->dropped};
}

static void product(const pass *p, int64_t i, int slot, float *y, const float *x, const activations *s) {
    ql_lora_dropout dropout = dropout_of(p, i, slot);
    ql_llama_product(y, s->u[slot], x, &p->m->layer[i], slot, &dropout, p->t, 0, p->be);
}

/* as ql_fused_layer_forward */
static void layer_forward(const pass *p, int64_t i, const activations *s, float *out) {
    const ql_llama *m = p->m;
    const ql_llama_batch *batch = &p->call->batch;
    const ql_backend *be = p->be;
    int64_t t = p->t;
    if (p->fused) {
        ql_fused_layer_forward(p, i, s, out);
        return;
    }
    be->rmsnorm_forward(s->h, s->inv_rms, s->x, m->layer[i].input_norm, t, m->c, m->eps);
    product(p, i, QL_SLOT_Q, s->q, s->h, s);
    product(p, i, QL_SLOT_K, s->k, s->h, s);
    product(p, i, QL_SLOT_V, s->v, s->h, s);
    be->rope_forward(s->q, batch->cos, batch->sin, batch->positions, t, m->hq, m->d);
    be->rope_forward(s->k, batch->cos, batch->sin, batch->positions, t, m->hkv, m->d);
    be->attention_forward(s->a, s->lse, s->q, s->k, s->v, batch->q_start, batch->kv_start, batch->kv_len, batch->b, m->hq,
                          m->hkv, m->d, 1.0f / sqrtf((float)m->d));
    product(p, i, QL_SLOT_O, s->x2, s->a, s);
    be->add_forward(s->x2, s->x, t * m->c);
    be->rmsnorm_forward(s->h2, s->inv_rms2, s->x2, m->layer[i].post_norm, t, m->c, m->eps);
    product(p, i, QL_SLOT_GATE, s->gate, s->h2, s);
    product(p, i, QL_SLOT_UP, s->up, s->h2, s);
    be->swiglu_forward(s->act, s->gate, s->up, t * m->f);
    if (out == NULL) { return; }
    product(p, i, QL_SLOT_DOWN, out, s->act, s);
    be->add_forward(out, s->x2, t * m->c);
}

static ql_status forward(const pass *p) {
    activations s = layer_activations(p, 0);
    p->be->embedding_forward(p->m->layers > 0 ? s.x : p->last, p->call->batch.ids, p->m->embed, p->t);
    for (int64_t i = 0; i < p->m->layers; i++) {
        activations next = layer_activations(p, i + 1 < p->m->layers ? i + 1 : i);
        layer_forward(p, i, &s, i + 1 < p->m->layers ? next.x : p->last);
        s = next;
        if (ql_call_stopped()) { return ql_fail(QL_EINTERRUPT, "stopped"); }
    }
    return QL_OK;
}

/* ---- losses --------------------------------------------------------------------------------------------------------- */

/* of `count` kept tokens from the i-th on: their losses, and their rows of dx */
static void chunk_losses(const pass *p, float *losses, int64_t i, int64_t count) {
    const ql_llama *m = p->m;
    const ql_llama_training *call = p->call;
    const ql_weight *head = call->head;
    const ql_backend *be = p->be;
    be->gather_rows_forward(p->rows, p->last, call->kept + i, count, m->c);
    be->rmsnorm_forward(p->hidden, p->inv, p->rows, m->norm, count, m->c, m->eps);
    be->linear_forward[head->format](p->logits, p->hidden, head, ql_product_rows(count, be), 0);
    be->cross_entropy_forward(losses + i, p->logits, p->logits, call->targets + i, count, head->n);
    if (call->head_gradient != NULL) {
        be->scale_forward(p->hidden, call->factor, count * m->c);
        be->gram_forward(call->head_gradient, p->logits, p->hidden, count, head->n, m->c, 0);
    }
    be->linear_backward_input[head->format](p->hidden, p->logits, head, count, 0);
    be->scale_forward(p->hidden, call->factor, count * m->c);
    be->rmsnorm_backward(p->hidden, p->hidden, p->rows, m->norm, p->inv, count, m->c, 0);
    be->scatter_rows_forward(p->dx, p->hidden, call->kept + i, count, m->c);
}

static ql_status all_losses(const pass *p, float *losses) {
    ql_status status = p->be->fill(p->dx, 0, (size_t)(p->t * p->m->c) * sizeof(float));
    for (int64_t i = 0; i < p->call->count && status == QL_OK; i += LOSS_ROWS) {
        chunk_losses(p, losses, i, p->call->count - i < LOSS_ROWS ? p->call->count - i : LOSS_ROWS);
        if (ql_call_stopped()) { return ql_fail(QL_EINTERRUPT, "stopped"); }
    }
    return status;
}

/* ---- backward ------------------------------------------------------------------------------------------------------- */

/* dx (t, k) = dy (t, n) times matrix `slot`, or +=, where it is not NULL; its adapter's gradients from x, its input */
static void product_backward(const pass *p, int64_t i, int slot, float *dx, const float *dy, const float *x, const activations *s,
                             int accumulate) {
    const ql_llama_layer *layer = &p->m->layer[i];
    const ql_weight *w = layer->matrix[slot];
    if (dx != NULL) { p->be->linear_backward_input[w->format](dx, dy, w, p->t, accumulate); }
    if (!ql_has_adapter(layer, slot)) { return; }
    ql_lora_dropout dropout = dropout_of(p, i, slot);
    ql_lora_backward(dx, p->call->gradients, dy, x, s->u[slot], &layer->lora[slot], &dropout, p->du, p->t, p->be);
}

/* the inputs of adapted matrices that were not kept */
static void remake(const pass *p, int64_t i, const activations *s) {
    const ql_llama *m = p->m;
    const ql_llama_layer *layer = &m->layer[i];
    if (p->call->recompute == QL_RECOMPUTE_NONE) { return; }
    if (p->call->recompute == QL_RECOMPUTE_FULL) {
        layer_forward(p, i, s, NULL);
        return;
    }
    if (p->fused) {
        ql_fused_inputs(p, i, s);
        return;
    }
    if (ql_has_adapter(layer, QL_SLOT_Q) || ql_has_adapter(layer, QL_SLOT_K) || ql_has_adapter(layer, QL_SLOT_V)) {
        p->be->rmsnorm_forward(s->h, NULL, s->x, layer->input_norm, p->t, m->c, m->eps);
    }
    if (ql_has_adapter(layer, QL_SLOT_GATE) || ql_has_adapter(layer, QL_SLOT_UP)) {
        p->be->rmsnorm_forward(s->h2, NULL, s->x2, layer->post_norm, p->t, m->c, m->eps);
    }
    if (ql_has_adapter(layer, QL_SLOT_DOWN)) { p->be->swiglu_forward(s->act, s->gate, s->up, p->t * m->f); }
}

static void mlp_backward(const pass *p, int64_t i, const activations *s) {
    const ql_llama *m = p->m;
    void *dact = ql_dact(p, s);
    product_backward(p, i, QL_SLOT_DOWN, dact, p->dx, s->act, s, 0);
    p->be->swiglu_backward(s->gate, s->up, dact, s->gate, s->up, p->t * m->f);
    product_backward(p, i, QL_SLOT_GATE, p->dh, s->gate, s->h2, s, 0);
    product_backward(p, i, QL_SLOT_UP, p->dh, s->up, s->h2, s, 1);
    p->be->rmsnorm_backward(p->dx, p->dh, s->x2, m->layer[i].post_norm, s->inv_rms2, p->t, m->c, 1);
}

static void attention_backward(const pass *p, int64_t i, const activations *s) {
    const ql_llama *m = p->m;
    const ql_llama_batch *batch = &p->call->batch;
    const ql_backend *be = p->be;
    float *dh = i > p->first ? p->dh : NULL; /* nothing to learn below */
    product_backward(p, i, QL_SLOT_O, p->da, p->dx, s->a, s, 0);
    be->attention_backward(p->dq, p->dk, p->dv, p->da, s->q, s->k, s->v, s->a, s->lse, batch->q_start, batch->kv_start,
                           batch->kv_len, batch->b, m->hq, m->hkv, m->d, 1.0f / sqrtf((float)m->d));
    be->rope_forward(p->dq, batch->cos, p->minus_sin, batch->positions, p->t, m->hq, m->d);
    be->rope_forward(p->dk, batch->cos, p->minus_sin, batch->positions, p->t, m->hkv, m->d);
    product_backward(p, i, QL_SLOT_Q, dh, p->dq, s->h, s, 0);
    product_backward(p, i, QL_SLOT_K, dh, p->dk, s->h, s, 1);
    product_backward(p, i, QL_SLOT_V, dh, p->dv, s->h, s, 1);
    if (dh != NULL) { be->rmsnorm_backward(p->dx, dh, s->x, m->layer[i].input_norm, s->inv_rms, p->t, m->c, 1); }
}

static ql_status backward(const pass *p) {
    size_t table_floats = (size_t)(p->call->positions * (p->m->d / 2));
    ql_status status = p->be->copy(p->minus_sin, p->call->batch.sin, table_floats * sizeof(float));
    p->be->scale_forward(p->minus_sin, -1.0f, (int64_t)table_floats); /* the inverse rotation */
    if (p->fused) { p->be->round_forward(p->dx_own, p->dx, p->t * p->m->c); }
    for (int64_t i = p->m->layers - 1; i >= p->first && status == QL_OK; i--) {
        activations s = layer_activations(p, i);
        remake(p, i, &s);
        if (p->fused) {
            ql_fused_layer_backward(p, i, &s);
        } else {
            mlp_backward(p, i, &s);
            attention_backward(p, i, &s);
        }
        if (ql_call_stopped()) { return ql_fail(QL_EINTERRUPT, "stopped"); }
    }
    return status;
}

ql_status ql_llama_accumulate(float *losses, const ql_llama_training *call, float *workspace, const ql_backend *be) {
    int64_t floats;
    pass p = begin(call, workspace, &floats, be);
    ql_status status = forward(&p);
    if (status == QL_OK) { status = all_losses(&p, losses); }
    return status == QL_OK ? backward(&p) : status;
}
