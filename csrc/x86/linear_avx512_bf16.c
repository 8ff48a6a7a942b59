/* linear_avx512_bf16.c: y = x W^T and dx = dy W for processors with bf16 products and no tiles: as linear_avx512.c, with x and W rounded to bf16, twice
 * as many products an instruction. Float32 weights, ql_precise() and products of few rows are left to AVX-512 and its VNNI. */
#include "pairs_avx512_bf16.h"

#include "../formats/packed.h" /* QL_GEMV_ROWS */
#include "overlay.h"

#define GEMM_A_TRANSPOSED 0
#define GEMM_PAIRS 1
#include "gemm_body.h"
#include "transposed_body.h"

static int takes_pairs(const ql_weight *w) { return w->format != QL_F32 && !ql_precise(); }

/* y = x W^T of `count` products that are alike; 0: nothing done, float32 takes them, or there is no memory */
static int pairs_forward(const ql_linear_product *products, int64_t count, const float *x, int64_t m, int accumulate) {
    gemm g[QL_PRODUCTS];
    for (int64_t i = 0; i < count; i++) {
        const ql_weight *w = products[i].w;
        if (!takes_pairs(w)) { return 0; }
        g[i] = (gemm){.c = products[i].y, .ldc = w->n, .accumulate = accumulate, .a = x, .lda = w->k, .a_columns = w->perm, .b = w,
                      .pack_panel = pack_transposed, .m = m, .n = w->n, .k = pieces(w->k, 2), .values = w->k};
    }
    return gemm_run(g, count);
}

void ql_linear_forward_avx512_bf16(float *y, const float *x, const ql_weight *w, int64_t m, int accumulate) {
    const ql_linear_product product = {y, w};
    if (m > QL_GEMV_ROWS && pairs_forward(&product, 1, x, m, accumulate)) { return; }
    ql_linear_forward_avx512_vnni(y, x, w, m, accumulate);
}

void ql_linear_many_forward_avx512_bf16(const ql_linear_product *products, int64_t count, const float *x, int64_t m) {
    if (m <= QL_GEMV_ROWS) { ql_linear_many_forward_avx512_vnni(products, count, x, m); return; }
    if (ql_products_alike(products, count) && pairs_forward(products, count, x, m, 0)) { return; }
    for (int64_t i = 0; i < count; i++) { ql_linear_forward_avx512_bf16(products[i].y, x, products[i].w, m, 0); }
}

/* b = W: two of its rows are a step */
static void pack_rows(float *panel, const gemm *g, int64_t k0, int64_t k1, int64_t j) {
    alignas(64) float values[STEP * SPAN * NR];
    int64_t end = at_most(STEP * k1, g->values);
    ql_decode_forward_avx512(values, NR, g->b, STEP * k0, end, j, at_most(j + NR, g->n));
    v_pairs_of_rows(panel, values, NR, end - STEP * k0);
}

void ql_linear_backward_input_avx512_bf16(float *dx, const float *dy, const ql_weight *w, int64_t m, int accumulate) {
    gemm g = {.c = dx, .ldc = w->k, .c_columns = w->perm, .accumulate = accumulate, .a = dy, .lda = w->n, .b = w, .pack_panel = pack_rows,
              .m = m, .n = w->k, .k = pieces(w->n, 2), .values = w->n};
    if (!takes_pairs(w) || !gemm_run(&g, 1)) { ql_linear_backward_input_avx512(dx, dy, w, m, accumulate); }
}
