/* attention_backward_body.h: gradients of causal attention (Dao 2023) by vectors.
 *
 * A pair of blocks (attention_pairs.h) makes the weights P and dS = P (dP - delta) again, a tile of ROWS rows at a time, and
 * adds what they give to dq, dk and dv. Five products for a tile, all c (m, n) = a b with n along the lanes, a broadcast:
 *   p  (keys, rows) = k qt      scores, then weights         dv (keys, d) += p dout
 *   ds (keys, rows) = v doutt   dP, then dS                  dk (keys, d) += ds q         dqt (d, rows) = k^T ds
 * qt and doutt are q and dout transposed; q is scaled, dq is scaled at the end. */
enum { BLOCK = 128 }; /* its k and v, 64 KiB at d = 64, stay in the second-level cache */
#include "attention_pairs.h"

enum {
    ROWS = 2 * VL,
    MAX_D = 256,
    TILE = V_AVX512 ? 8 : 4 /* rows of a register tile, by 2 vectors */
};
#define ALWAYS_INLINE static inline __attribute__((always_inline)) /* tile and vectors are constants after inlining */

/* in rows of dp floats, d rounded up to whole vectors */
typedef struct {
    int64_t count, dp;
    _Alignas(64) float k[BLOCK * MAX_D], v[BLOCK * MAX_D], dk[BLOCK * MAX_D], dv[BLOCK * MAX_D];
} key_block;

typedef struct {
    int64_t count, lanes;     /* rows in use; rounded up to whole vectors: those beyond repeat the last one */
    int64_t keys, plain;      /* of the block: the last row sees `keys` of them, every row the first `plain` */
    int64_t index[ROWS];      /* row -> query * hq + head */
    _Alignas(64) float seen[ROWS], lse[ROWS], delta[ROWS]; /* keys of the block that a row sees, as a float */
    _Alignas(64) float q[ROWS * MAX_D], dout[ROWS * MAX_D], qt[MAX_D * ROWS], doutt[MAX_D * ROWS], dqt[MAX_D * ROWS];
    _Alignas(64) float p[BLOCK * ROWS], ds[BLOCK * ROWS];
} row_block;

/* ---- products ---------------------------------------------------------------------------------------------------- */

/* c (m, n) = a b, or += where `add` is set; a[i, s] is at a[i * a_row + s * a_step], b (steps, n); n in whole vectors */
typedef struct {
    float *c;
    const float *a, *b;
    int64_t ldc, a_row, a_step, ldb, m, n, steps;
    int add;
} product;

ALWAYS_INLINE void product_tile(const product *g, int64_t i, int64_t j, const int tile, const int vectors) {
    vf sum[TILE][2];
    float *c = g->c + i * g->ldc + j;
    for (int r = 0; r < tile; r++) {
        for (int q = 0; q < vectors; q++) { sum[r][q] = g->add ? v_load(c + r * g->ldc + q * VL) : v_zero(); }
    }
    const float *a = g->a + i * g->a_row, *b = g->b + j;
    for (int64_t s = 0; s < g->steps; s++, a += g->a_step, b += g->ldb) {
        vf b0 = v_load(b), b1 = vectors > 1 ? v_load(b + VL) : b0;
#pragma GCC unroll 8
        for (int r = 0; r < tile; r++) {
            vf x = v_set1(a[r * g->a_row]);
            sum[r][0] = v_fma(x, b0, sum[r][0]);
            if (vectors > 1) { sum[r][1] = v_fma(x, b1, sum[r][1]); }
        }
    }
    for (int r = 0; r < tile; r++) {
        for (int q = 0; q < vectors; q++) { v_store(c + r * g->ldc + q * VL, sum[r][q]); }
    }
}

ALWAYS_INLINE void product_columns(const product *g, int64_t j, const int vectors) {
    int64_t i = 0;
    for (; i + TILE <= g->m; i += TILE) { product_tile(g, i, j, TILE, vectors); }
    for (; i < g->m; i++) { product_tile(g, i, j, 1, vectors); }
}

