/* gptq.c: the column loop of GPTQ on a tile of rows (quant/gptq.h), a column's rows contiguous: see quantlab.h. */
#include "../quantlab.h"

#include <math.h> /* powf, fabs */

enum { ROWS = QL_GPTQ_ROWS };

/* round(clamp(x, low, high)) to even: |x| < 2^51, so the sum has no bits left below 1 */
static double whole_steps(double x, double low, double high) {
    const double shift = 6755399441055744.0; /* 1.5 * 2^52 */
    double steps = x < low ? low : x;
    steps = steps > high ? high : steps;
    return (steps + shift) - shift;
}

void ql_gptq_panel_forward_scalar(double *z, const double *e, const double *a, int64_t depth, int64_t width, int64_t lda) {
    for (int64_t i = 0; i < depth; i++) {
        for (int64_t j = 0; j < width; j++) {
            for (int64_t r = 0; r < ROWS; r++) { z[j * ROWS + r] += a[i * lda + j] * e[i * ROWS + r]; }
        }
    }
}

void ql_gptq_steps_forward_scalar(uint8_t *codes, double *e, double *z, double *loss, const ql_gptq_steps *s) {
    for (int64_t j = 0; j < s->count; j++) {
        const double *now = z + j * ROWS, *a = s->a + j * s->lda;
        double half_d2 = 0.5 * s->diagonal[j] * s->diagonal[j];
        for (int64_t r = 0; r < ROWS; r++) {
            double q = now[r];
            if (codes != NULL) {
                double scale = s->scale[j * ROWS + r], zero = s->zero[j * ROWS + r];
                double steps = whole_steps(now[r] / scale, -zero, s->maxq - zero);
                codes[j * ROWS + r] = (uint8_t)(steps + zero);
                q = scale * steps;
                loss[r] += (now[r] - q) * (now[r] - q) * half_d2;
            }
            e[j * ROWS + r] = s->w[j * ROWS + r] - q;
        }
        for (int64_t i = j + 1; i < s->count; i++) {
            for (int64_t r = 0; r < ROWS; r++) { z[i * ROWS + r] += a[i] * e[j * ROWS + r]; }
        }
    }
}

void ql_gptq_error_forward_scalar(double *error, const double *x, const double *importance, const double *scale,
                                  const double *zero, double maxq, int64_t count) {
    for (int64_t r = 0; r < ROWS; r++) {
        error[r] = 0.0;
        for (int64_t j = 0; j < count; j++) {
            double value = x[j * ROWS + r];
            double moved = scale[r] * whole_steps(value / scale[r], -zero[r], maxq - zero[r]) - value;
            error[r] += importance[j] * moved * moved;
        }
    }
}

void ql_gptq_power_forward_scalar(float *error, const float *enough, const float *x, const float *scale, const float *zero,
                                  float maxq, int64_t count) {
    for (int64_t r = 0; r < ROWS; r++) {
        error[r] = 0.0f;
        for (int64_t j = 0; j < count && !(error[r] > enough[r]); j++) {
            double value = x[j * ROWS + r];
            double steps = whole_steps(value / scale[r], (double)-zero[r], (double)(maxq - zero[r]));
            error[r] += powf((float)fabs(scale[r] * steps - value), 2.4f);
        }
    }
}
