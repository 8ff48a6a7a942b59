/* cross_entropy_avx2.c: cross_entropy_body.h over AVX2. */
#include "vec_avx2.h"

#include "cross_entropy_body.h"
