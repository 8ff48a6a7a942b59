/* rmsnorm_avx2.c: rmsnorm_body.h over AVX2. */
#include "vec_avx2.h"

#include "rmsnorm_body.h"
