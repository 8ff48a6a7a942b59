/* attention_body.h: causal attention by vectors whose lanes are queries.
 *
 * The rows of a task are ROWS (query, head) pairs of one sequence and one key head: row r is query r / g, head r % g of
 * that key head's group of g heads, so grouped heads share every load of k and v. A lane is a row:
 *   qt (d, ROWS)     the queries, transposed and scaled
 *   st (KEYS, ROWS)  scores of a block of keys, then their weights
 *   ot (d, ROWS)     the outputs, not yet divided by the sum of the weights
 * k and v are read where they are, one broadcast an element. A lane does the same operations in the same order whatever
 * the lanes beside it hold: dot products over i = 0..d-1, blocks of KEYS keys counted from key 0 of the sequence, and keys
 * that its query must not see leave it as it is. So a token's result does not depend on its batch, its chunk or the threads.
 *
 * A sequence with one query, a step of generation, would leave most lanes idle: there the lanes are elements of a head, and the
 * heads of a key head, HEADS at most, take turns at each block of keys. Parts of PART keys have sums of their own, which are joined in
 * order, so that several threads can share a long sequence. It adds in another order, so a chunk of one query is the exception to the
 * sentence above. */
#include "../core/sizes.h"
#include "overlay.h"

#include <float.h>  /* FLT_MAX */
#include <math.h>   /* logf, INFINITY */
#include <string.h> /* memcpy */

enum { ROWS = 2 * VL, KEYS = 64, MAX_D = 256, MAX_TILE = 8 };
enum { HEADS = 8, PART = 512, FEW_TASKS = 4 }; /* of one query: heads at a time, keys whose sums are made apart, tasks a thread */
#define ALWAYS_INLINE static inline __attribute__((always_inline)) /* tile and vectors are constants after inlining */

typedef struct {
    const float *k, *v;       /* key 0 of the sequence, this key head */
    int64_t stride, d;        /* floats from a key to the next; head size */
    int64_t count;            /* rows in use, <= ROWS; lanes beyond repeat the last one and are not stored */
    int64_t index[ROWS];      /* row -> query * hq + head */
    int64_t keys[ROWS];       /* row -> how many keys it sees */
    int64_t keys_min, keys_max;
    _Alignas(64) float maximum[ROWS], sum[ROWS], keep[ROWS], qt[MAX_D * ROWS], ot[MAX_D * ROWS], st[KEYS * ROWS];
} attention_rows;

/* a block of keys: [first, first + count) of the sequence; every row sees the first `plain` of them */
typedef struct {
    int64_t first, count, plain;
    _Alignas(64) float seen[ROWS]; /* row -> how many keys of the block it sees, as a float */
} key_block;

ALWAYS_INLINE vm sees(const key_block *block, int64_t s, int r) {
    return v_lt(v_set1((float)s), v_load(block->seen + r * VL));
}

/* scores of `tile` keys from key s of the block: st[s, :] = sum over i of k[s, i] qt[i, :] */
ALWAYS_INLINE void score_tile(attention_rows *a, const key_block *block, int64_t s, const int tile, const int vectors) {
    vf sums[MAX_TILE][2];
    const float *k[MAX_TILE];
    for (int j = 0; j < tile; j++) {
        int64_t key = s + j < block->count ? s + j : block->count - 1; /* beyond the block: computed again, not used */
        k[j] = a->k + (block->first + key) * a->stride;
        for (int r = 0; r < vectors; r++) { sums[j][r] = v_zero(); }
    }
    for (int64_t i = 0; i < a->d; i++) {
        vf q0 = v_load(a->qt + i * ROWS), q1 = vectors > 1 ? v_load(a->qt + i * ROWS + VL) : q0;
#pragma GCC unroll 8
        for (int j = 0; j < tile; j++) {
            vf key = v_set1(k[j][i]);
            sums[j][0] = v_fma(key, q0, sums[j][0]);
            if (vectors > 1) { sums[j][1] = v_fma(key, q1, sums[j][1]); }
        }
    }
    for (int j = 0; j < tile; j++) {
        for (int r = 0; r < vectors; r++) { v_store(a->st + (s + j) * ROWS + r * VL, sums[j][r]); }
    }
}

