/* scale.h: scale and zero point of one group of weights in each row of a tile, as GPTQ's reference quantizer and its
 * searches choose them. */
#ifndef QL_SCALE_H
#define QL_SCALE_H

#include "../core/half.h"
#include "gptq.h"

#include <float.h> /* FLT_MIN, FLT_MAX */

typedef struct {
    double scale, zero;
} ql_steps;

/* to nearest even, for |x| < 2^51: the sum has no bits left below 1 */
QL_INLINE double ql_round_even(double x) {
    const double shift = 6755399441055744.0; /* 1.5 * 2^52 */
    return (x + shift) - shift;
}

/* clamp(round(x / scale) + zero, 0, maxq); clamping first gives the same, since the bounds are integers */
QL_INLINE double ql_steps_code(ql_steps grid, double x, double maxq) {
    double steps = x / grid.scale, low = -grid.zero, high = maxq - grid.zero;
    steps = steps < low ? low : steps;
    steps = steps > high ? high : steps;
    return ql_round_even(steps) + grid.zero;
}

/* the scale as it will be stored: float16 (as a float32) or float32; never zero, never infinite */
QL_INLINE double ql_stored_scale(double scale, int half) {
    if (!half) { return scale < FLT_MIN ? FLT_MIN : scale > FLT_MAX ? FLT_MAX : (double)(float)scale; }
    const double largest = 65504.0, smallest = 5.9604644775390625e-8;
    if (scale >= largest) { return largest; }
    double stored = ql_f16_to_float(ql_float_to_f16((float)scale));
    return stored == 0.0 ? smallest : stored;
}

/* scale and zero of the range [low, high] shrunk by p; the search by Hessian keeps one zero for every p */
QL_INLINE ql_steps ql_steps_of_range(double low, double high, double p, double maxq, const ql_gptq_options *options) {
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

/* the range [low, high] that the grids of a group cover, from its least and largest weight (or 0) */
QL_INLINE void ql_widen_range(double *low, double *high, const ql_gptq_options *options) {
    if (options->symmetric) { /* the reference keeps low = 0 where no weight is negative; the search by Hessian does not */
        *high = -*low > *high ? -*low : *high;
        if (*low < 0.0 || options->search == QL_SEARCH_HESSIAN) { *low = -*high; }
    }
    if (*low == 0.0 && *high == 0.0) { *low = -1.0, *high = 1.0; }
}

/* grids (QL_GPTQ_ROWS,) of the rows of x (count, QL_GPTQ_ROWS); importance (count,): H_jj + damping of their columns */
void ql_fit_grids(ql_steps *grids, const double *x, const double *importance, int64_t count, const ql_gptq_options *options);

#endif
