/* linear.c: decode, linear forward and its input gradient, for every format: one specification, since a format is
 * only a way to ask for W[i, j]. Sums run over k (forward) or n (backward) in order, in float32. */
#include "../core/sizes.h"
#include "../formats/weight.h"

enum { ROWS_PER_TASK = 16, INPUTS_PER_TASK = 64 }; /* rows or columns of W, rows of x: short tasks, for Ctrl-C */

void ql_decode_forward_scalar(float *out, int64_t ld, const ql_weight *w, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    for (int64_t i = i0; i < i1; i++) {
        for (int64_t j = j0; j < j1; j++) { out[(i - i0) * ld + (j - j0)] = ql_weight_value(w, i, j); }
    }
}

typedef struct {
    float *out;       /* (m, n) or (m, k) */
    const float *in;  /* (m, k) or (m, n) */
    const ql_weight *w;
    int64_t m;
    int accumulate;
} linear_context;

static int64_t logical_column(const ql_weight *w, int64_t j) { return w->perm != NULL ? w->perm[j] : j; }

static void forward_rows(void *context, int64_t task) {
    const linear_context *c = context;
    const ql_weight *w = c->w;
    int64_t inputs = pieces(c->m, INPUTS_PER_TASK);
    int64_t i0 = task / inputs * ROWS_PER_TASK, i1 = at_most(i0 + ROWS_PER_TASK, w->n);
    int64_t r0 = task % inputs * INPUTS_PER_TASK, r1 = at_most(r0 + INPUTS_PER_TASK, c->m);
    for (int64_t i = i0; i < i1; i++) {
        for (int64_t r = r0; r < r1; r++) {
            if (!c->accumulate) { c->out[r * w->n + i] = 0.0f; }
        }
        for (int64_t j = 0; j < w->k; j++) {
            float value = ql_weight_value(w, i, j);
            int64_t column = logical_column(w, j);
            for (int64_t r = r0; r < r1; r++) { c->out[r * w->n + i] += c->in[r * w->k + column] * value; }
        }
    }
}

void ql_linear_forward_scalar(float *y, const float *x, const ql_weight *w, int64_t m, int accumulate) {
    linear_context context = {y, x, w, m, accumulate};
    ql_parallel_for(pieces(w->n, ROWS_PER_TASK) * pieces(m, INPUTS_PER_TASK), forward_rows, &context);
}

void ql_linear_many_forward_scalar(const ql_linear_product *products, int64_t count, const float *x, int64_t m) {
    for (int64_t i = 0; i < count; i++) { ql_linear_forward_scalar(products[i].y, x, products[i].w, m, 0); }
}

static void backward_columns(void *context, int64_t task) {
    const linear_context *c = context;
    const ql_weight *w = c->w;
    int64_t inputs = pieces(c->m, INPUTS_PER_TASK);
    int64_t j0 = task / inputs * ROWS_PER_TASK, j1 = at_most(j0 + ROWS_PER_TASK, w->k);
    int64_t r0 = task % inputs * INPUTS_PER_TASK, r1 = at_most(r0 + INPUTS_PER_TASK, c->m);
    for (int64_t j = j0; j < j1; j++) {
        int64_t column = logical_column(w, j);
        for (int64_t r = r0; r < r1; r++) {
            if (!c->accumulate) { c->out[r * w->k + column] = 0.0f; }
        }
        for (int64_t i = 0; i < w->n; i++) {
            float value = ql_weight_value(w, i, j);
            for (int64_t r = r0; r < r1; r++) { c->out[r * w->k + column] += c->in[r * w->n + i] * value; }
        }
    }
}

void ql_linear_backward_input_scalar(float *dx, const float *dy, const ql_weight *w, int64_t m, int accumulate) {
    linear_context context = {dx, dy, w, m, accumulate};
    ql_parallel_for(pieces(w->k, ROWS_PER_TASK) * pieces(m, INPUTS_PER_TASK), backward_columns, &context);
}
