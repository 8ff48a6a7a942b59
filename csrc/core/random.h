/* random.h: random numbers by counting: a number follows from its place, so no state is kept and no order matters. */
#ifndef QL_RANDOM_H
#define QL_RANDOM_H

#include "inline.h"

#include <stdint.h>

/* the output function of splitmix64 (Steele, Lea, Flood 2014) */
QL_INLINE uint64_t ql_mix64(uint64_t z) {
    z += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* 24 random bits of a step; what seed and stream contribute is the same for all of them */
QL_INLINE uint64_t ql_stream_key(uint64_t seed, int64_t stream) { return ql_mix64(ql_mix64(seed) ^ (uint64_t)stream); }
QL_INLINE int32_t ql_random_bits(uint64_t key, int64_t step) { return (int32_t)(ql_mix64(key ^ (uint64_t)step) >> 40); }

/* in [0, 1): the bits over 2^24 */
QL_INLINE float ql_uniform(uint64_t seed, int64_t stream, int64_t step) {
    return (float)ql_random_bits(ql_stream_key(seed, stream), step) * 0x1p-24f;
}

#endif
