/* training_pass.h: a pass of training as llama_backward.c lays it out, and the layers of a backend that has fused ops for them
 * (llama_backward_fused.c). `void *` is an activation: float32, or in the backend's own type where the pass is fused. */
#ifndef QL_TRAINING_PASS_H
#define QL_TRAINING_PASS_H

#include "llama.h"

/* what a layer's backward pass reads */
typedef struct {
    float *x;                  /* (t, c) the layer's input */
    void *q, *k, *v;           /* (t, hq d) (t, hkv d) (t, hkv d), rotated */
    void *a;                   /* (t, hq d) attention */
    float *lse;                /* (t, hq) */
    float *x2;                 /* (t, c) residual stream between the blocks */
    void *gate, *up;           /* (t, f); gradients take their place */
    float *inv_rms, *inv_rms2; /* (t,) */
    float *u[QL_SLOTS];        /* (t, rank) of the adapters */
    void *h, *h2, *act;        /* (t, c) (t, c) (t, f) inputs of q k v, of gate up, of down: remade where they are not kept */
} ql_activations_kept;

typedef struct {
    const ql_llama_training *call;
    const ql_llama *m;
    const ql_backend *be;
    int fused;                  /* by the fused ops of the backend */
    int64_t t;
    int64_t first;              /* layers before it have no adapter: no backward pass */
    int adapted[QL_SLOTS];      /* whether any layer has an adapter there */
    float *layers, *shared;     /* activations of each layer from `first` on, and those that use the same memory */
    int64_t layer_floats;
    float *last;                /* (t, c) residual stream after the last layer */
    float *minus_sin;           /* (positions, d / 2) */
    float *dx, *dh;             /* (t, c) gradients of the residual stream, of a block's normed input */
    void *dx_own;               /* (t, c) dx in the backend's type, where the pass is fused */
    void *dact;                 /* (t, f), of ql_dact */
    void *da, *dq, *dk, *dv;    /* (t, hq d) (t, hq d) (t, hkv d) (t, hkv d) */
    float *du;                  /* (t, rank) */
    float *dropped;             /* (t, widest input of an adapter), with dropout, where the pass is not fused */
    float *rows, *hidden, *inv; /* (chunk, c) (chunk, c) (chunk,) of the kept tokens, ql_product_rows of them */
    float *logits;              /* (chunk, classes) */
} ql_training_pass;

static inline int ql_has_adapter(const ql_llama_layer *layer, int slot) { return layer->lora != NULL && layer->lora[slot].r > 0; }

/* Masks are numbered, so that the way back draws those of the forward pass again. */
static inline int64_t ql_mask_stream(const ql_training_pass *p, int64_t i, int slot) {
    return (p->call->call * p->m->layers + i) * QL_SLOTS + slot;
}

/* the gradient of the down product's input takes its place where nothing reads that */
static inline void *ql_dact(const ql_training_pass *p, const ql_activations_kept *s) {
    return p->adapted[QL_SLOT_DOWN] ? p->dact : s->act;
}

/* The layer i up to the input of its down product, and on to out (t, c), the next one's input, where it is not NULL. out may be x. */
void ql_fused_layer_forward(const ql_training_pass *p, int64_t i, const ql_activations_kept *s, float *out);
/* the inputs of adapted matrices, from norms and SwiGLU */
void ql_fused_inputs(const ql_training_pass *p, int64_t i, const ql_activations_kept *s);
/* from dx and dx_own of the layer's output to those of its input; the gradients of its adapters */
void ql_fused_layer_backward(const ql_training_pass *p, int64_t i, const ql_activations_kept *s);

#endif
