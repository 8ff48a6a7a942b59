/* rope_avx2.c: rope_body.h over AVX2. */
#include "vec_avx2.h"

#include "rope_body.h"
