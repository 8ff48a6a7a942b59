/* panels.h: what the kernels of products with few rows share: where in ql_weight.packed (formats/packed.h) they read, a few panels at a
 * time, since each of them is a stream of memory of its own and one stream alone is not as fast as it can be; what they fetch
 * meanwhile; their tasks; and where results go. Included after the vector vocabulary. */
#ifndef QL_PANELS_H
#define QL_PANELS_H

#include "../core/sizes.h"
#include "../formats/packed.h"
#include "../quantlab.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline)) /* m, bits and the like are constants after inlining */

enum {
    TASK_BYTES = 256 << 10, /* of W: large against the cost of a task, small against a thread's share */
    SMALL_BYTES = 128 << 10 /* of W, read for each row of x: a thread alone has done before another has begun */
};

/* vector v, VL lanes each, of `rows` rows in each of consecutive panels, those of the first one from p on */
static inline const uint32_t *lanes_of(const uint32_t *p, const ql_packed_layout *l, int v, int rows) {
    return p + v / (rows / VL) * l->panel + v % (rows / VL) * VL;
}

/* bytes from a word of group `group` to what to fetch meanwhile: `ahead` on in its panel or, near the end, in the one that this
 * thread will read next as this stream */
static inline int64_t ahead_of(const ql_packed_layout *l, int64_t group, int panels, int64_t ahead) {
    int64_t left = (l->groups - 1 - group) * (l->head + l->blocks * l->words * l->rows) * 4;
    return left < ahead ? ahead + (panels - 1) * l->panel * 4 : ahead;
}

/* The same of a matrix whose rows are as they are, `rows` of them at a time: from column j of k on, to what is `ahead` columns on in its
 * row or, near the end, in the next rows. In elements. */
static inline int64_t row_ahead(int64_t j, int64_t k, int64_t stride, int64_t rows, int64_t ahead) {
    int64_t on = at_most(ahead, k);
    return j + on < k ? on : (rows - 1) * stride + on;
}

/* VL elements of row r of y (m, n) from column i, as many as there are */
static inline void store_lanes(float *y, int64_t n, int64_t r, int64_t i, vf value, int accumulate) {
    int64_t count = at_most(VL, n - i);
    if (count < 1) { return; }
    y += r * n + i;
    v_store_tail(y, accumulate ? v_add(v_load_tail(y, count), value) : value, count);
}

/* Panels or rows of a task, where one has `bytes` bytes of W and a kernel likes `at_once`, for m rows of x: as many tasks for each
 * thread, four at least if that leaves `at_once` to each. */
static inline int64_t part_of(int64_t count, int64_t bytes, int64_t at_once, int64_t m) {
    if (count * bytes * m <= SMALL_BYTES) { return count; }
    int64_t large = TASK_BYTES / bytes > at_once ? TASK_BYTES / bytes : at_once;
    int64_t rounds = pieces(count, ql_threads() * large), part = pieces(count, ql_threads() * (rounds > 4 ? rounds : 4));
    if (part < at_once) { return count < 2 * ql_threads() * at_once ? 1 : at_once; }
    return round_up(part, at_once);
}

#endif
