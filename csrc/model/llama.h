/* llama.h: a LLaMA model as pointers to weights, and a packed batch of ragged sequences. */
#ifndef QL_LLAMA_H
#define QL_LLAMA_H

#include "lora.h"

/* the matrices of a layer: (hq d, c) (hkv d, c) (hkv d, c) (c, hq d) (f, c) (f, c) (c, f) */
enum { QL_SLOT_Q, QL_SLOT_K, QL_SLOT_V, QL_SLOT_O, QL_SLOT_GATE, QL_SLOT_UP, QL_SLOT_DOWN, QL_SLOTS };

typedef struct {
    const float *input_norm, *post_norm; /* (c,) */
    const ql_weight *matrix[QL_SLOTS];
    const ql_lora *lora; /* (QL_SLOTS,), or NULL: the layer has no adapter */
} ql_llama_layer;

typedef struct {
    int64_t layers, c, f, hq, hkv, d;
    float eps;
    const ql_weight *embed; /* (vocabulary, c) */
    const float *norm;      /* (c,) */
    const ql_llama_layer *layer;
    int64_t rank; /* the largest of its adapters; 0: it has none */
} ql_llama;

/* t tokens of b sequences, one after the other, no padding; arrays are the backend's */
typedef struct {
    const int32_t *ids, *positions; /* (t,) */
    const int32_t *rows;            /* (t,) row of the keys and values that each token adds */
    const int64_t *q_start;         /* (b + 1,) first token of each sequence */
    const int64_t *kv_start;        /* (b,) first row of its keys: in the cache, or, without one, its first token */
    const int64_t *kv_len;          /* (b,) keys that its last token sees, itself included */
    const float *cos, *sin;         /* (positions, d / 2) */
    int64_t t, b;
    int64_t max_queries, max_keys; /* at least the most tokens and the most keys of a sequence */
    const int32_t *kept; /* (count,) the tokens whose hidden states are wanted; NULL: all. Not with a cache or fused ops */
    int64_t count;
} ql_llama_batch;

/* keys and values of every layer, in elements of ql_llama_kv_bytes */
typedef struct {
    void *k, *v; /* (layers, rows, hkv, d) */
    int64_t rows;
} ql_kv_cache;

/* A backend with all the fused ops runs them, on keys and values in its own type; those of training likewise. */
int ql_llama_fused(const ql_backend *backend);
int ql_training_fused(const ql_backend *backend);
/* bytes of an element of the key-value cache: float32, or of the backend's own type where the pass is fused */
int64_t ql_llama_kv_bytes(const ql_backend *backend);

/* Products with few rows add in an order of their own, and what is packed may decide it. Where a row's result must not depend on the
 * rows beside it, a product of t rows has so many: what nothing reads fills it up. */
static inline int64_t ql_product_rows(int64_t t, const ql_backend *backend) {
    return t > backend->gemv_rows ? t : backend->gemv_rows + 1;
}

/* floats of workspace that a forward pass over t tokens needs, zero at first where t <= the backend's gemv_rows */
int64_t ql_llama_workspace(const ql_llama *model, int64_t t, const ql_backend *backend);

/* rows (t,) of a batch, from its q_start, kv_start and kv_len: the keys of a sequence end with those of this batch. All
 * of the host. */
void ql_llama_rows(int32_t *rows, const ql_llama_batch *batch);

/* hidden (t or count, c): the last hidden states after the final norm. cache NULL: attend within the batch only. Neither allocates
 * nor waits for a device. QL_EINTERRUPT where the user stopped it. */
ql_status ql_llama_forward(float *hidden, const ql_llama *model, const ql_llama_batch *batch, const ql_kv_cache *cache,
                           float *workspace, const ql_backend *backend);

/* y (t, n) = x (t, k) times matrix `slot` of a layer and its adapter, or += where accumulate is set; u as ql_lora_forward's */
void ql_llama_product(float *y, float *u, const float *x, const ql_llama_layer *layer, int slot, const ql_lora_dropout *dropout,
                      int64_t t, int accumulate, const ql_backend *backend);

/* ---- training: the gradient of an adapter, whole sequences, no cache; arrays are the backend's (llama_backward.c) --- */

/* what the backward pass computes again: nothing; norms and SwiGLU; all of a layer but its input */
typedef enum { QL_RECOMPUTE_NONE, QL_RECOMPUTE_SELECTIVE, QL_RECOMPUTE_FULL } ql_recompute;

typedef struct {
    const ql_llama *model;
    ql_llama_batch batch;   /* without rows */
    int64_t positions;      /* rows of its cos and sin */
    const int32_t *kept;    /* (count,) tokens whose losses count */
    const int32_t *targets; /* (count,) */
    int64_t count;
    const ql_weight *head; /* (classes, c) */
    float *head_gradient;  /* (classes, c) or NULL: it is frozen */
    float *gradients;      /* of all adapters, where their ql_lora says */
    float factor;          /* of the losses' sum: what is differentiated */
    float dropout;         /* share of each adapter's inputs */
    uint64_t seed;
    int64_t call; /* number of the pass, for its dropout */
    ql_recompute recompute;
} ql_llama_training;

/* floats of workspace; model, batch.t, positions, count, head, dropout and recompute count */
int64_t ql_llama_training_workspace(const ql_llama_training *call, const ql_backend *backend);

/* losses (count,) of the kept tokens; their gradient is added to gradients and head_gradient. The same bits for each
 * ql_recompute. QL_EINTERRUPT where the user stopped it: then a part of it was added. */
ql_status ql_llama_accumulate(float *losses, const ql_llama_training *call, float *workspace, const ql_backend *backend);

/* ---- generation: b sequences, a token each at a time; arrays are the backend's (llama_step.c) ------------------- */

typedef struct {
    const ql_llama *model;
    const ql_weight *head; /* (vocabulary, c) */
    ql_llama_batch batch;  /* t == b: ids, positions, rows and kv_len are those below */
    ql_kv_cache cache;
    int32_t *ids, *positions, *rows; /* (b,) of the next step */
    int64_t *kv_len;                 /* (b,) */
    const int32_t *streams;          /* (b,) number of each sequence, for its random numbers */
    int64_t *step;                   /* (1,) steps done */
    int32_t *tokens;                 /* (b,) chosen last */
    int32_t *history;                /* (steps, b) all that were chosen */
    float *hidden, *logits;          /* (b, c) (b, vocabulary) */
    float *workspace;
    float temperature, top_p; /* temperature 0: the likeliest token */
    int64_t top_k;
    uint64_t seed;
} ql_llama_generation;

/* Chooses the next tokens from g->hidden, and moves all counters on. */
void ql_llama_choose(const ql_llama_generation *g, const ql_backend *backend);
/* The forward pass of g->ids, and the choice after it. Depends on nothing of the host: a backend may record and replay it. */
ql_status ql_llama_step(const ql_llama_generation *g, const ql_backend *backend);

#endif
