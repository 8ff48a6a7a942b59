/* attention_backward_avx512.c: attention_backward_body.h over AVX-512. */
#include "vec_avx512.h"

#include "attention_backward_body.h"
