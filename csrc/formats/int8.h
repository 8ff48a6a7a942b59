/* int8.h: row-wise symmetric int8 as in LLM.int8(): scale = max|row| / 127, value = code. */
#ifndef QL_FORMAT_INT8_H
#define QL_FORMAT_INT8_H

#include <stdint.h>

static inline float ql_int8_value(int8_t code) { return (float)code; }

#endif
