/* elementwise_body.h: embedding, SwiGLU and the residual add by vectors. */
#include "../quantlab.h"

enum { ELEMENTS_PER_TASK = 16384 };

typedef struct {
    float *out;
    const float *a, *b;
    int64_t count;
} elementwise_context;

static int64_t task_end(const elementwise_context *c, int64_t task) {
    int64_t end = (task + 1) * ELEMENTS_PER_TASK;
    return end < c->count ? end : c->count;
}

static vf swiglu(vf gate, vf up) { return v_mul(v_mul(gate, v_sigmoid(gate)), up); }

static void swiglu_task(void *context, int64_t task) {
    const elementwise_context *c = context;
    int64_t i = task * ELEMENTS_PER_TASK, end = task_end(c, task);
    for (; i + VL <= end; i += VL) { v_store(c->out + i, swiglu(v_load(c->a + i), v_load(c->b + i))); }
    if (i < end) { v_store_tail(c->out + i, swiglu(v_load_tail(c->a + i, end - i), v_load_tail(c->b + i, end - i)), end - i); }
}

void V_NAME(swiglu_forward)(float *out, const float *gate, const float *up, int64_t count) {
    elementwise_context context = {out, gate, up, count};
    ql_parallel_for((count + ELEMENTS_PER_TASK - 1) / ELEMENTS_PER_TASK, swiglu_task, &context);
}

static void add_task(void *context, int64_t task) {
    const elementwise_context *c = context;
    int64_t i = task * ELEMENTS_PER_TASK, end = task_end(c, task);
    for (; i + VL <= end; i += VL) { v_store(c->out + i, v_add(v_load(c->out + i), v_load(c->a + i))); }
    if (i < end) { v_store_tail(c->out + i, v_add(v_load_tail(c->out + i, end - i), v_load_tail(c->a + i, end - i)), end - i); }
}

void V_NAME(add_forward)(float *y, const float *x, int64_t count) {
    elementwise_context context = {y, x, NULL, count};
    ql_parallel_for((count + ELEMENTS_PER_TASK - 1) / ELEMENTS_PER_TASK, add_task, &context);
}

/* ---- embedding: rows through this table's decode -------------------------------------------------------------- */

typedef struct {
    float *out;
    const int32_t *ids;
    const ql_weight *table;
    int64_t t, rows_per_task;
} embedding_context;

static void embedding_rows(void *context, int64_t task) {
    const embedding_context *c = context;
    const ql_weight *w = c->table;
    int64_t first = task * c->rows_per_task, last = first + c->rows_per_task < c->t ? first + c->rows_per_task : c->t;
    for (int64_t s = first; s < last; s++) {
        ql_cpu()->decode_forward[w->format](c->out + s * w->k, w->k, w, c->ids[s], c->ids[s] + 1, 0, w->k);
    }
}

void V_NAME(embedding_forward)(float *out, const int32_t *ids, const ql_weight *table, int64_t t) {
    int64_t rows = ELEMENTS_PER_TASK / (table->k + 1) + 1;
    embedding_context context = {out, ids, table, t, rows};
    ql_parallel_for((t + rows - 1) / rows, embedding_rows, &context);
}
