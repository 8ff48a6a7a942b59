/* places.h: memory for the tasks of one call: as many places as threads, each held by one task at a time. */
#ifndef QL_PLACES_H
#define QL_PLACES_H

#include <stdatomic.h>
#include <stdint.h>

typedef struct {
    atomic_int *held; /* (count,) */
    int64_t count;
} places;

static inline places make_places(atomic_int *held, int64_t count) {
    for (int64_t p = 0; p < count; p++) { atomic_init(&held[p], 0); }
    return (places){held, count};
}

/* a place that no other task works in */
static inline int64_t take_place(const places *all) {
    for (int64_t p = 0;; p = p + 1 < all->count ? p + 1 : 0) {
        if (!atomic_exchange(&all->held[p], 1)) { return p; }
    }
}

static inline void leave_place(const places *all, int64_t p) { atomic_store(&all->held[p], 0); }

#endif
