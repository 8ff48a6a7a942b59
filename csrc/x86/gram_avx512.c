/* gram_avx512.c: see gram_body.h. */
#include "vec_avx512.h"

#include "gram_body.h"
