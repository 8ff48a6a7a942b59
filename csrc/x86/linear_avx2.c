/* linear_avx2.c: see linear_body.h. */
#include "vec_avx2.h"

#include "linear_body.h"
