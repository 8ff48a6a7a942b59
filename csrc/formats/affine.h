/* affine.h: n-bit codes with an integer zero point: value = code - zero, exact in float32. Symmetric weights have
 * zero = 2^(bits-1). The stream of a row is that of core/bits.h. */
#ifndef QL_FORMAT_AFFINE_H
#define QL_FORMAT_AFFINE_H

#include "../core/bits.h"

QL_INLINE float ql_affine_value(uint32_t code, uint32_t zero) { return (float)((int32_t)code - (int32_t)zero); }
QL_INLINE uint32_t ql_affine_symmetric_zero(int bits) { return 1u << (bits - 1); }

#endif
