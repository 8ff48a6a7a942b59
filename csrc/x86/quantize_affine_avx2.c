/* quantize_affine_avx2.c: see quantize_affine_body.h. */
#include "vec_avx2.h"

#include "quantize_affine_body.h"
