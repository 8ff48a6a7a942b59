/* overlay_amx.c: the AMX kernels, put over the AVX-512 table. */
#include "../formats/packed.h"
#include "overlay.h"

void ql_overlay_amx(ql_backend *table) {
    table->gemv_rows = QL_GEMV_TILE_ROWS;
    table->linear_many_forward = ql_linear_many_forward_amx;
    table->gram_forward = ql_gram_forward_amx;
    table->attention_forward = ql_attention_forward_amx;
    table->attention_backward = ql_attention_backward_amx;
    for (int f = 0; f < QL_FORMAT_COUNT; f++) {
        table->linear_forward[f] = ql_linear_forward_amx;
        table->linear_backward_input[f] = ql_linear_backward_input_amx;
    }
}
