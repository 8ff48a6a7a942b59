/* overlay_avx512_vnni.c: the VNNI kernels, put over the AVX-512 table. */
#include "overlay.h"

void ql_overlay_avx512_vnni(ql_backend *table) {
    table->linear_many_forward = ql_linear_many_forward_avx512_vnni;
    table->linear_forward[QL_INT8] = table->linear_forward[QL_AFFINE] = ql_linear_forward_avx512_vnni;
}
