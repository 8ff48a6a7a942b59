/* float.h: f32, f16, bf16: the code is the value. */
#ifndef QL_FORMAT_FLOAT_H
#define QL_FORMAT_FLOAT_H

#include "../core/half.h"

QL_INLINE float ql_f32_value(const void *codes, int64_t index) { return ((const float *)codes)[index]; }
QL_INLINE float ql_f16_value(const void *codes, int64_t index) {
    return ql_f16_to_float(((const uint16_t *)codes)[index]);
}
QL_INLINE float ql_bf16_value(const void *codes, int64_t index) {
    return ql_bf16_to_float(((const uint16_t *)codes)[index]);
}

#endif
