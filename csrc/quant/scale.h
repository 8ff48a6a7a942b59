/* scale.h: scale and zero point of one group of weights, as GPTQ's reference quantizer and its searches choose them. */
#ifndef QL_SCALE_H
#define QL_SCALE_H

#include "../core/half.h"
#include "gptq.h"

#include <float.h> /* FLT_MIN, FLT_MAX */
#include <math.h>  /* pow, fabs, INFINITY */

typedef struct {
    double scale, zero;
} ql_steps;

/* to nearest even, for |x| < 2^51: the sum has no bits left below 1 */
static inline double ql_round_even(double x) {
    const double shift = 6755399441055744.0; /* 1.5 * 2^52 */
    return (x + shift) - shift;
}

/* clamp(round(x / scale) + zero, 0, maxq); clamping first gives the same, since the bounds are integers */
static inline double ql_steps_code(ql_steps grid, double x, double maxq) {
    double steps = x / grid.scale, low = -grid.zero, high = maxq - grid.zero;
    steps = steps < low ? low : steps;
    steps = steps > high ? high : steps;
    return ql_round_even(steps) + grid.zero;
}

/* the scale as it will be stored: float16 (as a float32) or float32; never zero, never infinite */
static inline double ql_stored_scale(double scale, int half) {
    if (!half) { return scale < FLT_MIN ? FLT_MIN : scale > FLT_MAX ? FLT_MAX : (double)(float)scale; }
    const double largest = 65504.0, smallest = 5.9604644775390625e-8;
    if (scale >= largest) { return largest; }
    double stored = ql_f16_to_float(ql_float_to_f16((float)scale));
    return stored == 0.0 ? smallest : stored;
}

/* sum of |q - x|^2.4, or of importance (q - x)^2; stops early once it cannot be less than `best` */
static inline double ql_steps_error(ql_steps grid, const double *x, const double *importance, int64_t count, double maxq,
                                   double best) {
    double sum = 0.0;
    enum { STEP = 16 };
    for (int64_t first = 0; first < count && sum < best; first += STEP) {
        int64_t end = first + STEP < count ? first + STEP : count;
        double error[STEP];
        for (int64_t i = first; i < end; i++) {
            error[i - first] = grid.scale * (ql_steps_code(grid, x[i], maxq) - grid.zero) - x[i];
        }
        if (importance == NULL) {
            for (int64_t i = first; i < end; i++) { sum += pow(fabs(error[i - first]), 2.4); }
        } else {
            double part[4] = {0.0, 0.0, 0.0, 0.0};
            for (int64_t i = first; i < end; i++) { part[i & 3] += importance[i] * error[i - first] * error[i - first]; }
            sum += (part[0] + part[1]) + (part[2] + part[3]);
        }
    }
    return sum;
}

/* scale and zero of the range [low, high] shrunk by p; the search by Hessian keeps one zero for every p */
static inline ql_steps ql_steps_of_range(double low, double high, double p, double maxq, const ql_gptq_options *options) {
    ql_steps grid;
    grid.scale = ql_stored_scale((p * high - p * low) / maxq, options->half_scales);
    if (options->symmetric) {
        grid.zero = (maxq + 1.0) / 2.0;
    } else if (options->search == QL_SEARCH_HESSIAN) {
        grid.zero = ql_round_even(-low / ((high - low) / maxq));
    } else {
        double zero = -p * low / grid.scale;
        grid.zero = ql_round_even(zero > maxq ? maxq : zero);
    }
    return grid;
}

/* x (count,): the weights of the group; importance (count,): H_jj + damping of their columns */
static inline ql_steps ql_fit_grid(const double *x, const double *importance, int64_t count, const ql_gptq_options *options) {
    double maxq = (double)((1 << options->bits) - 1), low = 0.0, high = 0.0;
    int by_hessian = options->search == QL_SEARCH_HESSIAN;
    for (int64_t i = 0; i < count; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
    }
    if (options->symmetric) { /* the reference keeps low = 0 where no weight is negative; the search by Hessian does not */
        high = -low > high ? -low : high;
        if (low < 0.0 || by_hessian) { low = -high; }
    }
    if (low == 0.0 && high == 0.0) { low = -1.0, high = 1.0; }
    ql_steps best = ql_steps_of_range(low, high, 1.0, maxq, options);
    if (options->search == QL_SEARCH_NONE) { return best; }
    double least = INFINITY;
    int trials = by_hessian ? 11 : 80; /* p = 1, 0.95 ... 0.5; or 1, 0.99 ... 0.21 */
    for (int trial = 0; trial < trials; trial++) {
        double p = by_hessian ? (20 - trial) / 20.0 : 1.0 - trial / 100.0;
        ql_steps grid = ql_steps_of_range(low, high, p, maxq, options);
        double error = ql_steps_error(grid, x, by_hessian ? importance : NULL, count, maxq, least);
        if (error < least) { least = error, best = grid; }
    }
    return best;
}

#endif
