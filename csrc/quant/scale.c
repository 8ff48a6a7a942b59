/* scale.c: the grids of one group in each row of a tile (scale.h), rows in the lanes of the ops.
 *
 * The search for the least sum of |q - x|^2.4 tries 80 grids. A float64 power of every weight for every grid would take
 * ten times as long as the rest of GPTQ, so the sums are first taken in float32, and only where more than one grid comes so
 * near to the least that float32 cannot tell them apart are these compared in float64. So the grid is the one that
 * float64 finds. */
#include "scale.h"

#include "../core/sizes.h"

#include <math.h> /* pow, fabs, frexp, ldexp, INFINITY */

enum { ROWS = QL_GPTQ_ROWS, TRIALS = 80, COLUMNS = 128 };

typedef struct {
    double low[ROWS], high[ROWS];                  /* the range of the grids */
    float scale[TRIALS][ROWS], zero[TRIALS][ROWS]; /* of the grids p = 1, 0.99 ... 0.21: float32 holds both exactly */
    double error[TRIALS][ROWS];                    /* the sum of |(q - x) unit|^2.4, nearly */
    double unit[ROWS];                             /* a power of two: x unit is between -1 and 1 */
} power_search;

/* What float32 makes of the sums of `count` weights. A power errs by 2^-17 of itself, and so does a sum of COLUMNS of them.
 * An error q - x, in units, is one off by 2^-21 at most: x is rounded once (2^-24), and the code is that of a quotient
 * rounded twice, which may lie nearer to the other of two codes by four such roundings. */
static const double sum_slack = 0x1p-16, error_slack = 0x1p-21;

/* The sum of no grid that has a greater one in float32 is the least: `least` is the least in float32. By Minkowski's inequality
 * the 2.4-norm of the errors is off by that of their slacks, in the least sum and in the other. */
static double greatest_near(double least, int64_t count) {
    double norm = pow(least / (1.0 - sum_slack), 1.0 / 2.4), slack = error_slack * pow((double)count, 1.0 / 2.4);
    return (1.0 + sum_slack) * pow(norm + 2.0 * slack, 2.4);
}

/* sum over x (count, ROWS) of |q - x|^2.4 in row r, no further than `enough` */
static double power_error(ql_steps grid, const double *x, int64_t r, double maxq, int64_t count, double enough) {
    double error = 0.0;
    for (int64_t j = 0; j < count && error < enough; j++) {
        double value = x[j * ROWS + r];
        error += pow(fabs(grid.scale * (ql_steps_code(grid, value, maxq) - grid.zero) - value), 2.4);
    }
    return error;
}

/* the first grid of row r with the least sum; `grid` where no sum is finite */
static ql_steps least_power(const power_search *s, ql_steps grid, const double *x, int64_t r, double maxq, int64_t count) {
    double least = INFINITY;
    for (int trial = 0; trial < TRIALS; trial++) { least = s->error[trial][r] < least ? s->error[trial][r] : least; }
    double bound = greatest_near(least, count);
    int near[TRIALS], found = 0;
    for (int trial = 0; trial < TRIALS; trial++) {
        if (!(s->error[trial][r] > bound)) { near[found++] = trial; } /* a NaN is near */
    }
    least = INFINITY;
    for (int i = 0; i < found; i++) {
        ql_steps tried = {s->scale[near[i]][r], s->zero[near[i]][r]};
        double error = found == 1 ? 0.0 : power_error(tried, x, r, maxq, count, least);
        if (error < least) { least = error, grid = tried; }
    }
    return grid;
}

/* s->error of all grids. In a group of one part, a sum may end where it is near to no grid before it any more: above twice the
 * error of that and five times the 2.4th power of the slacks' norm, which is more than `greatest_near`, as powers are convex. */
