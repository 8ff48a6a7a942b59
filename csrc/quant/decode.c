/* decode.c: whole rows of a weight as float32, in parallel, columns in the order of W. */
#include "../quantlab.h"

enum { ROWS_PER_TASK = 16, COLUMNS_PER_STEP = 512 };

typedef struct {
    float *out; /* (i1 - i0, k) */
    const ql_weight *w;
    int64_t i0, i1;
} decode_context;

static void decode_task(void *context, int64_t task) {
    const decode_context *c = context;
    const ql_weight *w = c->w;
    int64_t first = c->i0 + task * ROWS_PER_TASK, last = first + ROWS_PER_TASK < c->i1 ? first + ROWS_PER_TASK : c->i1;
    float step[COLUMNS_PER_STEP];
    if (w->perm == NULL) {
        ql_cpu()->decode_forward[w->format](c->out + (first - c->i0) * w->k, w->k, w, first, last, 0, w->k);
        return;
    }
    for (int64_t i = first; i < last; i++) {
        for (int64_t j = 0; j < w->k; j += COLUMNS_PER_STEP) {
            int64_t end = j + COLUMNS_PER_STEP < w->k ? j + COLUMNS_PER_STEP : w->k;
            ql_cpu()->decode_forward[w->format](step, COLUMNS_PER_STEP, w, i, i + 1, j, end);
            for (int64_t s = j; s < end; s++) { c->out[(i - c->i0) * w->k + w->perm[s]] = step[s - j]; }
        }
    }
}

void ql_decode_rows(float *out, const ql_weight *w, int64_t i0, int64_t i1) {
    decode_context context = {out, w, i0, i1};
    ql_parallel_for((i1 - i0 + ROWS_PER_TASK - 1) / ROWS_PER_TASK, decode_task, &context);
}
