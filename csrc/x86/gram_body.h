/* gram_body.h: h += a^T b. Both operands have the reduction, t, as their rows. */
#include "overlay.h"

#define GEMM_A_TRANSPOSED 1
#include "gemm_body.h"

static void copy_block(float *block, const gemm *g, int64_t k0, int64_t k1, int64_t j0, int64_t j1) {
    const float *b = g->b;
    for (int64_t s = k0; s < k1; s++) { pack_row(block, s - k0, b + s * g->ldb + j0, j1 - j0); }
}

/* ---- few columns of a: the gradients of low-rank adapters ---------------------------------------------------------
 * Packing b would cost more than its products: it is read where it is, by blocks of rows that stay in the second-level
 * cache. */

enum { FEW_ROWS = V_AVX512 ? 8 : 4, TOKENS = 64, COLUMNS_PER_TASK = 128 };

typedef struct {
    float *h;          /* (ka, kb) */
    const float *a, *b; /* (t, ka) (t, kb) */
    int64_t t, ka, kb;
} few;

/* `rows` columns of a from column i, `vectors` vectors of columns of b from column j, the last with `last` lanes */
static inline __attribute__((always_inline)) void few_tile(const few *g, int64_t s0, int64_t s1, int64_t i, int64_t j,
                                                           const int rows, const int vectors, int64_t last) {
    vf sum[FEW_ROWS][2];
    for (int r = 0; r < rows; r++) {
        for (int q = 0; q < vectors; q++) { sum[r][q] = v_zero(); }
    }
    for (int64_t s = s0; s < s1; s++) {
        const float *a = g->a + s * g->ka + i, *b = g->b + s * g->kb + j;
        vf b0 = last == VL ? v_load(b) : v_load_tail(b, last), b1 = vectors > 1 ? v_load(b + VL) : b0;
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            vf x = v_set1(a[r]);
            sum[r][0] = v_fma(x, b0, sum[r][0]);
            if (vectors > 1) { sum[r][1] = v_fma(x, b1, sum[r][1]); }
        }
    }
    for (int r = 0; r < rows; r++) {
        for (int q = 0; q < vectors; q++) {
            float *h = g->h + (i + r) * g->kb + j + q * VL;
            v_store_tail(h, v_add(v_load_tail(h, last), sum[r][q]), last);
        }
    }
}

static void few_columns(const few *g, int64_t s0, int64_t s1, int64_t j, int64_t columns) {
    int64_t i = 0;
    for (; i + FEW_ROWS <= g->ka; i += FEW_ROWS) {
        if (columns == 2 * VL) {
            few_tile(g, s0, s1, i, j, FEW_ROWS, 2, VL);
        } else {
            few_tile(g, s0, s1, i, j, FEW_ROWS, 1, columns);
        }
    }
    for (; i < g->ka; i++) {
        if (columns == 2 * VL) {
            few_tile(g, s0, s1, i, j, 1, 2, VL);
        } else {
            few_tile(g, s0, s1, i, j, 1, 1, columns);
        }
    }
}

static void few_task(void *context, int64_t task) {
    const few *g = context;
    int64_t end = at_most((task + 1) * COLUMNS_PER_TASK, g->kb), columns;
    for (int64_t s = 0; s < g->t; s += TOKENS) {
        for (int64_t j = task * COLUMNS_PER_TASK; j < end; j += columns) {
            columns = end - j >= 2 * VL ? 2 * VL : at_most(VL, end - j);
            few_columns(g, s, at_most(s + TOKENS, g->t), j, columns);
        }
    }
}

static void gram_few(float *h, const float *a, const float *b, int64_t t, int64_t ka, int64_t kb) {
    few g = {h, a, b, t, ka, kb};
    ql_parallel_for(pieces(kb, COLUMNS_PER_TASK), few_task, &g);
}

/* h^T += b^T a where b is the one with few columns; 0: no memory for it, nothing was done */
static int gram_few_transposed(float *h, const float *a, const float *b, int64_t t, int64_t ka, int64_t kb) {
    float *update = ql_scratch((size_t)(ka * kb) * sizeof *update);
    if (update == NULL) { return 0; }
    memset(update, 0, (size_t)(ka * kb) * sizeof *update);
    gram_few(update, b, a, t, kb, ka);
    for (int64_t i = 0; i < ka; i++) {
        for (int64_t j = 0; j < kb; j++) { h[i * kb + j] += update[j * ka + i]; }
    }
    return 1;
}

void V_NAME(gram_forward)(float *h, const float *a, const float *b, int64_t t, int64_t ka, int64_t kb, int lower) {
    if (ka != kb && ka <= QL_FEW) {
        gram_few(h, a, b, t, ka, kb);
        return;
    }
    if (ka != kb && kb <= QL_FEW && gram_few_transposed(h, a, b, t, ka, kb)) { return; }
    gemm g = {.c = h, .ldc = kb, .accumulate = 1, .lower = lower, .a = a, .lda = ka, .b = b, .ldb = kb,
              .pack_b = copy_block, .m = ka, .n = kb, .k = t};
    if (!gemm_run(&g, 1)) { ql_gram_forward_scalar(h, a, b, t, ka, kb, lower); }
}
