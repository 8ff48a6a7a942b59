/* elementwise_body.h: embedding, SwiGLU and its gradient, dropout and the residual add by vectors. */
#include "../core/random.h"
#include "../quantlab.h"

enum { ELEMENTS_PER_TASK = 16384, RANDOM_AT_ONCE = 16 * VL };

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

/* ---- training ---------------------------------------------------------------------------------------------------- */

typedef struct {
    float *dgate, *dup;
    const float *dy, *gate, *up;
    int64_t count;
} swiglu_gradient;

static void swiglu_backward_task(void *context, int64_t task) {
    const swiglu_gradient *c = context;
    int64_t end = (task + 1) * ELEMENTS_PER_TASK < c->count ? (task + 1) * ELEMENTS_PER_TASK : c->count;
    for (int64_t i = task * ELEMENTS_PER_TASK; i < end; i += VL) {
        int64_t lanes = end - i < VL ? end - i : VL;
        vf dy = v_load_tail(c->dy + i, lanes), gate = v_load_tail(c->gate + i, lanes), up = v_load_tail(c->up + i, lanes);
        vf one = v_set1(1.0f), sigmoid = v_sigmoid(gate);
        vf slope = v_add(one, v_mul(gate, v_sub(one, sigmoid)));
        v_store_tail(c->dgate + i, v_mul(v_mul(v_mul(dy, up), sigmoid), slope), lanes);
        v_store_tail(c->dup + i, v_mul(v_mul(dy, gate), sigmoid), lanes);
    }
}

void V_NAME(swiglu_backward)(float *dgate, float *dup, const float *dy, const float *gate, const float *up, int64_t count) {
    swiglu_gradient context = {dgate, dup, dy, gate, up, count};
    ql_parallel_for((count + ELEMENTS_PER_TASK - 1) / ELEMENTS_PER_TASK, swiglu_backward_task, &context);
}

typedef struct {
    float *out;
    const float *x;
    int64_t count;
    uint64_t key;
    float p;
} dropout_context;

static void dropout_task(void *context, int64_t task) {
    const dropout_context *c = context;
    int64_t end = (task + 1) * ELEMENTS_PER_TASK < c->count ? (task + 1) * ELEMENTS_PER_TASK : c->count;
    vf below = v_set1(c->p * 0x1p24f), factor = v_set1(1.0f / (1.0f - c->p)); /* p in units of the 24 random bits */
    for (int64_t first = task * ELEMENTS_PER_TASK; first < end; first += RANDOM_AT_ONCE) {
        int32_t bits[RANDOM_AT_ONCE];
        for (int j = 0; j < RANDOM_AT_ONCE; j++) { bits[j] = ql_random_bits(c->key, first + j); } /* the compiler's vectors */
        for (int64_t j = 0; j < RANDOM_AT_ONCE && first + j < end; j += VL) {
            int64_t i = first + j, lanes = end - i < VL ? end - i : VL;
            vf kept = v_mul(v_load_tail(c->x + i, lanes), factor);
            v_store_tail(c->out + i, v_select(v_lt(vi_to_vf(vi_load(bits + j)), below), v_zero(), kept), lanes);
        }
    }
}

void V_NAME(dropout_forward)(float *out, const float *x, int64_t count, float p, uint64_t seed, int64_t stream) {
    dropout_context context = {out, x, count, ql_stream_key(seed, stream), p};
    ql_parallel_for((count + ELEMENTS_PER_TASK - 1) / ELEMENTS_PER_TASK, dropout_task, &context);
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
