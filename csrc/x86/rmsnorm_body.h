/* rmsnorm_body.h: RMSNorm and its gradient by vectors. A row is summed in float64 in a fixed order, so it never depends on its batch. */
#include "../quantlab.h"

#include <math.h> /* sqrtf */

enum { ELEMENTS_PER_TASK = 16384 };

typedef struct {
    float *out, *inv_rms;
    const float *x, *gain;
    int64_t t, c, rows_per_task;
    float eps;
} rmsnorm_context;

static float inverse_rms(const float *x, int64_t c, float eps) {
    vd sums[4] = {vd_zero(), vd_zero(), vd_zero(), vd_zero()};
    int64_t i = 0;
    for (; i + 2 * VL <= c; i += 2 * VL) {
        vf a = v_load(x + i), b = v_load(x + i + VL);
        sums[0] = vd_fma(vd_low(a), vd_low(a), sums[0]);
        sums[1] = vd_fma(vd_high(a), vd_high(a), sums[1]);
        sums[2] = vd_fma(vd_low(b), vd_low(b), sums[2]);
        sums[3] = vd_fma(vd_high(b), vd_high(b), sums[3]);
    }
    for (; i < c; i += VL) {
        vf a = v_load_tail(x + i, c - i < VL ? c - i : VL);
        sums[0] = vd_fma(vd_low(a), vd_low(a), sums[0]);
        sums[1] = vd_fma(vd_high(a), vd_high(a), sums[1]);
    }
    double sum = vd_sum(vd_add(vd_add(sums[0], sums[1]), vd_add(sums[2], sums[3])));
    return 1.0f / sqrtf((float)(sum / (double)c) + eps);
}

static void rmsnorm_rows(void *context, int64_t task) {
    const rmsnorm_context *r = context;
    int64_t first = task * r->rows_per_task, last = first + r->rows_per_task < r->t ? first + r->rows_per_task : r->t;
    for (int64_t row = first; row < last; row++) {
        const float *x = r->x + row * r->c;
        float *out = r->out + row * r->c, inv = inverse_rms(x, r->c, r->eps);
        vf scale = v_set1(inv);
        int64_t i = 0;
        for (; i + VL <= r->c; i += VL) { v_store(out + i, v_mul(v_mul(v_load(x + i), scale), v_load(r->gain + i))); }
        if (i < r->c) {
            vf y = v_mul(v_mul(v_load_tail(x + i, r->c - i), scale), v_load_tail(r->gain + i, r->c - i));
            v_store_tail(out + i, y, r->c - i);
        }
        if (r->inv_rms != NULL) { r->inv_rms[row] = inv; }
    }
}

static int64_t rows_per_task(int64_t c) { return c < ELEMENTS_PER_TASK ? ELEMENTS_PER_TASK / (c + 1) + 1 : 1; }

void V_NAME(rmsnorm_forward)(float *out, float *inv_rms, const float *x, const float *gain, int64_t t, int64_t c, float eps) {
    int64_t rows = rows_per_task(c);
    rmsnorm_context context = {out, inv_rms, x, gain, t, c, rows, eps};
    ql_parallel_for((t + rows - 1) / rows, rmsnorm_rows, &context);
}

/* ---- the gradient ------------------------------------------------------------------------------------------------ */

typedef struct {
    float *dx;
    const float *dy, *x, *gain, *inv_rms;
    int64_t t, c, rows_per_task;
    int accumulate;
} gradient_context;

/* sum of dy gain x */
static double triple_sum(const float *dy, const float *gain, const float *x, int64_t c) {
    vd low = vd_zero(), high = vd_zero();
    for (int64_t i = 0; i < c; i += VL) {
        int64_t count = c - i < VL ? c - i : VL;
        vf a = v_load_tail(dy + i, count), b = v_load_tail(gain + i, count), n = v_load_tail(x + i, count);
        low = vd_fma(vd_fma(vd_low(a), vd_low(b), vd_zero()), vd_low(n), low);
        high = vd_fma(vd_fma(vd_high(a), vd_high(b), vd_zero()), vd_high(n), high);
    }
    return vd_sum(vd_add(low, high));
}

/* with n = x inv_rms: dx = inv_rms (dy gain - n mean(dy gain n)) */
static void gradient_rows(void *context, int64_t task) {
    const gradient_context *r = context;
    int64_t first = task * r->rows_per_task, last = first + r->rows_per_task < r->t ? first + r->rows_per_task : r->t;
    for (int64_t row = first; row < last; row++) {
        const float *x = r->x + row * r->c, *dy = r->dy + row * r->c;
        float *dx = r->dx + row * r->c, inv = r->inv_rms[row];
        vf along = v_set1((float)(triple_sum(dy, r->gain, x, r->c) / (double)r->c) * inv * inv), scale = v_set1(inv);
        for (int64_t i = 0; i < r->c; i += VL) {
            int64_t count = r->c - i < VL ? r->c - i : VL;
            vf slope = v_mul(v_load_tail(dy + i, count), v_load_tail(r->gain + i, count));
            vf d = v_mul(scale, v_fnma(v_load_tail(x + i, count), along, slope));
            v_store_tail(dx + i, r->accumulate ? v_add(v_load_tail(dx + i, count), d) : d, count);
        }
    }
}

void V_NAME(rmsnorm_backward)(float *dx, const float *dy, const float *x, const float *gain, const float *inv_rms, int64_t t,
                              int64_t c, int accumulate) {
    int64_t rows = rows_per_task(c);
    gradient_context context = {dx, dy, x, gain, inv_rms, t, c, rows, accumulate};
    ql_parallel_for((t + rows - 1) / rows, gradient_rows, &context);
}
