/* gemv_avx2.c: gemv_body.h over AVX2. */
#include "vec_avx2.h"

#include "gemv_body.h"
