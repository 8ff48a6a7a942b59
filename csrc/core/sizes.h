/* sizes.h: counts of elements, and of the blocks that hold them. */
#ifndef QL_SIZES_H
#define QL_SIZES_H

#include <stdint.h>

static inline int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }

/* blocks of `size` that hold `count` */
static inline int64_t pieces(int64_t count, int64_t size) { return (count + size - 1) / size; }

static inline int64_t round_up(int64_t count, int64_t size) { return pieces(count, size) * size; }

#endif
