/* cross_entropy_body.h: softmax cross-entropy by vectors: maximum, sum of exponentials in float64, gradient. */
#include "../quantlab.h"

#include <math.h> /* log, INFINITY */

enum { IGNORED = -100 };

typedef struct {
    float *loss, *dlogits;
    const float *logits;
    const int32_t *targets;
    int64_t v;
} cross_entropy_context;

static float row_maximum(const float *x, int64_t v) {
    vf maximum = v_set1(-INFINITY);
    int64_t i = 0;
    for (; i + VL <= v; i += VL) { maximum = v_max(maximum, v_load(x + i)); }
    float result = v_hmax(maximum);
    for (; i < v; i++) { result = x[i] > result ? x[i] : result; }
    return result;
}

static double row_sum(const float *x, float maximum, int64_t v) {
    vd low = vd_zero(), high = vd_zero();
    vf shift = v_set1(maximum);
    int64_t i = 0;
    for (; i + VL <= v; i += VL) {
        vf e = v_exp(v_sub(v_load(x + i), shift));
        low = vd_add(low, vd_low(e));
        high = vd_add(high, vd_high(e));
    }
    if (i < v) {
        vf e = v_exp(v_sub(v_load_tail(x + i, v - i), shift));
        e = v_select(vm_first(v - i), e, v_zero());
        low = vd_add(low, vd_low(e));
        high = vd_add(high, vd_high(e));
    }
    return vd_sum(vd_add(low, high));
}

static void row_gradient(float *out, const float *x, float maximum, float inverse_sum, int64_t v) {
    vf shift = v_set1(maximum), scale = v_set1(inverse_sum);
    int64_t i = 0;
    for (; i + VL <= v; i += VL) { v_store(out + i, v_mul(v_exp(v_sub(v_load(x + i), shift)), scale)); }
    if (i < v) { v_store_tail(out + i, v_mul(v_exp(v_sub(v_load_tail(x + i, v - i), shift)), scale), v - i); }
}

static void cross_entropy_row(void *context, int64_t row) {
    const cross_entropy_context *c = context;
    const float *x = c->logits + row * c->v;
    float *dlogits = c->dlogits == NULL ? NULL : c->dlogits + row * c->v;
    int32_t target = c->targets[row];
    if (target == IGNORED) {
        c->loss[row] = 0.0f;
        for (int64_t i = 0; dlogits != NULL && i < c->v; i++) { dlogits[i] = 0.0f; }
        return;
    }
    float maximum = row_maximum(x, c->v);
    double sum = row_sum(x, maximum, c->v);
    c->loss[row] = (float)(log(sum) - ((double)x[target] - maximum));
    if (dlogits == NULL) { return; }
    row_gradient(dlogits, x, maximum, (float)(1.0 / sum), c->v);
    dlogits[target] -= 1.0f;
}

void V_NAME(cross_entropy_forward)(float *loss, float *dlogits, const float *logits, const int32_t *targets, int64_t t,
                                   int64_t v) {
    cross_entropy_context context = {loss, dlogits, logits, targets, v};
    ql_parallel_for(t, cross_entropy_row, &context);
}