/* st from scores to weights exp(score - maximum); the running maximum and sum move on; keep = exp(old - new maximum) */
ALWAYS_INLINE void softmax_block(attention_rows *a, const key_block *block, int r) {
    float *st = a->st + r * VL;
    vf old = v_load(a->maximum + r * VL), maximum = old;
    for (int64_t s = 0; s < block->plain; s++) { maximum = v_max(maximum, v_load(st + s * ROWS)); }
    for (int64_t s = block->plain; s < block->count; s++) {
        maximum = v_max(maximum, v_select(sees(block, s, r), v_load(st + s * ROWS), maximum));
    }
    vf keep = v_exp(v_sub(old, maximum)), sum = v_mul(v_load(a->sum + r * VL), keep);
    for (int64_t s = 0; s < block->plain; s++) {
        vf weight = v_exp(v_sub(v_load(st + s * ROWS), maximum));
        v_store(st + s * ROWS, weight);
        sum = v_add(sum, weight);
    }
    for (int64_t s = block->plain; s < block->count; s++) {
        vm seen = sees(block, s, r);
        vf weight = v_exp(v_select(seen, v_sub(v_load(st + s * ROWS), maximum), v_zero()));
        v_store(st + s * ROWS, weight);
        sum = v_select(seen, v_add(sum, weight), sum);
    }
    v_store(a->maximum + r * VL, maximum);
    v_store(a->sum + r * VL, sum);
    v_store(a->keep + r * VL, keep);
}

/* ot[i, :] = ot[i, :] * keep + sum over the block's keys of v[s, i] st[s, :], for `tile` columns from i0 */
ALWAYS_INLINE void value_tile(attention_rows *a, const key_block *block, int64_t i0, const int tile, const int vectors) {
    vf sums[MAX_TILE][2];
    for (int j = 0; j < tile; j++) {
        for (int r = 0; r < vectors; r++) {
            sums[j][r] = v_mul(v_load(a->ot + (i0 + j) * ROWS + r * VL), v_load(a->keep + r * VL));
        }
    }
    const float *v = a->v + block->first * a->stride + i0, *st = a->st;
    for (int64_t s = 0; s < block->plain; s++, v += a->stride, st += ROWS) {
        vf w0 = v_load(st), w1 = vectors > 1 ? v_load(st + VL) : w0;
#pragma GCC unroll 8
        for (int j = 0; j < tile; j++) {
            vf value = v_set1(v[j]);
            sums[j][0] = v_fma(value, w0, sums[j][0]);
            if (vectors > 1) { sums[j][1] = v_fma(value, w1, sums[j][1]); }
        }
    }
    for (int64_t s = block->plain; s < block->count; s++, v += a->stride) {
        for (int r = 0; r < vectors; r++) {
            vm seen = sees(block, s, r);
            vf weight = v_load(a->st + s * ROWS + r * VL);
#pragma GCC unroll 8
            for (int j = 0; j < tile; j++) { sums[j][r] = v_select(seen, v_fma(v_set1(v[j]), weight, sums[j][r]), sums[j][r]); }
        }
    }
    for (int j = 0; j < tile; j++) {
        for (int r = 0; r < vectors; r++) { v_store(a->ot + (i0 + j) * ROWS + r * VL, sums[j][r]); }
    }
}

