/* half.h: float16 and bfloat16 to and from float32, round to nearest even. Known to cc and nvcc. */
#ifndef QL_HALF_H
#define QL_HALF_H

#include "inline.h"

#include <stdint.h>
#include <string.h> /* memcpy: the defined way to reinterpret bits */

QL_INLINE float ql_bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

QL_INLINE uint32_t ql_float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

QL_INLINE float ql_bf16_to_float(uint16_t h) { return ql_bits_to_float((uint32_t)h << 16); }

QL_INLINE uint16_t ql_float_to_bf16(float value) {
    uint32_t bits = ql_float_to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) { return (uint16_t)((bits >> 16) | 0x40u); } /* NaN stays NaN */
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

QL_INLINE float ql_f16_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = (h >> 10) & 0x1fu, mantissa = h & 0x3ffu;
    if (exponent == 31) { return ql_bits_to_float(sign | 0x7f800000u | mantissa << 13); }
    if (exponent == 0) { /* zero or denormal: mantissa * 2^-24, exact in float32 */
        float value = (float)mantissa * 5.9604644775390625e-8f;
        return sign ? -value : value;
    }
    return ql_bits_to_float(sign | (exponent + 112u) << 23 | mantissa << 13);
}

QL_INLINE uint16_t ql_float_to_f16(float value) {
    uint32_t bits = ql_float_to_bits(value);
    uint16_t sign = (uint16_t)((bits >> 16) & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) { return (uint16_t)(sign | 0x7e00u); }
    if (bits >= 0x477ff000u) { return (uint16_t)(sign | 0x7c00u); } /* rounds to 65536 or beyond */
    if (bits < 0x38800000u) { /* below 2^-14: adding 0.5 aligns the denormal grid with the last bits of a float32 */
        float aligned = ql_bits_to_float(bits) + 0.5f;
        return (uint16_t)(sign | (ql_float_to_bits(aligned) - 0x3f000000u));
    }
    bits += 0xc8000fffu + ((bits >> 13) & 1u); /* exponent - 112, and round to nearest even */
    return (uint16_t)(sign | bits >> 13);
}

#endif
