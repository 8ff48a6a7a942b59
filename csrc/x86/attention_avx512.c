/* attention_avx512.c: attention_body.h over AVX-512. */
#include "vec_avx512.h"

#include "attention_body.h"
