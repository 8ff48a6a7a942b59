/* llama_forward.c: the LLaMA forward pass (Touvron et al. 2023) over the table of ops; it names no backend. */
#include "llama.h"
#include "workspace.h"

#include <math.h> /* sqrtf */

/* what a pass holds beside its output, cut from the workspace; but for x and h in the backend's own type where it is fused */
typedef struct {
    float *x;         /* (t, c) residual stream */
    float *h;         /* (t, c) normed input of a block; fused: memory of the norms */
    float *q, *k, *v; /* (t, hq d) (t, hkv d) (t, hkv d) */
    float *a;         /* (t, hq d) attention output */
    float *gate, *up; /* (t, f) */
    float *u;         /* (t, rank) of the adapters */
    int64_t t, m;     /* rows of x, and of the products: t or more */
} buffers;

static buffers cut(const ql_llama *m, int64_t t, ql_workspace *w) {
    buffers s;
    s.t = s.m = t;
    s.x = ql_take(w, t * m->c);
    s.h = ql_take(w, t * m->c);
    s.q = ql_take(w, t * m->hq * m->d);
    s.k = ql_take(w, t * m->hkv * m->d);
    s.v = ql_take(w, t * m->hkv * m->d);
    s.a = ql_take(w, t * m->hq * m->d);
    s.gate = ql_take(w, t * m->f);
    s.up = ql_take(w, t * m->f);
    s.u = ql_take(w, t * m->rank);
    return s;
}

int64_t ql_llama_workspace(const ql_llama *m, int64_t t, const ql_backend *be) {
    ql_workspace size = {NULL, 0};
    cut(m, ql_product_rows(t, be), &size);
    return size.used;
}

void ql_llama_rows(int32_t *rows, const ql_llama_batch *batch) {
    for (int64_t b = 0; b < batch->b; b++) {
        int64_t queries = batch->q_start[b + 1] - batch->q_start[b];
        int64_t first = batch->kv_start[b] + batch->kv_len[b] - queries;
        for (int64_t i = 0; i < queries; i++) { rows[batch->q_start[b] + i] = (int32_t)(first + i); }
    }
}

int ql_llama_fused(const ql_backend *be) {
    return be->qkv_forward != NULL && be->attention_fused_forward != NULL && be->gate_up_forward != NULL &&
           be->linear_residual_forward != NULL;
}

int64_t ql_llama_kv_bytes(const ql_backend *be) { return ql_llama_fused(be) ? be->kv_bytes : (int64_t)sizeof(float); }

/* y += the part of the adapter of matrix `slot` */
static void add_adapter(float *y, float *u, const float *x, const ql_llama_layer *layer, int slot, const ql_lora_dropout *dropout,
                        int64_t t, const ql_backend *be) {
    if (layer->lora != NULL && layer->lora[slot].r > 0) { ql_lora_forward(y, u, x, &layer->lora[slot], dropout, t, be); }
}

void ql_llama_product(float *y, float *u, const float *x, const ql_llama_layer *layer, int slot, const ql_lora_dropout *dropout,
                      int64_t t, int accumulate, const ql_backend *be) {
    const ql_weight *w = layer->matrix[slot];
    be->linear_forward[w->format](y, x, w, t, accumulate);
    add_adapter(y, u, x, layer, slot, dropout, t, be);
}

static const ql_lora_dropout no_dropout = {.p = 0.0f};

/* y (m, n) += x (m, k) times matrix `slot` */
static void add_product(float *y, const float *x, const ql_llama_layer *layer, int slot, const buffers *s, const ql_backend *be) {
    ql_llama_product(y, s->u, x, layer, slot, &no_dropout, s->m, 1, be);
}

/* y[i] (m, n) = x (m, k) times matrix `slot` + i, for i < count */
static void products(float *const *y, const float *x, const ql_llama_layer *layer, int slot, int count, const buffers *s,
                     const ql_backend *be) {
    ql_linear_product base[QL_PRODUCTS];
    for (int i = 0; i < count; i++) { base[i] = (ql_linear_product){y[i], layer->matrix[slot + i]}; }
    be->linear_many_forward(base, count, x, s->m);
    for (int i = 0; i < count; i++) { add_adapter(y[i], s->u, x, layer, slot + i, &no_dropout, s->m, be); }
}

static void attention_block(const ql_llama *m, const ql_llama_layer *layer, const ql_llama_batch *batch, const buffers *s,
                            void *cache_k, void *cache_v, const ql_backend *be) {
    int64_t t = batch->t;
    be->rmsnorm_forward(s->h, NULL, s->x, layer->input_norm, t, m->c, m->eps);
    products((float *[]){s->q, s->k, s->v}, s->h, layer, QL_SLOT_Q, 3, s, be);
    be->rope_forward(s->q, batch->cos, batch->sin, batch->positions, t, m->hq, m->d);
    be->rope_forward(s->k, batch->cos, batch->sin, batch->positions, t, m->hkv, m->d);
    const float *k = s->k, *v = s->v;
    if (cache_k != NULL) {
        be->scatter_rows_forward(cache_k, s->k, batch->rows, t, m->hkv * m->d);
        be->scatter_rows_forward(cache_v, s->v, batch->rows, t, m->hkv * m->d);
        k = cache_k, v = cache_v;
    }
    be->attention_forward(s->a, NULL, s->q, k, v, batch->q_start, batch->kv_start, batch->kv_len, batch->b, m->hq, m->hkv,
                          m->d, 1.0f / sqrtf((float)m->d));
}

