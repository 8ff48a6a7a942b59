/* llama.h: a LLaMA model as pointers to weights, and a packed batch of ragged sequences. */
#ifndef QL_LLAMA_H
#define QL_LLAMA_H

#include "../quantlab.h"

typedef struct {
    const float *input_norm, *post_norm; /* (c,) */
    const ql_weight *q, *k, *v, *o;      /* (hq d, c) (hkv d, c) (hkv d, c) (c, hq d) */
    const ql_weight *gate, *up, *down;   /* (f, c) (f, c) (c, f) */
} ql_llama_layer;

typedef struct {
    int64_t layers, c, f, hq, hkv, d;
    float eps;
    const ql_weight *embed; /* (vocabulary, c) */
    const float *norm;      /* (c,) */
    const ql_llama_layer *layer;
} ql_llama;

/* t tokens of b sequences, one after the other, no padding */
typedef struct {
    const int32_t *ids, *positions; /* (t,) */
    const int64_t *q_start;         /* (b + 1,) first token of each sequence */
    const int64_t *kv_start;        /* (b,) first row of its keys: in the cache, or, without one, its first token */
    const int64_t *kv_len;          /* (b,) keys that its last token sees, itself included */
    const float *cos, *sin;         /* (positions, d / 2) */
    int64_t t, b;
} ql_llama_batch;

/* keys and values of every layer */
typedef struct {
    float *k, *v; /* (layers, rows, hkv, d) */
    int64_t rows;
} ql_kv_cache;

/* floats of workspace, zero at first, that a forward pass over t tokens needs */
int64_t ql_llama_workspace(const ql_llama *model, int64_t t);

/* hidden (t, c): the last hidden states after the final norm. cache NULL: attend within the batch only.
 * QL_EINTERRUPT where the user stopped it. */
ql_status ql_llama_forward(float *hidden, const ql_llama *model, const ql_llama_batch *batch, const ql_kv_cache *cache,
                           float *workspace, const ql_backend *backend);

#endif
