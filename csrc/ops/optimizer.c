/* optimizer.c: AdamW (Loshchilov and Hutter 2019) over one long vector of parameters, and the norm its gradients are cut
 * to (Pascanu et al. 2013). */
#include "../quantlab.h"

#include <math.h> /* sqrt, isfinite */

enum { COUNT_PER_TASK = 16384 };

void ql_square_sum_forward_scalar(double *sum, const float *x, int64_t count) {
    double total = 0.0; /* in one order, for any number of threads */
    for (int64_t i = 0; i < count; i++) { total += (double)x[i] * x[i]; }
    *sum = total;
}

typedef struct {
    float *w, *m, *v;
    const float *g;
    int64_t count;
    const ql_adamw_step *s;
    float factor; /* that cuts g to the largest norm */
} adamw_context;

static void adamw_task(void *context, int64_t task) {
    const adamw_context *c = context;
    const ql_adamw_step *s = c->s;
    int64_t end = (task + 1) * COUNT_PER_TASK < c->count ? (task + 1) * COUNT_PER_TASK : c->count;
    float root2 = sqrtf(s->correction2), rate = s->lr / s->correction1, keep = 1.0f - s->lr * s->weight_decay;
    for (int64_t i = task * COUNT_PER_TASK; i < end; i++) {
        float g = c->g[i] * c->factor;
        c->m[i] = s->beta1 * c->m[i] + (1.0f - s->beta1) * g;
        c->v[i] = s->beta2 * c->v[i] + (1.0f - s->beta2) * g * g;
        c->w[i] = c->w[i] * keep - rate * c->m[i] / (sqrtf(c->v[i]) / root2 + s->eps);
    }
}

void ql_adamw_forward_scalar(float *w, float *m, float *v, const float *g, const double *squares, int64_t count,
                             const ql_adamw_step *s) {
    if (!isfinite(*squares)) { return; }
    double norm = sqrt(*squares);
    double factor = s->max_norm > 0.0f && norm > s->max_norm ? s->max_norm / norm : 1.0;
    adamw_context context = {w, m, v, g, count, s, (float)factor};
    ql_parallel_for((count + COUNT_PER_TASK - 1) / COUNT_PER_TASK, adamw_task, &context);
}
