/* finite.c: finds the NaN or infinity that would spoil a quantization. */
#include "quantizers.h"

#include "../core/half.h"

enum { CHUNK = 1 << 16 };

typedef struct {
    const float *x;
    int64_t count;
    int64_t first; /* the least index found so far; count: none */
} finite_context;

static int is_finite(float value) { return (ql_float_to_bits(value) & 0x7f800000u) != 0x7f800000u; }

static void scan(void *context, int64_t task) {
    finite_context *c = context;
    int64_t begin = task * CHUNK, end = begin + CHUNK < c->count ? begin + CHUNK : c->count;
    uint32_t bad = 0; /* no early exit: so that the compiler can use vectors */
    for (int64_t i = begin; i < end; i++) { bad |= (uint32_t)!is_finite(c->x[i]); }
    if (!bad) { return; }
    while (is_finite(c->x[begin])) { begin++; }
    int64_t seen = __atomic_load_n(&c->first, __ATOMIC_RELAXED);
    while (begin < seen &&
           !__atomic_compare_exchange_n(&c->first, &seen, begin, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
}

int64_t ql_first_nonfinite(const float *x, int64_t count) {
    finite_context context = {x, count, count};
    ql_parallel_for((count + CHUNK - 1) / CHUNK, scan, &context);
    return context.first < count ? context.first : -1;
}
