/* rmsnorm_avx512.c: rmsnorm_body.h over AVX-512. */
#include "vec_avx512.h"

#include "rmsnorm_body.h"
