/* attention_backward_avx2.c: attention_backward_body.h over AVX2. */
#include "vec_avx2.h"

#include "attention_backward_body.h"
