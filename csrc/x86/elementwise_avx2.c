/* elementwise_avx2.c: elementwise_body.h over AVX2. */
#include "vec_avx2.h"

#include "elementwise_body.h"
