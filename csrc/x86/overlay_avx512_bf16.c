/* overlay_avx512_bf16.c: the kernels of bf16 products, put over the AVX-512 table. */
#include "overlay.h"

void ql_overlay_avx512_bf16(ql_backend *table) {
    table->linear_many_forward = ql_linear_many_forward_avx512_bf16;
    for (int f = 0; f < QL_FORMAT_COUNT; f++) {
        table->linear_forward[f] = ql_linear_forward_avx512_bf16;
        table->linear_backward_input[f] = ql_linear_backward_input_avx512_bf16;
    }
}
