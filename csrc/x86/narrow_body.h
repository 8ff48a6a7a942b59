/* narrow_body.h: y (m, n) = x (m, k) w^T, or +=, for a float32 w of a few rows: low-rank adapters. The lanes are elements of k,
 * so x is read where it is and no lane is idle. A row's result does not depend on the rows beside it. */
#ifndef QL_NARROW_BODY_H
#define QL_NARROW_BODY_H

#include "../core/sizes.h"
#include "../quantlab.h"

enum {
    X_ROWS = V_AVX512 ? 4 : 2, W_ROWS = 4, /* of a register tile of sums */
    ROWS_PER_TASK = 64
};

typedef struct {
    float *y;
    const float *x, *w;
    int64_t m, n, k;
    int accumulate;
} narrow;

static inline __attribute__((always_inline)) void narrow_tile(const narrow *g, int64_t i, int64_t j, const int rows, const int columns) {
    vf sum[X_ROWS][W_ROWS];
    for (int r = 0; r < rows; r++) {
        for (int c = 0; c < columns; c++) { sum[r][c] = v_zero(); }
    }
    for (int64_t s = 0; s < g->k; s += VL) {
        int64_t lanes = g->k - s < VL ? g->k - s : VL;
        vf x[X_ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const float *from = g->x + (i + r) * g->k + s;
            x[r] = lanes == VL ? v_load(from) : v_load_tail(from, lanes);
        }
#pragma GCC unroll 4
        for (int c = 0; c < columns; c++) {
            const float *from = g->w + (j + c) * g->k + s;
            vf w = lanes == VL ? v_load(from) : v_load_tail(from, lanes);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) { sum[r][c] = v_fma(x[r], w, sum[r][c]); }
        }
    }
    for (int r = 0; r < rows; r++) {
        for (int c = 0; c < columns; c++) {
            float *y = g->y + (i + r) * g->n + j + c, value = v_sum(sum[r][c]);
            *y = g->accumulate ? *y + value : value;
        }
    }
}

static void narrow_task(void *context, int64_t task) {
    const narrow *g = context;
    int64_t i = task * ROWS_PER_TASK, end = i + ROWS_PER_TASK < g->m ? i + ROWS_PER_TASK : g->m;
    for (; i < end; i += X_ROWS) {
        int64_t j = 0, rows = end - i < X_ROWS ? end - i : X_ROWS;
        for (; rows == X_ROWS && j + W_ROWS <= g->n; j += W_ROWS) { narrow_tile(g, i, j, X_ROWS, W_ROWS); }
        for (; rows == X_ROWS && j < g->n; j++) { narrow_tile(g, i, j, X_ROWS, 1); }
        for (int64_t r = 0; rows < X_ROWS && r < rows; r++) {
            for (j = 0; j < g->n; j++) { narrow_tile(g, i + r, j, 1, 1); }
        }
    }
}

static void narrow_run(narrow *g) { ql_parallel_for(pieces(g->m, ROWS_PER_TASK), narrow_task, g); }

#endif
