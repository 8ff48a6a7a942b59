/* decode_avx512.c: see decode_body.h. */
#include "vec_avx512.h"

#include "decode_body.h"