ALWAYS_INLINE void attend_keys(attention_rows *a, const int tile, const int vectors) {
    key_block block;
    for (block.first = 0; block.first < a->keys_max; block.first += KEYS) {
        int64_t left = a->keys_max - block.first, plain = a->keys_min - block.first;
        block.count = left < KEYS ? left : KEYS;
        block.plain = plain < 0 ? 0 : plain < block.count ? plain : block.count;
        for (int row = 0; block.plain < block.count && row < ROWS; row++) {
            int64_t seen = a->keys[row] - block.first;
            block.seen[row] = (float)(seen < 0 ? 0 : seen < KEYS ? seen : KEYS);
        }
        for (int64_t s = 0; s < block.count; s += tile) { score_tile(a, &block, s, tile, vectors); }
        for (int r = 0; r < vectors; r++) { softmax_block(a, &block, r); }
        int64_t i = 0;
        for (; i + tile <= a->d; i += tile) { value_tile(a, &block, i, tile, vectors); }
        for (; i < a->d; i += 2) { value_tile(a, &block, i, 2, vectors); } /* d is even */
    }
}

static void attend_one_vector(attention_rows *a) { attend_keys(a, MAX_TILE, 1); }
static void attend_two_vectors(attention_rows *a) { attend_keys(a, V_AVX512 ? MAX_TILE : MAX_TILE / 2, 2); } /* registers */

/* a square of 4 x 4: out[j * ldo + i] = in[i][j] */
static void transpose_4(float *out, int64_t ldo, const float *in0, const float *in1, const float *in2, const float *in3) {
    __m128 a = _mm_loadu_ps(in0), b = _mm_loadu_ps(in1), c = _mm_loadu_ps(in2), d = _mm_loadu_ps(in3);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(out, a);
    _mm_storeu_ps(out + ldo, b);
    _mm_storeu_ps(out + 2 * ldo, c);
    _mm_storeu_ps(out + 3 * ldo, d);
}

/* qt = scaled queries, transposed; ot = 0 */
static void load_queries(attention_rows *a, const attention_call *c, int64_t lanes) {
    for (int64_t r = 0; r < lanes; r += 4) {
        const float *q[4];
        for (int64_t j = 0; j < 4; j++) { q[j] = c->q + a->index[r + j] * c->d; }
        int64_t i = 0;
        for (; i + 4 <= c->d; i += 4) { transpose_4(a->qt + i * ROWS + r, ROWS, q[0] + i, q[1] + i, q[2] + i, q[3] + i); }
        for (; i < c->d; i++) {
            for (int64_t j = 0; j < 4; j++) { a->qt[i * ROWS + r + j] = q[j][i]; }
        }
    }
    vf scale = v_set1(c->scale);
    for (int64_t i = 0; i < c->d; i++) {
        for (int64_t r = 0; r < lanes; r += VL) {
            v_store(a->qt + i * ROWS + r, v_mul(v_load(a->qt + i * ROWS + r), scale));
            v_store(a->ot + i * ROWS + r, v_zero());
        }
    }
}

/* keys of a sequence that every query of this call sees */
static int64_t keys_before(const attention_call *c, int64_t sequence) {
    return c->kv_len[sequence] - (c->q_start[sequence + 1] - c->q_start[sequence]);
}

/* the rows of a sequence and key head */
static int64_t row_count(const attention_call *c, int64_t sequence) {
    int64_t queries = c->q_start[sequence + 1] - c->q_start[sequence], left = c->positions - keys_before(c, sequence);
    return (queries < left ? queries : left) * (c->hq / c->hkv);
}

/* rows [row0, row0 + count) of sequence `sequence` and key head `kv_head` */
static void load_rows(attention_rows *a, const attention_call *c, int64_t sequence, int64_t kv_head, int64_t row0) {
    int64_t group = c->hq / c->hkv, first = c->q_start[sequence], rows = row_count(c, sequence), before = keys_before(c, sequence);
    int64_t offset = (c->kv_start[sequence] * c->hkv + kv_head) * c->d;
    a->k = c->k + offset, a->v = c->v + offset, a->stride = c->hkv * c->d, a->d = c->d;
    a->count = rows - row0 < ROWS ? rows - row0 : ROWS;
    for (int64_t r = 0; r < ROWS; r++) {
        int64_t row = row0 + (r < a->count ? r : a->count - 1), query = row / group;
        a->index[r] = (first + query) * c->hq + kv_head * group + row % group;
        a->keys[r] = before + query + 1;
        a->maximum[r] = -INFINITY, a->sum[r] = 0.0f;
    }
    a->keys_min = a->keys[0], a->keys_max = a->keys[ROWS - 1];
    load_queries(a, c, a->count <= VL ? VL : ROWS);
}

