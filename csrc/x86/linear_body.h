/* linear_body.h: y = x W^T and dx = dy W for every format: a block of W is decoded to float32 in the cache, then gemm. */
#include "../formats/packed.h" /* QL_GEMV_ROWS */
#include "overlay.h"

#define GEMM_A_TRANSPOSED 0
#include "gemm_body.h"
#include "narrow_body.h"
#include "transposed_body.h"

void V_NAME(linear_forward)(float *y, const float *x, const ql_weight *w, int64_t m, int accumulate) {
    const ql_linear_product product = {y, w};
    if (m <= QL_GEMV_ROWS && V_NAME(gemv_forward)(&product, 1, x, m, accumulate)) { return; }
    if (w->format == QL_F32 && w->n <= QL_FEW && w->perm == NULL) {
        narrow g = {y, x, w->codes, m, w->n, w->k, accumulate};
        narrow_run(&g);
        return;
    }
    gemm g = {.c = y, .ldc = w->n, .accumulate = accumulate, .a = x, .lda = w->k, .a_columns = w->perm, .b = w,
              .pack_panel = pack_transposed, .m = m, .n = w->n, .k = w->k};
    if (!gemm_run(&g, 1)) { ql_linear_forward_scalar(y, x, w, m, accumulate); }
}

void V_NAME(linear_many_forward)(const ql_linear_product *products, int64_t count, const float *x, int64_t m) {
    if (m <= QL_GEMV_ROWS && ql_products_alike(products, count) && V_NAME(gemv_forward)(products, count, x, m, 0)) { return; }
    for (int64_t i = 0; i < count; i++) { V_NAME(linear_forward)(products[i].y, x, products[i].w, m, 0); }
}

/* b = W: its rows are the steps */
static void pack_rows(float *block, const gemm *g, int64_t k0, int64_t k1, int64_t j0, int64_t j1) {
    alignas(64) float row[NB];
    for (int64_t s = k0; s < k1; s++) {
        V_NAME(decode_forward)(row, NB, g->b, s, s + 1, j0, j1);
        pack_row(block, s - k0, row, j1 - j0);
    }
}

/* dx = dy W by the rows of W^T, for a W of a few columns; 0: no memory for them, nothing was done */
static int narrow_backward(float *dx, const float *dy, const ql_weight *w, int64_t m, int accumulate) {
    float *rows = ql_scratch((size_t)(w->k * w->n) * sizeof *rows);
    const float *values = w->codes;
    if (rows == NULL) { return 0; }
    for (int64_t i = 0; i < w->n; i++) {
        for (int64_t j = 0; j < w->k; j++) { rows[j * w->n + i] = values[i * w->k + j]; }
    }
    narrow g = {dx, dy, rows, m, w->k, w->n, accumulate};
    narrow_run(&g);
    return 1;
}

void V_NAME(linear_backward_input)(float *dx, const float *dy, const ql_weight *w, int64_t m, int accumulate) {
    int few = w->format == QL_F32 && w->k <= QL_FEW && w->perm == NULL;
    if (few && narrow_backward(dx, dy, w, m, accumulate)) { return; }
    gemm g = {.c = dx, .ldc = w->k, .c_columns = w->perm, .accumulate = accumulate, .a = dy, .lda = w->n, .b = w,
              .pack_b = pack_rows, .m = m, .n = w->k, .k = w->n};
    if (!gemm_run(&g, 1)) { ql_linear_backward_input_scalar(dx, dy, w, m, accumulate); }
}
