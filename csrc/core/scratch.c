/* scratch.c: memory that an op works in, one growing region a thread, so that kernels allocate nothing. */
#define _GNU_SOURCE
#include "../quantlab.h"

#include <pthread.h>  /* pthread_key_create */
#include <stdlib.h>   /* malloc */
#include <sys/mman.h> /* mmap */

enum { GRAIN = 2 << 20 }; /* bytes: a huge page */

typedef struct {
    void *start;
    size_t bytes;
} region;

static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int have_key;

static void release(void *value) {
    region *r = value;
    if (r->start != NULL) { munmap(r->start, r->bytes); }
    free(r);
}

static void make_key(void) { have_key = pthread_key_create(&key, release) == 0; }

static region *own_region(void) {
    pthread_once(&once, make_key);
    if (!have_key) { return NULL; }
    region *r = pthread_getspecific(key);
    if (r == NULL && (r = calloc(1, sizeof *r)) != NULL && pthread_setspecific(key, r) != 0) { free(r), r = NULL; }
    return r;
}

void *ql_scratch(size_t bytes) {
    region *r = own_region();
    if (r == NULL) { return NULL; }
    if (bytes > r->bytes) {
        if (r->start != NULL) { munmap(r->start, r->bytes); }
        *r = (region){NULL, 0};
        size_t rounded = (bytes + GRAIN - 1) / GRAIN * GRAIN;
        void *start = mmap(NULL, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (start == MAP_FAILED) { return NULL; }
        madvise(start, rounded, MADV_HUGEPAGE); /* a wish */
        *r = (region){start, rounded};
    }
    return r->start;
}
