/* rmsnorm.c: root mean square layer normalization (Zhang and Sennrich 2019) and its gradient. Means are summed in float64. */
#include "../quantlab.h"

#include <math.h> /* sqrtf */

typedef struct {
    float *out, *inv_rms;
    const float *x, *gain;
    int64_t c;
    float eps;
} rmsnorm_context;

static void rmsnorm_row(void *context, int64_t row) {
    const rmsnorm_context *r = context;
    const float *x = r->x + row * r->c;
    double sum = 0.0;
    for (int64_t i = 0; i < r->c; i++) { sum += (double)x[i] * x[i]; }
    float inv = 1.0f / sqrtf((float)(sum / (double)r->c) + r->eps);
    for (int64_t i = 0; i < r->c; i++) { r->out[row * r->c + i] = x[i] * inv * r->gain[i]; }
    if (r->inv_rms != NULL) { r->inv_rms[row] = inv; }
}

void ql_rmsnorm_forward_scalar(float *out, float *inv_rms, const float *x, const float *gain, int64_t t, int64_t c,
                               float eps) {
    rmsnorm_context context = {out, inv_rms, x, gain, c, eps};
    ql_parallel_for(t, rmsnorm_row, &context);
}

typedef struct {
    float *dx;
    const float *dy, *x, *gain, *inv_rms;
    int64_t c;
    int accumulate;
} rmsnorm_backward_context;

/* with n = x inv_rms: dx = inv_rms (dy gain - n mean(dy gain n)) */
static void rmsnorm_backward_row(void *context, int64_t row) {
    const rmsnorm_backward_context *r = context;
    const float *x = r->x + row * r->c, *dy = r->dy + row * r->c;
    float *dx = r->dx + row * r->c, inv = r->inv_rms[row];
    double sum = 0.0;
    for (int64_t i = 0; i < r->c; i++) { sum += (double)dy[i] * r->gain[i] * x[i]; }
    float along = (float)(sum / (double)r->c) * inv * inv;
    for (int64_t i = 0; i < r->c; i++) {
        float d = inv * (dy[i] * r->gain[i] - x[i] * along);
        dx[i] = r->accumulate ? dx[i] + d : d;
    }
}

void ql_rmsnorm_backward_scalar(float *dx, const float *dy, const float *x, const float *gain, const float *inv_rms, int64_t t,
                                int64_t c, int accumulate) {
    rmsnorm_backward_context context = {dx, dy, x, gain, inv_rms, c, accumulate};
    ql_parallel_for(t, rmsnorm_backward_row, &context);
}
