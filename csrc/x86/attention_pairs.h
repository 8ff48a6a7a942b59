/* attention_pairs.h: which parts of attention's backward pass run when; the includer has chosen BLOCK, and computes a part:
 * pair_backward.
 *
 * The positions of a sequence are cut into blocks of BLOCK. A task is one block of queries against one block of keys, for one
 * key head. Step p of the whole call takes the pairs (queries i, keys i - p): no two of them share an output, and each
 * output is added to in one order, so the result depends neither on the number of threads nor on the sequences beside. */
#ifndef QL_ATTENTION_PAIRS_H
#define QL_ATTENTION_PAIRS_H

#include "../core/sizes.h"
#include "../quantlab.h"

#include <string.h> /* memset */

typedef struct {
    float *dq, *dk, *dv;
    const float *dout, *q, *k, *v, *out, *lse;
    const int64_t *q_start, *kv_start, *kv_len;
    int64_t b, hq, hkv, d;
    float scale;
    int64_t step;
} attention_context;

typedef struct {
    int64_t kv_head;
    int64_t key_row, keys;   /* first row of k and v, how many */
    int64_t query, queries;  /* first query, how many */
    int64_t seen;            /* keys of the block that the first query sees; each next one sees one more */
} block_pair;

/* adds what the pair gives to dq, dk and dv */
static void pair_backward(const attention_context *c, const block_pair *pair);

/* Sequence s owns the blocks of queries [first_block(s), first_block(s + 1)): at least as many as it needs, found without
 * a list. */
static int64_t first_block(const attention_context *c, int64_t sequence) {
    return c->q_start[sequence] / BLOCK - c->q_start[0] / BLOCK + 2 * sequence;
}

static int64_t sequence_of(const attention_context *c, int64_t block) {
    int64_t low = 0, high = c->b;
    while (high - low > 1) { /* first_block(low) <= block < first_block(high) */
        int64_t middle = (low + high) / 2;
        if (first_block(c, middle) <= block) { low = middle; } else { high = middle; }
    }
    return low;
}

static void pair_task(void *context, int64_t task) {
    const attention_context *c = context;
    int64_t block = task / c->hkv, sequence = sequence_of(c, block), length = c->kv_len[sequence];
    int64_t query0 = c->q_start[sequence], before = length - (c->q_start[sequence + 1] - query0); /* position of query0 */
    int64_t i = before / BLOCK + block - first_block(c, sequence), key0 = (i - c->step) * BLOCK;
    int64_t start = i * BLOCK < before ? before : i * BLOCK, end = at_most((i + 1) * BLOCK, length);
    if (key0 < 0 || start >= end) { return; }
    block_pair pair = {.kv_head = task % c->hkv, .key_row = c->kv_start[sequence] + key0, .keys = at_most(BLOCK, length - key0),
                       .query = query0 + start - before, .queries = end - start, .seen = start + 1 - key0};
    pair_backward(c, &pair);
}

/* the gradients of a sequence begin at 0 */
static void clear_sequence(void *context, int64_t sequence) {
    const attention_context *c = context;
    int64_t query = c->q_start[sequence], queries = c->q_start[sequence + 1] - query, row = c->hkv * c->d;
    memset(c->dq + query * c->hq * c->d, 0, (size_t)(queries * c->hq * c->d) * sizeof *c->dq);
    memset(c->dk + c->kv_start[sequence] * row, 0, (size_t)(c->kv_len[sequence] * row) * sizeof *c->dk);
    memset(c->dv + c->kv_start[sequence] * row, 0, (size_t)(c->kv_len[sequence] * row) * sizeof *c->dv);
}

static void all_pairs(attention_context *c) {
    int64_t longest = 0;
    for (int64_t s = 0; s < c->b; s++) { longest = c->kv_len[s] > longest ? c->kv_len[s] : longest; }
    ql_parallel_for(c->b, clear_sequence, c);
    for (c->step = 0; c->step * BLOCK < longest; c->step++) { ql_parallel_for(first_block(c, c->b) * c->hkv, pair_task, c); }
}

/* what a row has from the forward pass; a row of a pair is a query and one of the heads that share the key head */
typedef struct {
    int64_t index; /* query * hq + head */
    int64_t seen;  /* keys of the block */
} pair_row;

static inline pair_row row_of(const attention_context *c, const block_pair *pair, int64_t row) {
    int64_t group = c->hq / c->hkv;
    return (pair_row){(pair->query + row / group) * c->hq + pair->kv_head * group + row % group,
                      at_most(pair->seen + row / group, pair->keys)};
}

#endif
