/* gemv_amx.c: bytes_body.h with tiles. */
#define GEMV_TILES 1
#include "bytes_body.h"

int ql_gemv_forward_amx(const ql_linear_product *products, int64_t count, const float *x, int64_t m, int accumulate) {
    return gemv_bytes(products, count, x, m, accumulate);
}
