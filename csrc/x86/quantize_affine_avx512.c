/* quantize_affine_avx512.c: see quantize_affine_body.h. */
#include "vec_avx512.h"

#include "quantize_affine_body.h"
