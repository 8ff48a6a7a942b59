/* bits.h: a row of n-bit codes as a little-endian bit stream in 32-bit words. 32 codes of b bits fill b words, so
 * 3 bits is no special case. The order is that of GPTQ checkpoints. */
#ifndef QL_BITS_H
#define QL_BITS_H

#include "inline.h"

#include <stdint.h>

QL_INLINE int64_t ql_words_per_row(int64_t k, int bits) { return (k * bits + 31) / 32; }

QL_INLINE uint32_t ql_code_get(const uint32_t *words, int64_t index, int bits) {
    int64_t bit = index * bits;
    int shift = (int)(bit & 31);
    uint32_t code = words[bit >> 5] >> shift;
    if (shift + bits > 32) { code |= words[(bit >> 5) + 1] << (32 - shift); }
    return code & ((1u << bits) - 1u);
}

/* The words must be zero where no code was put yet. */
QL_INLINE void ql_code_put(uint32_t *words, int64_t index, int bits, uint32_t code) {
    int64_t bit = index * bits;
    int shift = (int)(bit & 31);
    words[bit >> 5] |= code << shift;
    if (shift + bits > 32) { words[(bit >> 5) + 1] |= code >> (32 - shift); }
}

#endif
