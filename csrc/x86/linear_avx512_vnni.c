/* linear_avx512_vnni.c: bytes_body.h in vectors alone, for processors with AVX-512's VNNI: products of few rows with integers. All others are
 * those of AVX-512. */
#define GEMV_TILES 0
#include "bytes_body.h"

void ql_linear_forward_avx512_vnni(float *y, const float *x, const ql_weight *w, int64_t m, int accumulate) {
    const ql_linear_product product = {y, w};
    if (!gemv_bytes(&product, 1, x, m, accumulate)) { ql_linear_forward_avx512(y, x, w, m, accumulate); }
}

void ql_linear_many_forward_avx512_vnni(const ql_linear_product *products, int64_t count, const float *x, int64_t m) {
    if (m <= QL_GEMV_ROWS && ql_products_alike(products, count)) {
        if (gemv_bytes(products, count, x, m, 0) || ql_gemv_forward_avx512(products, count, x, m, 0)) { return; }
    }
    for (int64_t i = 0; i < count; i++) { ql_linear_forward_avx512_vnni(products[i].y, x, products[i].w, m, 0); }
}
