/* overlay_avx2.c: the AVX2 kernels, put over the scalar table. */
#include "../formats/packed.h"
#include "overlay.h"

void ql_overlay_avx2(ql_backend *table) {
    table->gemv_rows = QL_GEMV_ROWS;
#define X(op) table->op = ql_##op##_avx2;
    QL_X86_PLAIN_OPS(X)
#undef X
    table->quantize_forward[QL_INT8] = table->quantize_forward[QL_NF4] = table->quantize_forward[QL_FP4] =
        ql_quantize_forward_avx2;
    for (int f = 0; f < QL_FORMAT_COUNT; f++) {
#define X(op) table->op[f] = ql_##op##_avx2;
        QL_X86_FORMAT_OPS(X)
#undef X
    }
}
