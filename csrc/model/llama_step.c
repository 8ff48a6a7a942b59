/* llama_step.c: a token more for each sequence of a generation, from its ids to the next ids, all on the backend. */
#include "llama.h"

void ql_llama_choose(const ql_llama_generation *g, const ql_backend *be) {
    int64_t b = g->batch.b;
    be->linear_forward[g->head->format](g->logits, g->hidden, g->head, b, 0);
    be->sample_forward(g->tokens, g->logits, g->streams, g->step, b, g->head->n, g->temperature, g->top_k, g->top_p, g->seed);
    be->advance_forward(g->history, g->ids, g->positions, g->rows, g->kv_len, g->step, g->tokens, b);
}

ql_status ql_llama_step(const ql_llama_generation *g, const ql_backend *be) {
    ql_status status = ql_llama_forward(g->hidden, g->model, &g->batch, &g->cache, g->workspace, be);
    if (status == QL_OK) { ql_llama_choose(g, be); }
    return status;
}
