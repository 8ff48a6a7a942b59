/* linear_avx512.c: see linear_body.h. */
#include "vec_avx512.h"

#include "linear_body.h"
