/* quantize_avx2.c: see quantize_body.h. */
#include "vec_avx2.h"

#include "quantize_body.h"