static void store_rows(attention_rows *a, const attention_call *c) {
    for (int64_t r = 0; r < a->count; r += VL) {
        vf inverse = v_div(v_set1(1.0f), v_load(a->sum + r));
        for (int64_t i = 0; i < c->d; i++) { v_store(a->ot + i * ROWS + r, v_mul(v_load(a->ot + i * ROWS + r), inverse)); }
    }
    for (int64_t r = 0; r < a->count; r += 4) {
        int64_t rows = a->count - r < 4 ? a->count - r : 4, i = 0;
        for (; rows == 4 && i + 4 <= c->d; i += 4) {
            float square[16];
            const float *ot = a->ot + i * ROWS + r;
            transpose_4(square, 4, ot, ot + ROWS, ot + 2 * ROWS, ot + 3 * ROWS);
            for (int64_t j = 0; j < 4; j++) { memcpy(c->out + a->index[r + j] * c->d + i, square + 4 * j, 4 * sizeof(float)); }
        }
        for (; i < c->d; i++) {
            for (int64_t j = 0; j < rows; j++) { c->out[a->index[r + j] * c->d + i] = a->ot[i * ROWS + r + j]; }
        }
    }
    for (int64_t r = 0; r < a->count; r++) {
        if (c->lse != NULL) { c->lse[a->index[r]] = a->maximum[r] + logf(a->sum[r]); }
    }
}

/* ---- one query ------------------------------------------------------------------------------------------------- */

/* o[i ..] = o * keep + sum over keys of weights[s] v[s, i ..], `vectors` vectors of it, the last with `last` lanes */
ALWAYS_INLINE void weigh(float *o, const float *v, int64_t stride, const float *weights, int64_t keys, float keep,
                         const int vectors, int64_t last) {
    vf sum[4];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) { sum[j] = v_mul(v_load(o + j * VL), v_set1(keep)); }
    for (int64_t s = 0; s < keys; s++, v += stride) {
        vf weight = v_set1(weights[s]);
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) {
            vf value = last < VL && j == vectors - 1 ? v_load_tail(v + j * VL, last) : v_load(v + j * VL);
            sum[j] = v_fma(weight, value, sum[j]);
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) { v_store(o + j * VL, sum[j]); }
}

/* st from scores to weights; returns what older sums are multiplied by */
static float softmax_one(float *st, int64_t count, float *maximum, float *sum) {
    for (int64_t s = count; s % VL != 0; s++) { st[s] = -INFINITY; }
    vf top = v_set1(*maximum);
    for (int64_t s = 0; s < count; s += VL) { top = v_max(top, v_load(st + s)); }
    vf old = v_set1(*maximum), total = v_zero();
    *maximum = v_hmax(top);
    top = v_set1(*maximum);
    for (int64_t s = 0; s < count; s += VL) {
        vf weight = v_exp(v_sub(v_load(st + s), top));
        v_store(st + s, weight);
        total = v_add(total, weight);
    }
    float keep = v_hmax(v_exp(v_sub(old, top)));
    *sum = *sum * keep + v_sum(total);
    return keep;
}

/* what a query of one head has seen of some keys: the sum of its weights, relative to the maximum of its scores, and that of the values
 * times them */
typedef struct {
    _Alignas(64) float o[MAX_D + VL];
    float maximum, sum;
} key_sums;

/* one more block of `count` keys */
static void attend_block(key_sums *a, const float *q, const float *k, const float *v, int64_t stride, int64_t count, int64_t d) {
    _Alignas(64) float st[KEYS];
    int64_t i = 0;
    for (int64_t s = 0; s < count; s++) { st[s] = v_dot(q, k + s * stride, d); }
    float keep = softmax_one(st, count, &a->maximum, &a->sum);
    for (; i + 4 * VL <= d; i += 4 * VL) { weigh(a->o + i, v + i, stride, st, count, keep, 4, VL); }
    for (; i < d; i += VL) { weigh(a->o + i, v + i, stride, st, count, keep, 1, d - i < VL ? d - i : VL); }
}

