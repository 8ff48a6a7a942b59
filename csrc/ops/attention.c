/* attention.c: causal attention with grouped queries over ragged sequences, one pass over the keys with a running
 * maximum (Milakov and Gimelshein 2018), so no row of scores is kept. One task is one query token and head. */
#include "../quantlab.h"

#include <math.h> /* expf, logf, INFINITY */

typedef struct {
    float *out, *lse;
    const float *q, *k, *v;
    const int64_t *q_start, *kv_start, *kv_len;
    int64_t b, hq, hkv, d;
    float scale;
} attention_context;

static void attend(const attention_context *c, int64_t query, int64_t head, int64_t kv_first, int64_t keys) {
    const float *q = c->q + (query * c->hq + head) * c->d;
    float *out = c->out + (query * c->hq + head) * c->d;
    int64_t kv_head = head / (c->hq / c->hkv);
    float maximum = -INFINITY, sum = 0.0f;
    for (int64_t i = 0; i < c->d; i++) { out[i] = 0.0f; }
    for (int64_t s = 0; s < keys; s++) {
        const float *k = c->k + ((kv_first + s) * c->hkv + kv_head) * c->d;
        const float *v = c->v + ((kv_first + s) * c->hkv + kv_head) * c->d;
        float score = 0.0f;
        for (int64_t i = 0; i < c->d; i++) { score += q[i] * k[i]; }
        score *= c->scale;
        float new_maximum = score > maximum ? score : maximum;
        float keep = expf(maximum - new_maximum), weight = expf(score - new_maximum);
        sum = sum * keep + weight;
        for (int64_t i = 0; i < c->d; i++) { out[i] = out[i] * keep + weight * v[i]; }
        maximum = new_maximum;
    }
    for (int64_t i = 0; i < c->d; i++) { out[i] /= sum; }
    if (c->lse != NULL) { c->lse[query * c->hq + head] = maximum + logf(sum); }
}

static void attend_sequence_head(void *context, int64_t task) {
    const attention_context *c = context;
    int64_t sequence = task / c->hq, head = task % c->hq;
    int64_t first = c->q_start[sequence], queries = c->q_start[sequence + 1] - first;
    int64_t before = c->kv_len[sequence] - queries; /* keys that every query of this call sees */
    for (int64_t s = 0; s < queries; s++) { attend(c, first + s, head, c->kv_start[sequence], before + s + 1); }
}

void ql_attention_forward_scalar(float *out, float *lse, const float *q, const float *k, const float *v,
                                 const int64_t *q_start, const int64_t *kv_start, const int64_t *kv_len, int64_t b,
                                 int64_t hq, int64_t hkv, int64_t d, float scale) {
    attention_context context = {out, lse, q, k, v, q_start, kv_start, kv_len, b, hq, hkv, d, scale};
    ql_parallel_for(b * hq, attend_sequence_head, &context);
}
