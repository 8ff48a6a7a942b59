/* roof_avx512.c: roof_body.h over AVX-512. */
#include "vec_avx512.h"

#include "roof_body.h"
