/* int8.h: row-wise symmetric int8 as in LLM.int8(): scale = max|row| (its SCB), value = code / 127. The scale is the
 * row's maximum itself, not that over 127, because the latter does not give the former back to the last bit. */
#ifndef QL_FORMAT_INT8_H
#define QL_FORMAT_INT8_H

#include "../core/inline.h"

#include <stdint.h>

#define QL_INT8_STEP (1.0f / 127.0f)

QL_INLINE float ql_int8_value(int8_t code) { return (float)code * QL_INT8_STEP; }

#endif
