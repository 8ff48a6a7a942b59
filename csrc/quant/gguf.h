/* gguf.h: the quantized types of GGUF files, which are only read. */
#ifndef QL_QUANT_GGUF_H
#define QL_QUANT_GGUF_H

#include "../quantlab.h"

typedef struct {
    const char *name;
    int32_t values, bytes; /* of a block */
    void (*decode)(float *out, const uint8_t *block);
} ql_gguf_type;

extern const ql_gguf_type ql_gguf_types[]; /* to the one without a name */

/* out (count, type->values); blocks (count, type->bytes) */
void ql_gguf_decode(float *out, const uint8_t *blocks, int64_t count, const ql_gguf_type *type);

#endif