/* After the last attention no token sees another: goes on with the kept ones only. */
static void keep_rows(const ql_llama *m, const ql_llama_batch *batch, buffers *s, const ql_backend *be) {
    float *x = s->h, *a = s->q;
    be->gather_rows_forward(x, s->x, batch->kept, batch->count, m->c);
    be->gather_rows_forward(a, s->a, batch->kept, batch->count, m->hq * m->d);
    s->h = s->x, s->x = x, s->a = a;
    s->t = batch->count, s->m = ql_product_rows(batch->count, be);
}

static void mlp_block(const ql_llama *m, const ql_llama_layer *layer, const buffers *s, const ql_backend *be) {
    add_product(s->x, s->a, layer, QL_SLOT_O, s, be);
    be->rmsnorm_forward(s->h, NULL, s->x, layer->post_norm, s->t, m->c, m->eps);
    products((float *[]){s->gate, s->up}, s->h, layer, QL_SLOT_GATE, 2, s, be);
    be->swiglu_forward(s->gate, s->gate, s->up, s->t * m->f);
    add_product(s->x, s->gate, layer, QL_SLOT_DOWN, s, be);
}

/* norm: of x ahead of the layer, and then of x behind it, whose gain is `next` (NULL: not to be prepared) */
static void fused_layer(const ql_llama *m, const ql_llama_layer *layer, const ql_llama_batch *batch, const buffers *s,
                        void *cache_k, void *cache_v, ql_norm *norm, const float *next, const ql_backend *be) {
    int64_t t = batch->t;
    const ql_weight *const *w = layer->matrix;
    ql_low_rank low[QL_SLOTS];
    for (int slot = 0; slot < QL_SLOTS; slot++) { low[slot] = ql_low_rank_of(layer->lora != NULL ? &layer->lora[slot] : NULL); }
    int o_ordered = be->takes_ordered(w[QL_SLOT_O], &low[QL_SLOT_O], t);
    int down_ordered = be->takes_ordered(w[QL_SLOT_DOWN], &low[QL_SLOT_DOWN], t);
    void *k = cache_k != NULL ? cache_k : s->k, *v = cache_v != NULL ? cache_v : s->v;
    be->qkv_forward(s->q, k, v, s->x, norm, w[QL_SLOT_Q], w[QL_SLOT_K], w[QL_SLOT_V], &low[QL_SLOT_Q],
                    batch->cos, batch->sin, batch->positions, cache_k != NULL ? batch->rows : NULL, t, m->hq, m->hkv, m->d);
    be->attention_fused_forward(s->a, NULL, s->q, k, v, batch->q_start, batch->kv_start, batch->kv_len, t, batch->b, m->hq, m->hkv,
                                m->d, batch->max_queries, batch->max_keys, 1.0f / sqrtf((float)m->d), o_ordered);
    norm->gain = layer->post_norm;
    be->linear_residual_forward(s->x, s->a, w[QL_SLOT_O], &low[QL_SLOT_O], norm, t, o_ordered);
    be->gate_up_forward(s->gate, s->x, norm, w[QL_SLOT_GATE], w[QL_SLOT_UP], &low[QL_SLOT_GATE], t, down_ordered);
    norm->gain = next;
    be->linear_residual_forward(s->x, s->gate, w[QL_SLOT_DOWN], &low[QL_SLOT_DOWN], next != NULL ? norm : NULL, t, down_ordered);
}

ql_status ql_llama_forward(float *hidden, const ql_llama *m, const ql_llama_batch *batch, const ql_kv_cache *cache,
                           float *workspace, const ql_backend *be) {
    int fused = ql_llama_fused(be);
    ql_workspace memory = {workspace, 0};
    /* with a cache a row may depend on the rows beside it */
    buffers s = cut(m, fused || cache != NULL ? batch->t : ql_product_rows(batch->t, be), &memory);
    s.t = batch->t;
    int64_t layer_bytes = cache != NULL ? cache->rows * m->hkv * m->d * ql_llama_kv_bytes(be) : 0;
    ql_norm norm = {m->layers > 0 ? m->layer[0].input_norm : NULL, m->eps, s.h, 0};
    be->embedding_forward(s.x, batch->ids, m->embed, batch->t);
    for (int64_t i = 0; i < m->layers; i++) {
        void *cache_k = cache != NULL ? (char *)cache->k + i * layer_bytes : NULL;
        void *cache_v = cache != NULL ? (char *)cache->v + i * layer_bytes : NULL;
        if (fused) {
            fused_layer(m, &m->layer[i], batch, &s, cache_k, cache_v, &norm, i + 1 < m->layers ? m->layer[i + 1].input_norm : NULL, be);
        } else {
            attention_block(m, &m->layer[i], batch, &s, cache_k, cache_v, be);
            if (batch->kept != NULL && i + 1 == m->layers) { keep_rows(m, batch, &s, be); }
            mlp_block(m, &m->layer[i], &s, be);
        }
        if (ql_call_stopped()) { return ql_fail(QL_EINTERRUPT, "stopped"); }
    }
    be->rmsnorm_forward(hidden, NULL, s.x, m->norm, s.t, m->c, m->eps);
    return QL_OK;
}
