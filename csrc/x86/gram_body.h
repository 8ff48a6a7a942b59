/* gram_body.h: h += a^T b. Both operands have the reduction, t, as their rows. */
#include "overlay.h"

#define GEMM_A_TRANSPOSED 1
#include "gemm_body.h"

static void copy_block(float *block, const gemm *g, int64_t k0, int64_t k1, int64_t j0, int64_t j1) {
    const float *b = g->b;
    for (int64_t s = k0; s < k1; s++) { pack_row(block, s - k0, b + s * g->ldb + j0, j1 - j0); }
}

void V_NAME(gram_forward)(float *h, const float *a, const float *b, int64_t t, int64_t ka, int64_t kb, int lower) {
    gemm g = {.c = h, .ldc = kb, .accumulate = 1, .lower = lower, .a = a, .lda = ka, .b = b, .ldb = kb,
              .pack_b = copy_block, .m = ka, .n = kb, .k = t};
    gemm_run(&g);
}