static void multiply(product g) {
    int64_t j = 0;
    for (; j + 2 * VL <= g.n; j += 2 * VL) { product_columns(&g, j, 2); }
    if (j < g.n) { product_columns(&g, j, 1); }
}

/* ---- a tile of rows ---------------------------------------------------------------------------------------------- */

/* row (dp,) = factor * from (d,), zeros beyond */
static inline void copy_row(float *row, const float *from, int64_t d, float factor) {
    vf scale = v_set1(factor);
    for (int64_t i = 0; i < d; i += VL) { v_store(row + i, v_mul(v_load_tail(from + i, at_most(VL, d - i)), scale)); }
}

/* t (d, rows) = the transpose of x (rows, dp); rows in whole vectors */
static void transpose(float *t, const float *x, int64_t rows, int64_t dp) {
    for (int64_t i = 0; i < dp; i += 4) {
        for (int64_t r = 0; r < rows; r += VL) {
            vf columns[4];
            v_transpose4(columns, x + r * dp + i, dp);
            for (int q = 0; q < 4; q++) { v_store(t + (i + q) * ROWS + r, columns[q]); }
        }
    }
}

/* rows [row0, ..) of the `rows` of a pair */
static void load_rows(row_block *a, const attention_context *c, const block_pair *pair, int64_t dp, int64_t row0, int64_t rows) {
    a->count = at_most(rows - row0, ROWS);
    a->lanes = round_up(a->count, VL);
    for (int64_t r = 0; r < a->lanes; r++) {
        pair_row row = row_of(c, pair, row0 + at_most(r, a->count - 1));
        const float *dout = c->dout + row.index * c->d;
        copy_row(a->q + r * dp, c->q + row.index * c->d, c->d, c->scale);
        copy_row(a->dout + r * dp, dout, c->d, 1.0f);
        a->index[r] = row.index, a->lse[r] = c->lse[row.index], a->seen[r] = (float)row.seen;
        a->delta[r] = v_dot(dout, c->out + row.index * c->d, c->d);
        if (r == 0) { a->plain = row.seen; }
        a->keys = row.seen;
    }
    transpose(a->qt, a->q, a->lanes, dp);
    transpose(a->doutt, a->dout, a->lanes, dp);
}

/* p from scores to weights, ds from dP to dS; 0 where a row does not see a key */
static void weights_and_slopes(row_block *a) {
    for (int64_t r = 0; r < a->lanes; r += VL) {
        vf lse = v_load(a->lse + r), delta = v_load(a->delta + r), seen = v_load(a->seen + r);
        for (int64_t s = 0; s < a->keys; s++) {
            float *p = a->p + s * ROWS + r, *ds = a->ds + s * ROWS + r;
            vf weight = v_exp(v_sub(v_load(p), lse)), slope = v_mul(weight, v_sub(v_load(ds), delta));
            if (s >= a->plain) {
                vm sees = v_lt(v_set1((float)s), seen);
                weight = v_select(sees, weight, v_zero());
                slope = v_select(sees, slope, v_zero());
            }
            v_store(p, weight);
            v_store(ds, slope);
        }
    }
}

/* to[0 .. count) += factor * x */
static inline void add_lanes(float *to, vf x, float factor, int64_t count) {
    v_store_tail(to, v_fma(x, v_set1(factor), v_load_tail(to, count)), count);
}

/* dq += scale * dqt^T */
static void add_dq(const row_block *a, const attention_context *c) {
    for (int64_t r = 0; r < a->count; r += 4) {
        for (int64_t i = 0; i < c->d; i += VL) {
            vf columns[4];
            v_transpose4(columns, a->dqt + i * ROWS + r, ROWS);
            for (int64_t q = 0; q < 4 && r + q < a->count; q++) {
                add_lanes(c->dq + a->index[r + q] * c->d + i, columns[q], c->scale, at_most(VL, c->d - i));
            }
        }
    }
}

