/* attention_avx2.c: attention_body.h over AVX2. */
#include "vec_avx2.h"

#include "attention_body.h"
