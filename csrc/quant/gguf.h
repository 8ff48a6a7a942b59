/* gguf.h: GGUF's plain quantized types, which are only read. */
#ifndef QL_QUANT_GGUF_H
#define QL_QUANT_GGUF_H

#include "../quantlab.h"

enum { QL_GGUF_BLOCK = 32 }; /* values */

typedef enum { QL_GGUF_Q4_0, QL_GGUF_Q4_1, QL_GGUF_Q8_0 } ql_gguf_kind;

int64_t ql_gguf_block_bytes(ql_gguf_kind kind);

/* out (count, QL_GGUF_BLOCK); blocks (count, ql_gguf_block_bytes(kind)) */
void ql_gguf_decode(float *out, const uint8_t *blocks, int64_t count, ql_gguf_kind kind);

#endif