static void rows_backward(row_block *a, key_block *b, const attention_context *c) {
    int64_t d = c->d, dp = b->dp;
    multiply((product){.c = a->p, .ldc = ROWS, .a = b->k, .a_row = dp, .a_step = 1, .b = a->qt, .ldb = ROWS,
                       .m = a->keys, .n = a->lanes, .steps = d});
    multiply((product){.c = a->ds, .ldc = ROWS, .a = b->v, .a_row = dp, .a_step = 1, .b = a->doutt, .ldb = ROWS,
                       .m = a->keys, .n = a->lanes, .steps = d});
    weights_and_slopes(a);
    multiply((product){.c = b->dv, .ldc = dp, .a = a->p, .a_row = ROWS, .a_step = 1, .b = a->dout, .ldb = dp,
                       .m = a->keys, .n = dp, .steps = a->count, .add = 1});
    multiply((product){.c = b->dk, .ldc = dp, .a = a->ds, .a_row = ROWS, .a_step = 1, .b = a->q, .ldb = dp,
                       .m = a->keys, .n = dp, .steps = a->count, .add = 1});
    multiply((product){.c = a->dqt, .ldc = ROWS, .a = b->k, .a_row = 1, .a_step = dp, .b = a->ds, .ldb = ROWS,
                       .m = d, .n = a->lanes, .steps = a->keys});
    add_dq(a, c);
}

/* ---- a block of keys --------------------------------------------------------------------------------------------- */

static void load_keys(key_block *b, const attention_context *c, const block_pair *pair) {
    b->count = pair->keys, b->dp = round_up(c->d, VL);
    for (int64_t s = 0; s < b->count; s++) {
        int64_t at = ((pair->key_row + s) * c->hkv + pair->kv_head) * c->d;
        copy_row(b->k + s * b->dp, c->k + at, c->d, 1.0f);
        copy_row(b->v + s * b->dp, c->v + at, c->d, 1.0f);
    }
    memset(b->dk, 0, (size_t)(b->count * b->dp) * sizeof *b->dk);
    memset(b->dv, 0, (size_t)(b->count * b->dp) * sizeof *b->dv);
}

static void pair_backward(const attention_context *c, const block_pair *pair) {
    key_block keys;
    row_block rows;
    int64_t count = pair->queries * (c->hq / c->hkv);
    load_keys(&keys, c, pair);
    for (int64_t row0 = 0; row0 < count; row0 += ROWS) {
        load_rows(&rows, c, pair, keys.dp, row0, count);
        rows_backward(&rows, &keys, c);
    }
    for (int64_t s = 0; s < keys.count; s++) {
        int64_t at = ((pair->key_row + s) * c->hkv + pair->kv_head) * c->d;
        for (int64_t i = 0; i < c->d; i += VL) {
            add_lanes(c->dk + at + i, v_load(keys.dk + s * keys.dp + i), 1.0f, at_most(VL, c->d - i));
            add_lanes(c->dv + at + i, v_load(keys.dv + s * keys.dp + i), 1.0f, at_most(VL, c->d - i));
        }
    }
}

void V_NAME(attention_backward)(float *dq, float *dk, float *dv, const float *dout, const float *q, const float *k,
                                const float *v, const float *out, const float *lse, const int64_t *q_start,
                                const int64_t *kv_start, const int64_t *kv_len, int64_t b, int64_t hq, int64_t hkv, int64_t d,
                                float scale) {
    attention_context c = {dq, dk, dv, dout, q, k, v, out, lse, q_start, kv_start, kv_len, b, hq, hkv, d, scale, 0};
    if (d > MAX_D) { /* no model has such heads */
        ql_attention_backward_scalar(dq, dk, dv, dout, q, k, v, out, lse, q_start, kv_start, kv_len, b, hq, hkv, d, scale);
        return;
    }
    all_pairs(&c);
}
