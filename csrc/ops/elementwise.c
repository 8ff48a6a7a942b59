/* elementwise.c: embedding, SwiGLU (Shazeer 2020), residual add, dropout, rows moved into the KV cache. */
#include "../core/random.h"
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

typedef struct {
    float *dgate, *dup;
    const float *dy, *gate, *up;
    int64_t count;
} swiglu_backward_context;

static void swiglu_backward_task(void *context, int64_t task) {
    const swiglu_backward_context *c = context;
    int64_t end = (task + 1) * COUNT_PER_TASK < c->count ? (task + 1) * COUNT_PER_TASK : c->count;
    for (int64_t i = task * COUNT_PER_TASK; i < end; i++) {
        float dy = c->dy[i], gate = c->gate[i], up = c->up[i];
        float sigmoid = 1.0f / (1.0f + expf(-gate));
        c->dgate[i] = dy * up * sigmoid * (1.0f + gate * (1.0f - sigmoid));
        c->dup[i] = dy * gate * sigmoid;
    }
}

void ql_swiglu_backward_scalar(float *dgate, float *dup, const float *dy, const float *gate, const float *up, int64_t count) {
    swiglu_backward_context context = {dgate, dup, dy, gate, up, count};
    ql_parallel_for((count + COUNT_PER_TASK - 1) / COUNT_PER_TASK, swiglu_backward_task, &context);
}

typedef struct {
    float *out;
    const float *x;
    int64_t count, stream;
    float p;
    uint64_t seed;
} dropout_context;

static void dropout_task(void *context, int64_t task) {
    const dropout_context *c = context;
    int64_t end = (task + 1) * COUNT_PER_TASK < c->count ? (task + 1) * COUNT_PER_TASK : c->count;
    float factor = 1.0f / (1.0f - c->p);
    for (int64_t i = task * COUNT_PER_TASK; i < end; i++) {
        c->out[i] = ql_uniform(c->seed, c->stream, i) >= c->p ? c->x[i] * factor : 0.0f;
    }
}

void ql_dropout_forward_scalar(float *out, const float *x, int64_t count, float p, uint64_t seed, int64_t stream) {
    dropout_context context = {out, x, count, stream, p, seed};
    ql_parallel_for((count + COUNT_PER_TASK - 1) / COUNT_PER_TASK, dropout_task, &context);
}

static void add_task(void *context, int64_t task) {
    const elementwise_context *c = context;
    for (int64_t i = task * COUNT_PER_TASK; i < task_end(c, task); i++) { c->out[i] += c->a[i]; }
}

void ql_add_forward_scalar(float *y, const float *x, int64_t count) {
    elementwise_context context = {y, x, NULL, count};
    ql_parallel_for((count + COUNT_PER_TASK - 1) / COUNT_PER_TASK, add_task, &context);
}

void ql_scale_forward_scalar(float *x, float factor, int64_t count) {
    for (int64_t i = 0; i < count; i++) { x[i] *= factor; }
}

void ql_scatter_rows_forward_scalar(float *out, const float *x, const int32_t *rows, int64_t t, int64_t c) {
    for (int64_t i = 0; i < t; i++) { memcpy(out + rows[i] * c, x + i * c, (size_t)c * sizeof *x); }
}

void ql_gather_rows_forward_scalar(float *out, const float *x, const int32_t *rows, int64_t t, int64_t c) {
    for (int64_t i = 0; i < t; i++) { memcpy(out + i * c, x + rows[i] * c, (size_t)c * sizeof *x); }
}
