/* gram.c: h += a^T b, the Hessian of GPTQ (a == b, lower) and the cross moments of its drift correction. */
#include "../quantlab.h"

enum { COLUMNS = 64 };

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
    for (int64_t j0 = 0; j0 < end; j0 += COLUMNS) { /* by blocks, so that b is read along its rows */
        float sums[COLUMNS] = {0.0f};
        int64_t columns = end - j0 < COLUMNS ? end - j0 : COLUMNS;
        for (int64_t s = 0; s < c->t; s++) {
            float a = c->a[s * c->ka + i];
            for (int64_t j = 0; j < columns; j++) { sums[j] += a * c->b[s * c->kb + j0 + j]; }
        }
        for (int64_t j = 0; j < columns; j++) { c->h[i * c->kb + j0 + j] += sums[j]; }
    }
}

void ql_gram_forward_scalar(float *h, const float *a, const float *b, int64_t t, int64_t ka, int64_t kb, int lower) {
    gram_context context = {h, a, b, t, ka, kb, lower};
    ql_parallel_for(ka, gram_row, &context);
}
