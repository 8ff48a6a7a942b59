/* keys.h: integers in the order of the floats they stand for, so that a threshold is found by halving. Known to cc and nvcc. */
#ifndef QL_KEYS_H
#define QL_KEYS_H

#include "half.h"

#define QL_LOWEST_KEY 0x00800000u  /* of the lowest finite float */
#define QL_HIGHEST_KEY 0xff7fffffu /* of the highest one */

QL_INLINE float ql_float_of_key(uint32_t key) { return ql_bits_to_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

QL_INLINE uint32_t ql_key_of_float(float x) {
    uint32_t bits = ql_float_to_bits(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

#endif
