/* memory.c: the host as a device: memory is malloc's, ops have run when they return, and steps are not recorded. */
#define _GNU_SOURCE
#include "memory.h"

#include <malloc.h>    /* malloc_usable_size */
#include <stdatomic.h>
#include <stdlib.h>    /* malloc */
#include <string.h>    /* memcpy */
#include <sys/mman.h>  /* madvise */

enum { HUGE_PAGE = 2 << 20, MAX_SPARE = 128 << 20, ALL_SPARES = 256 << 20, SPARES = 4 }; /* bytes; of one block, of all; blocks */

/* ---- memory ------------------------------------------------------------------------------------------------------------ */

/* The system clears the pages of fresh memory, which took 5 % of a prompt's time: some large blocks wait here for the next call. */
static _Atomic(void *) spares[SPARES];
static atomic_size_t spare_bytes;

/* puts `memory`, or NULL, in place i; what was there */
static void *exchange_spare(int i, void *memory) {
    atomic_fetch_add(&spare_bytes, malloc_usable_size(memory)); /* NULL: 0 */
    void *before = atomic_exchange(&spares[i], memory);
    atomic_fetch_sub(&spare_bytes, malloc_usable_size(before));
    return before;
}

static void release_spares(void) {
    for (int i = 0; i < SPARES; i++) { free(exchange_spare(i, NULL)); }
}

static void keep_spare(void *memory) {
    static atomic_uint turn; /* blocks that nobody asks for leave in turn */
    size_t bytes = malloc_usable_size(memory);
    for (int i = 0; i < SPARES && atomic_load(&spare_bytes) + bytes > ALL_SPARES; i++) {
        free(exchange_spare((int)(atomic_fetch_add(&turn, 1) % SPARES), NULL));
    }
    for (int i = 0; i < SPARES && memory != NULL; i++) {
        if (atomic_load(&spares[i]) == NULL) { memory = exchange_spare(i, memory); }
    }
    if (memory != NULL) { free(exchange_spare((int)(atomic_fetch_add(&turn, 1) % SPARES), memory)); }
}

/* a block of at least `bytes` bytes and at most twice as many, or NULL */
static void *take_spare(size_t bytes) {
    for (int i = 0; i < SPARES; i++) {
        void *memory = exchange_spare(i, NULL);
        if (memory == NULL) { continue; }
        size_t usable = malloc_usable_size(memory);
        if (usable >= bytes && usable - bytes <= bytes) { return memory; }
        keep_spare(memory);
    }
    return NULL;
}

ql_status ql_host_alloc(void **memory, size_t bytes) {
    if (bytes < HUGE_PAGE) {
        *memory = malloc(bytes > 0 ? bytes : 1);
    } else if ((*memory = take_spare(bytes)) == NULL) { /* a page at a time, each with an interrupt: as few as the system allows */
        size_t rounded = bytes <= SIZE_MAX - HUGE_PAGE ? (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE : bytes;
        *memory = aligned_alloc(HUGE_PAGE, rounded);
        if (*memory == NULL) { release_spares(), *memory = aligned_alloc(HUGE_PAGE, rounded); }
        if (*memory != NULL) { madvise(*memory, rounded, MADV_HUGEPAGE); } /* a wish */
    }
    return *memory != NULL ? QL_OK : ql_fail(QL_ENOMEM, "out of memory: asked for %zu bytes", bytes);
}

void ql_host_release(void *memory) {
    size_t bytes = malloc_usable_size(memory); /* NULL: 0 */
    if (bytes >= HUGE_PAGE && bytes <= MAX_SPARE && (uintptr_t)memory % HUGE_PAGE == 0) {
        keep_spare(memory);
    } else {
        free(memory);
    }
}

ql_status ql_host_alloc_shared(void **memory, size_t bytes) { return ql_host_alloc(memory, bytes); }
void ql_host_release_shared(void *memory) { ql_host_release(memory); }

/* ---- the rest ----------------------------------------------------------------------------------------------------------- */

ql_status ql_host_begin(int device) { return (void)device, QL_OK; }
ql_status ql_host_end(void) { return QL_OK; }
ql_status ql_host_finish(void) { return QL_OK; }

ql_status ql_host_upload(void *memory, const void *host, size_t bytes) {
    if (bytes > 0) { memcpy(memory, host, bytes); }
    return QL_OK;
}

ql_status ql_host_copy(void *to, const void *from, size_t bytes) { return ql_host_upload(to, from, bytes); }
ql_status ql_host_download(void *host, const void *memory, size_t bytes) { return ql_host_upload(host, memory, bytes); }

ql_status ql_host_fill(void *memory, int byte, size_t bytes) {
    if (bytes > 0) { memset(memory, byte, bytes); }
    return QL_OK;
}

ql_status ql_host_weight_upload(ql_weight *to, const ql_weight *from) { return *to = *from, QL_OK; }
void ql_host_weight_release(ql_weight *weight) { (void)weight; }

ql_status ql_host_record(void) { return ql_fail(QL_EVALUE, "steps are not recorded on the host"); }
ql_status ql_host_record_end(ql_step **step) { return *step = NULL, ql_host_record(); }
int ql_host_step_valid(const ql_step *step) { return (void)step, 0; }
ql_status ql_host_replay(ql_step *step) { return (void)step, ql_host_record(); }
void ql_host_step_release(ql_step *step) { (void)step; }
int ql_host_takes_ordered(const ql_weight *w, const ql_low_rank *l, int64_t t) { return (void)w, (void)l, (void)t, 0; }
ql_status ql_host_mark(int i) { return (void)i, QL_OK; }
ql_status ql_host_wait(int i) { return (void)i, QL_OK; }
