/* cross_entropy.c: softmax cross-entropy of integer targets; -100 marks a row that does not count. Sums in float64. */
#include "../quantlab.h"

#include <math.h> /* expf, log */

enum { IGNORED = -100 };

typedef struct {
    float *loss, *dlogits;
    const float *logits;
    const int32_t *targets;
    int64_t v;
} cross_entropy_context;

static void cross_entropy_row(void *context, int64_t row) {
    const cross_entropy_context *c = context;
    const float *logits = c->logits + row * c->v;
    int32_t target = c->targets[row];
    float maximum = logits[0];
    double sum = 0.0;
    for (int64_t i = 1; i < c->v; i++) { maximum = logits[i] > maximum ? logits[i] : maximum; }
    for (int64_t i = 0; i < c->v; i++) { sum += (double)expf(logits[i] - maximum); }
    c->loss[row] = target == IGNORED ? 0.0f : (float)(log(sum) - ((double)logits[target] - maximum));
    if (c->dlogits == NULL) { return; }
    float *dlogits = c->dlogits + row * c->v;
    for (int64_t i = 0; i < c->v; i++) {
        float p = (float)((double)expf(logits[i] - maximum) / sum);
        dlogits[i] = target == IGNORED ? 0.0f : p - (i == target ? 1.0f : 0.0f);
    }
}

void ql_cross_entropy_forward_scalar(float *loss, float *dlogits, const float *logits, const int32_t *targets, int64_t t,
                                     int64_t v) {
    cross_entropy_context context = {loss, dlogits, logits, targets, v};
    ql_parallel_for(t, cross_entropy_row, &context);
}
