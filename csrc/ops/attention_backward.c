/* attention_backward.c: gradients of causal attention (Dao 2023): the weights are made again from the scores and their
 * log-sum-exp, so no row of them is kept. One task is a sequence and key-value head: all that adds to its dk and dv. */
#include "../quantlab.h"

#include <math.h>   /* expf */
#include <string.h> /* memset */

typedef struct {
    float *dq, *dk, *dv;
    const float *dout, *q, *k, *v, *out, *lse;
    const int64_t *q_start, *kv_start, *kv_len;
    int64_t hq, hkv, d;
    float scale;
} attention_context;

static float dot(const float *a, const float *b, int64_t d) {
    float sum = 0.0f;
    for (int64_t i = 0; i < d; i++) { sum += a[i] * b[i]; }
    return sum;
}

static void add_scaled(float *y, float factor, const float *x, int64_t d) {
    for (int64_t i = 0; i < d; i++) { y[i] += factor * x[i]; }
}

/* one query of one head, which sees `keys` keys from row kv_first on */
static void query_backward(const attention_context *c, int64_t query, int64_t head, int64_t kv_head, int64_t kv_first,
                           int64_t keys) {
    int64_t at = (query * c->hq + head) * c->d;
    const float *q = c->q + at, *dout = c->dout + at;
    float delta = dot(dout, c->out + at, c->d), lse = c->lse[query * c->hq + head];
    memset(c->dq + at, 0, (size_t)c->d * sizeof *c->dq);
    for (int64_t s = 0; s < keys; s++) {
        int64_t row = ((kv_first + s) * c->hkv + kv_head) * c->d;
        float p = expf(dot(q, c->k + row, c->d) * c->scale - lse);
        float dscore = p * (dot(dout, c->v + row, c->d) - delta) * c->scale;
        add_scaled(c->dv + row, p, dout, c->d);
        add_scaled(c->dk + row, dscore, q, c->d);
        add_scaled(c->dq + at, dscore, c->k + row, c->d);
    }
}

static void sequence_head_backward(void *context, int64_t task) {
    const attention_context *c = context;
    int64_t sequence = task / c->hkv, kv_head = task % c->hkv, heads = c->hq / c->hkv;
    int64_t first = c->q_start[sequence], queries = c->q_start[sequence + 1] - first;
    int64_t kv_first = c->kv_start[sequence], before = c->kv_len[sequence] - queries;
    for (int64_t s = 0; s < c->kv_len[sequence]; s++) {
        int64_t row = ((kv_first + s) * c->hkv + kv_head) * c->d;
        memset(c->dk + row, 0, (size_t)c->d * sizeof *c->dk);
        memset(c->dv + row, 0, (size_t)c->d * sizeof *c->dv);
    }
    for (int64_t head = kv_head * heads; head < (kv_head + 1) * heads; head++) {
        for (int64_t s = 0; s < queries; s++) { query_backward(c, first + s, head, kv_head, kv_first, before + s + 1); }
    }
}

void ql_attention_backward_scalar(float *dq, float *dk, float *dv, const float *dout, const float *q, const float *k,
                                  const float *v, const float *out, const float *lse, const int64_t *q_start,
                                  const int64_t *kv_start, const int64_t *kv_len, int64_t b, int64_t hq, int64_t hkv, int64_t d,
                                  float scale) {
    attention_context context = {dq, dk, dv, dout, q, k, v, out, lse, q_start, kv_start, kv_len, hq, hkv, d, scale};
    ql_parallel_for(b * hkv, sequence_head_backward, &context);
}
