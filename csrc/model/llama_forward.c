/* llama_forward.c: the LLaMA forward pass (Touvron et al. 2023) over the table of ops; it names no backend. */
#include "../formats/packed.h" /* QL_GEMV_ROWS */
#include "llama.h"

#include <math.h> /* sqrtf */

enum { ALIGNMENT = 64 }; /* floats: each buffer begins on a cache line of any backend */

/* what a pass holds beside its output, cut from the workspace; but for x and h in the backend's own type where it is fused */
typedef struct {
    float *x;         /* (t, c) residual stream */
    float *h;         /* (t, c) normed input of a block */
    float *q, *k, *v; /* (t, hq d) (t, hkv d) (t, hkv d) */
    float *a;         /* (t, hq d) attention output */
    float *gate, *up; /* (t, f) */
    int64_t m;        /* rows of the products, t or more */
} buffers;

/* Rows of a pass' products. Products with few rows add in an order of their own; without a cache a row's result must not
 * depend on the rows beside it, so there a pass is never that small: rows of zeros fill it up. */
static int64_t product_rows(int64_t t, int cached) { return cached || t > QL_GEMV_ROWS ? t : QL_GEMV_ROWS + 1; }

static float *take(float **rest, int64_t count) {
    float *part = *rest;
    *rest += (count + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return part;
}

static buffers cut(const ql_llama *m, int64_t t, float **rest) {
    buffers s;
    s.m = t;
    s.x = take(rest, t * m->c);
    s.h = take(rest, t * m->c);
    s.q = take(rest, t * m->hq * m->d);
    s.k = take(rest, t * m->hkv * m->d);
    s.v = take(rest, t * m->hkv * m->d);
    s.a = take(rest, t * m->hq * m->d);
    s.gate = take(rest, t * m->f);
    s.up = take(rest, t * m->f);
    return s;
}

int64_t ql_llama_workspace(const ql_llama *m, int64_t t) {
    t = product_rows(t, 0);
    return t * (2 * m->c + 2 * m->hq * m->d + 2 * m->hkv * m->d + 2 * m->f) + 8 * ALIGNMENT;
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

static void linear(const ql_backend *be, float *y, const float *x, const ql_weight *w, int64_t m, int accumulate) {
    be->linear_forward[w->format](y, x, w, m, accumulate);
}

static void attention_block(const ql_llama *m, const ql_llama_layer *layer, const ql_llama_batch *batch, const buffers *s,
                            void *cache_k, void *cache_v, const ql_backend *be) {
    int64_t t = batch->t;
    be->rmsnorm_forward(s->h, NULL, s->x, layer->input_norm, t, m->c, m->eps);
    linear(be, s->q, s->h, layer->q, s->m, 0);
    linear(be, s->k, s->h, layer->k, s->m, 0);
    linear(be, s->v, s->h, layer->v, s->m, 0);
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
    linear(be, s->x, s->a, layer->o, s->m, 1);
}

static void mlp_block(const ql_llama *m, const ql_llama_layer *layer, int64_t t, const buffers *s, const ql_backend *be) {
    be->rmsnorm_forward(s->h, NULL, s->x, layer->post_norm, t, m->c, m->eps);
    linear(be, s->gate, s->h, layer->gate, s->m, 0);
    linear(be, s->up, s->h, layer->up, s->m, 0);
    be->swiglu_forward(s->gate, s->gate, s->up, t * m->f);
    linear(be, s->x, s->gate, layer->down, s->m, 1);
}

static void fused_layer(const ql_llama *m, const ql_llama_layer *layer, const ql_llama_batch *batch, const buffers *s,
                        void *cache_k, void *cache_v, const ql_backend *be) {
    int64_t t = batch->t;
    void *k = cache_k != NULL ? cache_k : s->k, *v = cache_v != NULL ? cache_v : s->v;
    be->qkv_forward(s->q, k, v, s->x, layer->input_norm, layer->q, layer->k, layer->v, batch->cos, batch->sin,
                    batch->positions, cache_k != NULL ? batch->rows : NULL, t, m->hq, m->hkv, m->d, m->eps);
    be->attention_fused_forward(s->a, s->q, k, v, batch->q_start, batch->kv_start, batch->kv_len, t, batch->b, m->hq, m->hkv,
                                m->d, batch->max_queries, batch->max_keys, 1.0f / sqrtf((float)m->d));
    be->linear_residual_forward(s->x, s->a, layer->o, t);
    be->gate_up_forward(s->gate, s->x, layer->post_norm, layer->gate, layer->up, t, m->eps);
    be->linear_residual_forward(s->x, s->gate, layer->down, t);
}

ql_status ql_llama_forward(float *hidden, const ql_llama *m, const ql_llama_batch *batch, const ql_kv_cache *cache,
                           float *workspace, const ql_backend *be) {
    int fused = ql_llama_fused(be);
    buffers s = cut(m, fused ? batch->t : product_rows(batch->t, cache != NULL), &workspace);
    int64_t layer_bytes = cache != NULL ? cache->rows * m->hkv * m->d * be->kv_bytes : 0;
    be->embedding_forward(s.x, batch->ids, m->embed, batch->t);
    for (int64_t i = 0; i < m->layers; i++) {
        void *cache_k = cache != NULL ? (char *)cache->k + i * layer_bytes : NULL;
        void *cache_v = cache != NULL ? (char *)cache->v + i * layer_bytes : NULL;
        if (fused) {
            fused_layer(m, &m->layer[i], batch, &s, cache_k, cache_v, be);
        } else {
            attention_block(m, &m->layer[i], batch, &s, cache_k, cache_v, be);
            mlp_block(m, &m->layer[i], batch->t, &s, be);
        }
        if (ql_call_stopped()) { return ql_fail(QL_EINTERRUPT, "stopped"); }
    }
    be->rmsnorm_forward(hidden, NULL, s.x, m->norm, batch->t, m->c, m->eps);
    return QL_OK;
}
