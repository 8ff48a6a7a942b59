/* gram.c: h += a^T b, the Hessian of GPTQ (a == b, lower) and the cross moments of its drift correction. */
#include "../quantlab.h"

typedef struct {
    float *h;       /* (ka, kb) */
    const float *a; /* (t, ka) */
    const float *b; /* (t, kb) */
    int64_t t, ka, kb;
    int lower;
} gram_context;

static void gram_row(void *context, int64_t i) {
    const gram_context *c = context;
    int64_t end = c->lower ? i + 1 : c->kb;
    for (int64_t j = 0; j < end; j++) {
        float sum = 0.0f;
        for (int64_t s = 0; s < c->t; s++) { sum += c->a[s * c->ka + i] * c->b[s * c->kb + j]; }
        c->h[i * c->kb + j] += sum;
    }
}

void ql_gram_forward_scalar(float *h, const float *a, const float *b, int64_t t, int64_t ka, int64_t kb, int lower) {
    gram_context context = {h, a, b, t, ka, kb, lower};
    ql_parallel_for(ka, gram_row, &context);
}
