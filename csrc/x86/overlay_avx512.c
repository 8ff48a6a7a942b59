/* overlay_avx512.c: the AVX-512 kernels, put over the AVX2 table. */
#include "overlay.h"

void ql_overlay_avx512(ql_backend *table) {
#define X(op) table->op = ql_##op##_avx512;
    QL_X86_PLAIN_OPS(X)
#undef X
    table->quantize_forward[QL_INT8] = table->quantize_forward[QL_NF4] = table->quantize_forward[QL_FP4] =
        ql_quantize_forward_avx512;
    for (int f = 0; f < QL_FORMAT_COUNT; f++) {
#define X(op) table->op[f] = ql_##op##_avx512;
        QL_X86_FORMAT_OPS(X)
#undef X
    }
}