/* The one query of a sequence and part `part` of its keys, for heads [head, head + count) of one key head, whose sums are `apart` from
 * one another: a block of keys stays in the cache for all of them. */
static void attend_part(key_sums *sums, int64_t apart, const attention_call *c, int64_t sequence, int64_t head, int64_t count, int64_t part) {
    int64_t d = c->d, stride = c->hkv * d, end = at_most((part + 1) * PART, c->kv_len[sequence]);
    int64_t offset = (c->kv_start[sequence] * c->hkv + head / (c->hq / c->hkv)) * d;
    const float *query = c->q + (c->q_start[sequence] * c->hq + head) * d;
    _Alignas(64) float q[HEADS][MAX_D];
    for (int64_t h = 0; h < count; h++) {
        key_sums *a = &sums[h * apart];
        a->maximum = -FLT_MAX, a->sum = 0.0f; /* not -infinity, which all scores of a part may be: they weigh nothing */
        memset(a->o, 0, sizeof a->o);
        for (int64_t i = 0; i < d; i++) { q[h][i] = query[h * d + i] * c->scale; }
    }
    for (int64_t first = part * PART; first < end; first += KEYS) {
        const float *k = c->k + offset + first * stride, *v = c->v + offset + first * stride;
        for (int64_t h = 0; h < count; h++) { attend_block(&sums[h * apart], q[h], k, v, stride, at_most(KEYS, end - first), d); }
    }
}

/* all += part */
static void join_parts(key_sums *all, const key_sums *part, int64_t d) {
    float top = all->maximum > part->maximum ? all->maximum : part->maximum;
    float keep = v_hmax(v_exp(v_set1(all->maximum - top))), take = v_hmax(v_exp(v_set1(part->maximum - top)));
    for (int64_t i = 0; i < d; i += VL) { /* o has room for whole vectors */
        v_store(all->o + i, v_fma(v_load(part->o + i), v_set1(take), v_mul(v_load(all->o + i), v_set1(keep))));
    }
    all->sum = all->sum * keep + part->sum * take;
    all->maximum = top;
}

static void store_sums(const attention_call *c, int64_t sequence, int64_t head, const key_sums *a) {
    int64_t index = c->q_start[sequence] * c->hq + head;
    for (int64_t i = 0; i < c->d; i++) { c->out[index * c->d + i] = a->o[i] / a->sum; }
    if (c->lse != NULL) { c->lse[index] = a->maximum + logf(a->sum); }
}

static void attend_one(const attention_call *c, int64_t sequence, int64_t head, int64_t count) {
    key_sums all[HEADS], part[HEADS];
    attend_part(all, 1, c, sequence, head, count, 0);
    for (int64_t p = 1; p * PART < c->kv_len[sequence]; p++) {
        attend_part(part, 1, c, sequence, head, count, p);
        for (int64_t h = 0; h < count; h++) { join_parts(&all[h], &part[h], c->d); }
    }
    for (int64_t h = 0; h < count; h++) { store_sums(c, sequence, head + h, &all[h]); }
}

/* ---- one query, parts of its keys on several threads: the same sums in the same order --------------------------------- */

typedef struct {
    const attention_call *call;
    key_sums *sums; /* (b, hq, parts) */
    int64_t parts;  /* of the longest sequence */
} parted_call;

static void part_task(void *context, int64_t task) {
    const parted_call *p = context;
    const attention_call *c = p->call;
    int64_t part = task % p->parts, kv_head = task / p->parts % c->hkv, sequence = task / p->parts / c->hkv, group = c->hq / c->hkv;
    if (part * PART >= c->kv_len[sequence]) { return; }
    for (int64_t h = 0, head = kv_head * group; h < group; h += HEADS) {
        key_sums *sums = p->sums + (sequence * c->hq + head + h) * p->parts + part;
        attend_part(sums, p->parts, c, sequence, head + h, at_most(HEADS, group - h), part);
    }
}