static void sum_powers(power_search *s, const double *x, double maxq, int64_t count) {
    float part[COLUMNS * ROWS], scale[ROWS], error[ROWS], enough[ROWS];
    float slack = (float)(5.0 * (double)count * pow(2.0 * error_slack, 2.4));
    for (int64_t r = 0; r < ROWS; r++) { enough[r] = INFINITY; }
    for (int64_t first = 0; first < count; first += COLUMNS) {
        int64_t columns = at_most(COLUMNS, count - first);
        for (int64_t i = 0; i < columns * ROWS; i++) { part[i] = (float)(x[first * ROWS + i] * s->unit[i % ROWS]); }
        for (int trial = 0; trial < TRIALS; trial++) {
            for (int64_t r = 0; r < ROWS; r++) { scale[r] = (float)(s->scale[trial][r] * s->unit[r]); }
            ql_cpu()->gptq_power_forward(error, enough, part, scale, s->zero[trial], (float)maxq, columns);
            for (int64_t r = 0; r < ROWS; r++) {
                s->error[trial][r] = (first == 0 ? 0.0 : s->error[trial][r]) + error[r];
                float most = 2.0f * error[r] + slack;
                if (columns == count && most < enough[r]) { enough[r] = most; }
            }
        }
    }
}

static void search_powers(ql_steps *grids, power_search *s, const double *x, double maxq, int64_t count,
                          const ql_gptq_options *options) {
    for (int64_t r = 0; r < ROWS; r++) {
        int exponent;
        frexp(s->high[r] > -s->low[r] ? s->high[r] : -s->low[r], &exponent);
        s->unit[r] = ldexp(1.0, exponent > -100 ? -exponent : 100); /* smaller ones: every grid is near */
        for (int trial = 0; trial < TRIALS; trial++) {
            ql_steps grid = ql_steps_of_range(s->low[r], s->high[r], 1.0 - trial / 100.0, maxq, options);
            s->scale[trial][r] = (float)grid.scale, s->zero[trial][r] = (float)grid.zero;
        }
    }
    sum_powers(s, x, maxq, count);
    for (int64_t r = 0; r < ROWS; r++) { grids[r] = least_power(s, grids[r], x, r, maxq, count); }
}

/* the least error weighted by importance, p = 1, 0.95 ... 0.5 */
static void search_by_hessian(ql_steps *grids, const power_search *s, const double *x, const double *importance, double maxq,
                              int64_t count, const ql_gptq_options *options) {
    double scale[ROWS], zero[ROWS], error[ROWS], least[ROWS];
    for (int trial = 0; trial <= 10; trial++) {
        for (int64_t r = 0; r < ROWS; r++) {
            ql_steps grid = ql_steps_of_range(s->low[r], s->high[r], (20 - trial) / 20.0, maxq, options);
            scale[r] = grid.scale, zero[r] = grid.zero;
        }
        ql_cpu()->gptq_error_forward(error, x, importance, scale, zero, maxq, count);
        for (int64_t r = 0; r < ROWS; r++) {
            if (trial == 0 || error[r] < least[r]) { least[r] = error[r], grids[r] = (ql_steps){scale[r], zero[r]}; }
        }
    }
}

void ql_fit_grids(ql_steps *grids, const double *x, const double *importance, int64_t count, const ql_gptq_options *options) {
    power_search s;
    double maxq = (double)((1 << options->bits) - 1);
    for (int64_t r = 0; r < ROWS; r++) { s.low[r] = s.high[r] = 0.0; }
    for (int64_t j = 0; j < count; j++) {
        for (int64_t r = 0; r < ROWS; r++) {
            double value = x[j * ROWS + r];
            s.low[r] = value < s.low[r] ? value : s.low[r];
            s.high[r] = value > s.high[r] ? value : s.high[r];
        }
    }
    for (int64_t r = 0; r < ROWS; r++) {
        ql_widen_range(&s.low[r], &s.high[r], options);
        grids[r] = ql_steps_of_range(s.low[r], s.high[r], 1.0, maxq, options);
    }
    switch (options->search) {
    case QL_SEARCH_NONE: break;
    case QL_SEARCH_MSE: search_powers(grids, &s, x, maxq, count, options); break;
    case QL_SEARCH_HESSIAN: search_by_hessian(grids, &s, x, importance, maxq, count, options); break;
    }
}
