/* quantize_avx512.c: see quantize_body.h. */
#include "vec_avx512.h"

#include "quantize_body.h"
