/* roof_avx2.c: roof_body.h over AVX2. */
#include "vec_avx2.h"

#include "roof_body.h"
