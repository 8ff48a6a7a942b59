/* elementwise_avx512.c: elementwise_body.h over AVX-512. */
#include "vec_avx512.h"

#include "elementwise_body.h"
