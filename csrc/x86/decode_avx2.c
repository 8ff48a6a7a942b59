/* decode_avx2.c: see decode_body.h. */
#include "vec_avx2.h"

#include "decode_body.h"
