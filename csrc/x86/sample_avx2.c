/* sample_avx2.c: sample_body.h over AVX2. */
#include "vec_avx2.h"

#include "sample_body.h"
