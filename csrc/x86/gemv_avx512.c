/* gemv_avx512.c: gemv_body.h over AVX-512. */
#include "vec_avx512.h"

#include "gemv_body.h"
