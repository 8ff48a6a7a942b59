/* rope_avx512.c: rope_body.h over AVX-512. */
#include "vec_avx512.h"

#include "rope_body.h"
