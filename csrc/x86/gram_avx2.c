/* gram_avx2.c: see gram_body.h. */
#include "vec_avx2.h"

#include "gram_body.h"
