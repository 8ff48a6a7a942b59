/* roof_body.h: the roofs of an ISA, see core/roof.h. */
#include "../core/roof.h"
#include "../quantlab.h"

#include <stdint.h> /* uintptr_t */
#include <string.h> /* memcpy */

/* more chains than latency times multiply-add units; floats a task; one stream of memory alone is not as fast as it can be */
enum { CHAINS = 12, CHUNK = 262144, STREAMS = 4 };

typedef struct {
    float *out;
    const float *x;
    int64_t count, rounds;
} roof_context;

static void fma_task(void *context, int64_t task) {
    const roof_context *c = context;
    vf sums[CHAINS], factor = v_set1(0.999f), term = v_set1((float)(task + 1)); /* never denormal */
    for (int i = 0; i < CHAINS; i++) { sums[i] = v_set1((float)i); }
    for (int64_t round = 0; round < c->rounds; round++) {
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) { sums[i] = v_fma(sums[i], factor, term); }
    }
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; i++) { KEEP(sums[i]); }
}

int64_t V_NAME(roof_fma)(int64_t tasks, int64_t rounds) {
    roof_context context = {NULL, NULL, 0, rounds};
    ql_parallel_for(tasks, fma_task, &context);
    return tasks * rounds * CHAINS * VL * 2;
}

static void read_task(void *context, int64_t task) {
    const roof_context *c = context;
    int64_t i = task * CHUNK, end = i + CHUNK < c->count ? i + CHUNK : c->count;
    int64_t part = (end - i) / (STREAMS * VL) * VL;
    vf sums[STREAMS] = {v_zero(), v_zero(), v_zero(), v_zero()};
    for (int64_t j = 0; j < part; j += VL) {
        for (int s = 0; s < STREAMS; s++) { sums[s] = v_add(sums[s], v_load(c->x + i + s * part + j)); }
    }
    for (i += STREAMS * part; i < end; i += VL) { sums[0] = v_add(sums[0], v_load_tail(c->x + i, end - i < VL ? end - i : VL)); }
    for (int s = 0; s < STREAMS; s++) { KEEP(sums[s]); }
}

void V_NAME(roof_read)(const float *x, int64_t count) {
    roof_context context = {NULL, x, count, 0};
    ql_parallel_for((count + CHUNK - 1) / CHUNK, read_task, &context);
}

static void copy_task(void *context, int64_t task) {
    const roof_context *c = context;
    int64_t i = task * CHUNK, end = i + CHUNK < c->count ? i + CHUNK : c->count;
    for (; i < end && (uintptr_t)(c->out + i) % sizeof(vf) != 0; i++) { c->out[i] = c->x[i]; }
    for (; i + VL <= end; i += VL) { v_stream(c->out + i, v_load(c->x + i)); }
    v_stream_end();
    memcpy(c->out + i, c->x + i, (size_t)(end - i) * sizeof(float));
}

void V_NAME(roof_copy)(float *out, const float *x, int64_t count) {
    roof_context context = {out, x, count, 0};
    ql_parallel_for((count + CHUNK - 1) / CHUNK, copy_task, &context);
}
