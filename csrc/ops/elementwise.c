/* elementwise.c: embedding, SwiGLU (Shazeer 2020), residual add, rows moved into the KV cache. */
#include "../formats/weight.h"

#include <math.h>   /* expf */
#include <string.h> /* memcpy */

enum { COUNT_PER_TASK = 16384 };

typedef struct {
    float *out;
    const float *a, *b;
    int64_t count;
} elementwise_context;

static int64_t task_end(const elementwise_context *c, int64_t task) {
    int64_t end = (task + 1) * COUNT_PER_TASK;
    return end < c->count ? end : c->count;
}

void ql_embedding_forward_scalar(float *out, const int32_t *ids, const ql_weight *table, int64_t t) {
    for (int64_t s = 0; s < t; s++) {
        ql_decode_forward_scalar(out + s * table->k, table->k, table, ids[s], ids[s] + 1, 0, table->k);
    }
}

static void swiglu_task(void *context, int64_t task) {
    const elementwise_context *c = context;
    for (int64_t i = task * COUNT_PER_TASK; i < task_end(c, task); i++) {
        c->out[i] = c->a[i] / (1.0f + expf(-c->a[i])) * c->b[i];
    }
}

void ql_swiglu_forward_scalar(float *out, const float *gate, const float *up, int64_t count) {
    elementwise_context context = {out, gate, up, count};
    ql_parallel_for((count + COUNT_PER_TASK - 1) / COUNT_PER_TASK, swiglu_task, &context);
}

static void add_task(void *context, int64_t task) {
    const elementwise_context *c = context;
    for (int64_t i = task * COUNT_PER_TASK; i < task_end(c, task); i++) { c->out[i] += c->a[i]; }
}

void ql_add_forward_scalar(float *y, const float *x, int64_t count) {
    elementwise_context context = {y, x, NULL, count};
    ql_parallel_for((count + COUNT_PER_TASK - 1) / COUNT_PER_TASK, add_task, &context);
}

void ql_scatter_rows_forward_scalar(float *out, const float *x, const int32_t *rows, int64_t t, int64_t c) {
    for (int64_t i = 0; i < t; i++) { memcpy(out + rows[i] * c, x + i * c, (size_t)c * sizeof *x); }
}

void ql_gather_rows_forward_scalar(float *out, const float *x, const int32_t *rows, int64_t t, int64_t c) {
    for (int64_t i = 0; i < t; i++) { memcpy(out + i * c, x + rows[i] * c, (size_t)c * sizeof *x); }
}
