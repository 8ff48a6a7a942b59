/* cross_entropy_avx512.c: cross_entropy_body.h over AVX-512. */
#include "vec_avx512.h"

#include "cross_entropy_body.h"
