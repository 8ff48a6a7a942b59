/* pages.c: chunks of huge pages, cut from front to back; a block remembers its chunk in the 64 bytes before it. */
#define _GNU_SOURCE
#include "pages.h"

#include "memory.h"

#include <pthread.h>
#include <stdlib.h> /* aligned_alloc */
#include <sys/mman.h>

enum { ALIGN = 64, HUGE_PAGE = 2 << 20, CHUNK = 32 << 20, LARGE = 2 * HUGE_PAGE }; /* bytes; large: worth huge pages */

typedef struct chunk {
    void *mapping;
    size_t mapped, size, used; /* bytes of the mapping, and from this header on: all, cut */
    int64_t blocks;
} chunk;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static chunk *open_chunk; /* the one that blocks are cut from; it may have none */

static size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

static chunk *new_chunk(size_t bytes) {
    size_t size = round_up(bytes + ALIGN, HUGE_PAGE), mapped = size + HUGE_PAGE;
    char *mapping = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) { return NULL; }
    char *start = mapping + (HUGE_PAGE - (uintptr_t)mapping % HUGE_PAGE) % HUGE_PAGE;
    madvise(start, size, MADV_HUGEPAGE); /* refused: then small pages */
    chunk *c = (chunk *)(void *)start;
    *c = (chunk){.mapping = mapping, .mapped = mapped, .size = size, .used = ALIGN};
    return c;
}

static void unmap_if_unused(chunk *c) {
    if (c != NULL && c->blocks == 0) { munmap(c->mapping, c->mapped); }
}

void *ql_pages_take(int64_t bytes) {
    if (bytes < 0 || bytes > INT64_MAX / 2) { return NULL; }
    size_t needed = round_up((size_t)bytes, ALIGN) + 2 * ALIGN; /* the chunk's address before it, room to read on after it */
    pthread_mutex_lock(&lock);
    if (open_chunk == NULL || open_chunk->size - open_chunk->used < needed) {
        chunk *fresh = new_chunk(needed > CHUNK ? needed : CHUNK);
        if (fresh == NULL) { return pthread_mutex_unlock(&lock), NULL; }
        unmap_if_unused(open_chunk);
        open_chunk = fresh;
    }
    char *block = (char *)open_chunk + open_chunk->used + ALIGN;
    *(chunk **)(void *)(block - ALIGN) = open_chunk;
    open_chunk->used += needed;
    open_chunk->blocks++;
    pthread_mutex_unlock(&lock);
    return block;
}

void ql_pages_release(void *block) {
    if (block == NULL) { return; }
    chunk *c = *(chunk **)(void *)((char *)block - ALIGN);
    pthread_mutex_lock(&lock);
    c->blocks--;
    if (c->blocks == 0) {
        if (c == open_chunk) { open_chunk = NULL; }
        munmap(c->mapping, c->mapped);
    }
    pthread_mutex_unlock(&lock);
}

void *ql_lines_take(size_t bytes) {
    void *memory = NULL;
    if (bytes > PTRDIFF_MAX - ALIGN) { return NULL; }
    if (bytes < LARGE) { return aligned_alloc(ALIGN, round_up(bytes + 1, ALIGN)); } /* not 0 */
    return ql_host_alloc(&memory, bytes) == QL_OK ? memory : NULL;
}

void ql_lines_release(void *memory) { ql_host_release(memory); }
