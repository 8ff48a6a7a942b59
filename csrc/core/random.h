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

/* in [0, 1), 24 random bits */
QL_INLINE float ql_uniform(uint64_t seed, int64_t stream, int64_t step) {
    uint64_t z = ql_mix64(ql_mix64(ql_mix64(seed) ^ (uint64_t)stream) ^ (uint64_t)step);
    return (float)(z >> 40) * 5.9604644775390625e-8f;
}

#endif