static void join_task(void *context, int64_t task) {
    const parted_call *p = context;
    const attention_call *c = p->call;
    int64_t sequence = task / c->hq;
    key_sums *all = p->sums + task * p->parts;
    for (int64_t part = 1; part * PART < c->kv_len[sequence]; part++) { join_parts(all, all + part, c->d); }
    store_sums(c, sequence, task % c->hq, all);
}

/* A step of generation whose sequences and key heads are too few for the threads; 0: it is another call, or there is no memory. */
static int attend_parted(const attention_call *c) {
    parted_call p = {.call = c};
    int64_t longest = 0;
    for (int64_t s = 0; s < c->b; s++) {
        if (c->q_start[s + 1] - c->q_start[s] != 1) { return 0; }
        longest = c->kv_len[s] > longest ? c->kv_len[s] : longest;
    }
    p.parts = pieces(longest, PART);
    if (p.parts < 2 || c->b * c->hkv >= FEW_TASKS * ql_threads()) { return 0; }
    p.sums = ql_scratch((size_t)(c->b * c->hq * p.parts) * sizeof *p.sums);
    if (p.sums == NULL) { return 0; }
    ql_parallel_for(c->b * c->hkv * p.parts, part_task, &p);
    ql_parallel_for(c->b * c->hq, join_task, &p);
    return 1;
}

/* ---- tasks ------------------------------------------------------------------------------------------------------- */

/* Sequence s owns the row blocks [first_block(s), first_block(s + 1)): at least as many as it needs, found without a list. */
static int64_t first_block(const attention_call *c, int64_t sequence) {
    return (c->q_start[sequence] - c->q_start[0]) * (c->hq / c->hkv) / ROWS + sequence;
}

/* the last blocks come first: under the causal mask they are the long ones */
static void attention_task(void *context, int64_t task) {
    const attention_call *c = context;
    int64_t block = first_block(c, c->b) - 1 - task / c->hkv, low = 0, high = c->b;
    while (high - low > 1) { /* the sequence with first_block(low) <= block < first_block(low + 1) */
        int64_t middle = (low + high) / 2;
        if (first_block(c, middle) <= block) { low = middle; } else { high = middle; }
    }
    int64_t row0 = (block - first_block(c, low)) * ROWS, group = c->hq / c->hkv;
    if (c->q_start[low + 1] - c->q_start[low] == 1) {
        int64_t head = task % c->hkv * group + row0;
        int64_t heads = at_most(ROWS, group - row0);
        for (int64_t h = 0; h < heads; h += HEADS) { attend_one(c, low, head + h, at_most(HEADS, heads - h)); }
        return;
    }
    if (row0 >= row_count(c, low)) { return; }
    attention_rows rows;
    load_rows(&rows, c, low, task % c->hkv, row0);
    if (rows.count <= VL) { attend_one_vector(&rows); } else { attend_two_vectors(&rows); }
    store_rows(&rows, c);
}

void V_NAME(attention_first)(attention_call *call) {
    if (!attend_parted(call)) { ql_parallel_for(first_block(call, call->b) * call->hkv, attention_task, call); }
}

void V_NAME(attention_forward)(float *out, float *lse, const float *q, const float *k, const float *v,
                               const int64_t *q_start, const int64_t *kv_start, const int64_t *kv_len, int64_t b, int64_t hq,
                               int64_t hkv, int64_t d, float scale) {
    attention_call call = {out, lse, q, k, v, q_start, kv_start, kv_len, b, hq, hkv, d, scale, INT64_MAX};
    if (d > MAX_D || d % 2 != 0) { /* no model has such heads */
        ql_attention_forward_scalar(out, lse, q, k, v, q_start, kv_start, kv_len, b, hq, hkv, d, scale);
        return;
    }
    V_NAME(attention_first)(&call);
}
