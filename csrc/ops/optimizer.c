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
    double factor; /* that cuts g to the largest norm */
} adamw_context;

static void adamw_task(void *context, int64_t task) {
    const adamw_context *c = context;
    const ql_adamw_step *s = c->s;
    int64_t end = (task + 1) * COUNT_PER_TASK < c->count ? (task + 1) * COUNT_PER_TASK : c->count;
    float factor = (float)c->factor, beta1 = (float)s->beta1, beta2 = (float)s->beta2, eps = (float)s->eps;
    float new1 = (float)(1.0 - s->beta1), new2 = (float)(1.0 - s->beta2), root2 = (float)sqrt(s->correction2);
    float rate = (float)(s->lr / s->correction1), keep = (float)(1.0 - s->lr * s->weight_decay);
    for (int64_t i = task * COUNT_PER_TASK; i < end; i++) {
        float g = c->g[i] * factor;
        c->m[i] = beta1 * c->m[i] + new1 * g;
        c->v[i] = beta2 * c->v[i] + new2 * g * g;
        c->w[i] = c->w[i] * keep - rate * c->m[i] / (sqrtf(c->v[i]) / root2 + eps);
    }
}

void ql_adamw_forward_scalar(float *w, float *m, float *v, const float *g, const double *squares, int64_t count,
                             const ql_adamw_step *s) {
    if (!isfinite(*squares)) { return; }
    double norm = sqrt(*squares);
    double factor = s->max_norm > 0.0 && norm > s->max_norm ? s->max_norm / norm : 1.0;
    adamw_context context = {w, m, v, g, count, s, factor};
    ql_parallel_for((count + COUNT_PER_TASK - 1) / COUNT_PER_TASK, adamw_task, &context);
}
