/* roof.c: the roofs of plain C at the x86-64 baseline. */
#include "roof.h"

#include "../quantlab.h"

#include <string.h> /* memcpy */

enum { CHAINS = 16, CHUNK = 262144 }; /* floats a task */

typedef struct {
    float *out;
    const float *x;
    int64_t count, rounds;
} roof_context;

static void fma_task(void *context, int64_t task) {
    const roof_context *c = context;
    float sums[CHAINS];
    for (int i = 0; i < CHAINS; i++) { sums[i] = (float)(task + i); }
    for (int64_t round = 0; round < c->rounds; round++) {
        for (int i = 0; i < CHAINS; i++) { sums[i] = sums[i] * 0.999f + 0.5f; }
    }
    for (int i = 0; i < CHAINS; i++) { __asm__ volatile("" : : "x"(sums[i])); } /* keeps the sums alive */
}

int64_t ql_roof_fma_scalar(int64_t tasks, int64_t rounds) {
    roof_context context = {NULL, NULL, 0, rounds};
    ql_parallel_for(tasks, fma_task, &context);
    return tasks * rounds * CHAINS * 2;
}

static void read_task(void *context, int64_t task) {
    const roof_context *c = context;
    int64_t end = (task + 1) * CHUNK < c->count ? (task + 1) * CHUNK : c->count;
    float sums[CHAINS] = {0};
    for (int64_t i = task * CHUNK; i < end; i += CHAINS) {
        for (int j = 0; j < CHAINS && i + j < end; j++) { sums[j] += c->x[i + j]; }
    }
    for (int i = 0; i < CHAINS; i++) { __asm__ volatile("" : : "x"(sums[i])); }
}

void ql_roof_read_scalar(const float *x, int64_t count) {
    roof_context context = {NULL, x, count, 0};
    ql_parallel_for((count + CHUNK - 1) / CHUNK, read_task, &context);
}

static void copy_task(void *context, int64_t task) {
    const roof_context *c = context;
    int64_t first = task * CHUNK, count = c->count - first < CHUNK ? c->count - first : CHUNK;
    memcpy(c->out + first, c->x + first, (size_t)count * sizeof(float));
}

void ql_roof_copy_scalar(float *out, const float *x, int64_t count) {
    roof_context context = {out, x, count, 0};
    ql_parallel_for((count + CHUNK - 1) / CHUNK, copy_task, &context);
}
