/* sample_avx512.c: sample_body.h over AVX-512. */
#include "vec_avx512.h"

#include "sample_body.h"
