/* attention_backward_amx.c: gradients of causal attention (Dao 2023) on tiles, for a pair of blocks (attention_pairs.h).
 *
 * Every operand is split into a high and a low bf16 part, and of the four products of the parts all but low low are added:
 * what that leaves out is about 2^-17 of a term. Sizes are rounded up to 32, with zeros, so that all products are 2 x 2 tiles,
 * c (32, 32) = or += a b over steps of 32, from panels [plane][step][2 tiles]:
 *   s  (keys, rows) = k q^T     scores, then weights P       dv (keys, d) += P dout
 *   dp (keys, rows) = v dout^T  then dS = P (dP - delta)     dk (keys, d) += dS q         dqt (d, rows) = k^T dS
 * for ROWS rows at a time (a row is a query and one of the heads that share the key head), so that dv and dk are loaded and
 * stored once for so many. A 2 x 2 of float32 tiles is [16 rows of c][16 columns of c] tiles of 16 x 16. q is scaled, dq is
 * scaled at the end. */
#include "overlay.h"

enum { BLOCK = 256 }; /* large: each pair of blocks packs its rows again */
#include "attention_pairs.h"
#include "bf16_amx.h"

#include <stdalign.h> /* alignas */

enum {
    MAX_D = 128,              /* wider heads: AVX-512 */
    ROWS = 64,
    ROW_UNITS = ROWS / SIDE,  /* of 32 rows */
    UNITS = BLOCK / SIDE,     /* of 32 keys */
    WIDTHS = MAX_D / SIDE,    /* of 32 elements of a head */
    PLANE = 2 * TILE,         /* a step of one plane */
    PART = 2 * PLANE          /* a step of both planes */
};

typedef struct {
    int64_t units, widths; /* of 32 keys, of 32 elements of a head */
    alignas(64) uint16_t k[UNITS * WIDTHS * PART], v[UNITS * WIDTHS * PART]; /* [unit][plane][width]: (keys, d) */
    alignas(64) uint16_t kt[WIDTHS * UNITS * PART];                          /* [width][plane][unit]: (d, keys) */
    alignas(64) float dk[UNITS * WIDTHS * QUAD], dv[UNITS * WIDTHS * QUAD];  /* [unit][width] */
} key_block;

typedef struct {
    int64_t count;        /* rows in use; those beyond are 0 and see no key */
    int64_t row_units;    /* that they fill */
    int64_t units, plain; /* units of keys that the last row sees a part of; keys that every row sees */
    int64_t index[ROWS];  /* row -> query * hq + head */
    alignas(64) float seen[ROWS], lse[ROWS], delta[ROWS]; /* keys of the block that a row sees, as a float */
    alignas(64) uint16_t qt[ROW_UNITS * WIDTHS * PART], doutt[ROW_UNITS * WIDTHS * PART]; /* [row unit][plane][width] */
    alignas(64) uint16_t q[ROW_UNITS * WIDTHS * PART], dout[ROW_UNITS * WIDTHS * PART];   /* [width][plane][row unit] */
    alignas(64) uint16_t dst[ROW_UNITS * UNITS * PART];                                   /* [row unit][plane][unit] */
    alignas(64) float s[ROW_UNITS * QUAD], dp[ROW_UNITS * QUAD];       /* of one unit of keys: [row unit] */
    alignas(64) uint16_t p[ROW_UNITS * PART], ds[ROW_UNITS * PART];    /* of one unit of keys: [plane][row unit] */
    alignas(64) float dqt[QUAD];
} row_block;

/* ---- products ---------------------------------------------------------------------------------------------------- */

/* tiles 4, 5 are a's, 6, 7 b's */
static inline __attribute__((always_inline)) void load_a(const uint16_t *a) {
    _tile_loadd(4, a, 64);
    _tile_loadd(5, a + TILE, 64);
}

static inline __attribute__((always_inline)) void load_b(const uint16_t *b) {
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + TILE, 64);
}

static inline __attribute__((always_inline)) void add_products(void) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

/* c (32, 32) = a b, or += where `add` is set, over `steps` steps of 32; the planes of a are a_plane elements apart */
static void multiply(float *c, const uint16_t *a, int64_t a_plane, const uint16_t *b, int64_t b_plane, int64_t steps, int add) {
    MEMORY_BARRIER();
    if (add) {
        _tile_loadd(0, c, 64);
        _tile_loadd(1, c + QUAD / 4, 64);
        _tile_loadd(2, c + QUAD / 2, 64);
        _tile_loadd(3, c + 3 * QUAD / 4, 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t s = 0; s < steps; s++, a += PLANE, b += PLANE) {
        load_a(a);
        load_b(b + b_plane);
        add_products();
        load_b(b);
        add_products();
        load_a(a + a_plane);
        add_products();
    }
    _tile_stored(0, c, 64);
    _tile_stored(1, c + QUAD / 4, 64);
    _tile_stored(2, c + QUAD / 2, 64);
    _tile_stored(3, c + 3 * QUAD / 4, 64);
    MEMORY_BARRIER();
}

/* ---- packing ----------------------------------------------------------------------------------------------------- */

/* row r of a's panel of `widths` steps = factor * from (d,), zeros beyond */
static void pack_row(uint16_t *panel, int64_t widths, int64_t r, const float *from, int64_t d, float factor) {
    uint16_t *high = panel + r / 16 * TILE + r % 16 * SIDE, *low = high + widths * PLANE;
    vf scale = v_set1(factor);
    for (int64_t i = 0; i < widths * SIDE; i += SIDE, high += PLANE, low += PLANE) {
        vf first = v_mul(v_load_tail(from + i, at_most(VL, d - i)), scale), second = v_zero();
        if (d - i > VL) { second = v_mul(v_load_tail(from + i + VL, at_most(VL, d - i - VL)), scale); }
        __m512i rounded = to_bf16(first, second);
        _mm512_store_si512(high, rounded);
        _mm512_store_si512(low, left_over_bf16(first, second, rounded));
    }
}

/* the tiles of b whose steps are the 32 rows of one step of a's panel: rows 2i and 2i + 1 side by side */
static void pair_rows(uint16_t *b, const uint16_t *a) {
    for (int64_t i = 0; i < 16; i++, a += 2 * SIDE) {
        __m512i first = _mm512_load_si512(a), second = _mm512_load_si512(a + SIDE);
        _mm512_store_si512(b + i * SIDE, interleave(_mm512_castsi512_si256(first), _mm512_castsi512_si256(second)));
        _mm512_store_si512(b + TILE + i * SIDE,
                           interleave(_mm512_extracti64x4_epi64(first, 1), _mm512_extracti64x4_epi64(second, 1)));
    }
}

static inline void transpose_two(uint16_t *to, const uint16_t *from) {
    transpose_tile(to, from, SIDE);
    transpose_tile(to + TILE, from + TILE, SIDE);
}

/* both forms of b for 32 rows, unit `unit` of `units`, from their panel as a's */
static void pack_both(uint16_t *columns, uint16_t *steps, const uint16_t *rows, int64_t widths, int64_t unit, int64_t units) {
    for (int64_t j = 0; j < widths; j++) {
        for (int plane = 0; plane < 2; plane++) {
            const uint16_t *from = rows + (plane * widths + j) * PLANE;
            transpose_two(columns + ((unit * 2 + plane) * widths + j) * PLANE, from);
            pair_rows(steps + ((j * 2 + plane) * units + unit) * PLANE, from);
        }
    }
}

/* ---- a tile of rows ---------------------------------------------------------------------------------------------- */

/* rows [32 unit, ..) of the tile, which begins at row0 of the pair */
static void load_unit(row_block *a, const attention_context *c, const block_pair *pair, int64_t widths, int64_t row0, int64_t unit) {
    alignas(64) uint16_t q[WIDTHS * PART], dout[WIDTHS * PART];
    static const float zeros[MAX_D];
    for (int64_t i = 0; i < SIDE; i++) {
        int64_t r = unit * SIDE + i;
        if (r >= a->count) {
            pack_row(q, widths, i, zeros, c->d, 0.0f), pack_row(dout, widths, i, zeros, c->d, 0.0f);
            a->seen[r] = a->lse[r] = a->delta[r] = 0.0f;
            continue;
        }
        pair_row row = row_of(c, pair, row0 + r);
        const float *slopes = c->dout + row.index * c->d;
        pack_row(q, widths, i, c->q + row.index * c->d, c->d, c->scale);
        pack_row(dout, widths, i, slopes, c->d, 1.0f);
        a->index[r] = row.index, a->lse[r] = c->lse[row.index], a->seen[r] = (float)row.seen;
        a->delta[r] = v_dot(slopes, c->out + row.index * c->d, c->d);
        a->units = round_up(row.seen, SIDE) / SIDE;
    }
    pack_both(a->qt, a->q, q, widths, unit, a->row_units);
    pack_both(a->doutt, a->dout, dout, widths, unit, a->row_units);
}

/* rows [row0, ..) of the `rows` of a pair */
static void load_rows(row_block *a, const attention_context *c, const block_pair *pair, int64_t widths, int64_t row0, int64_t rows) {
    a->count = at_most(rows - row0, ROWS), a->row_units = round_up(a->count, SIDE) / SIDE;
    for (int64_t unit = 0; unit < a->row_units; unit++) { load_unit(a, c, pair, widths, row0, unit); }
    a->plain = a->count % SIDE == 0 ? (int64_t)a->seen[0] : 0;
}

/* The weights P and slopes dS of a key for 32 rows, unit `unit`, 0 where a row does not see the key; row `row` of the unit of
 * keys */
static inline void weigh(row_block *a, int64_t key, int64_t row, int64_t unit) {
    vf weight[2], slope[2];
    int64_t from = unit * QUAD + row / 16 * (QUAD / 2) + row % 16 * 16, to = unit * PLANE + row / 16 * TILE + row % 16 * SIDE;
    for (int h = 0; h < 2; h++) {
        int64_t r = unit * SIDE + h * VL;
        weight[h] = v_exp(v_sub(v_load(a->s + from + h * (QUAD / 4)), v_load(a->lse + r)));
        slope[h] = v_mul(weight[h], v_sub(v_load(a->dp + from + h * (QUAD / 4)), v_load(a->delta + r)));
        if (key >= a->plain) {
            vm sees = v_lt(v_set1((float)key), v_load(a->seen + r));
            weight[h] = v_select(sees, weight[h], v_zero());
            slope[h] = v_select(sees, slope[h], v_zero());
        }
    }
    __m512i high = to_bf16(weight[0], weight[1]);
    _mm512_store_si512(a->p + to, high);
    _mm512_store_si512(a->p + to + a->row_units * PLANE, left_over_bf16(weight[0], weight[1], high));
    high = to_bf16(slope[0], slope[1]);
    _mm512_store_si512(a->ds + to, high);
    _mm512_store_si512(a->ds + to + a->row_units * PLANE, left_over_bf16(slope[0], slope[1], high));
}

/* to[0 .. count) += factor * x */
static inline void add_lanes(float *to, vf x, float factor, int64_t count) {
    v_store_tail(to, v_fma(x, v_set1(factor), v_load_tail(to, count)), count);
}

/* dq += scale * dqt^T, elements [i0, i0 + 32) of the heads of rows [row0, row0 + 32) */
static void add_dq(const row_block *a, const attention_context *c, int64_t i0, int64_t row0) {
    for (int64_t tile = 0; tile < 4; tile++) {
        int64_t i = i0 + tile / 2 * 16, row = row0 + tile % 2 * 16;
        for (int64_t r = 0; r < 16 && i < c->d; r += 4) {
            vf columns[4];
            v_transpose4(columns, a->dqt + tile * (QUAD / 4) + r, 16);
            for (int64_t j = 0; j < 4 && row + r + j < a->count; j++) {
                add_lanes(c->dq + a->index[row + r + j] * c->d + i, columns[j], c->scale, at_most(16, c->d - i));
            }
        }
    }
}

/* what unit `u` of the keys gives to dk and dv, and its dS for dq */
static void unit_backward(row_block *a, key_block *b, int64_t u) {
    int64_t widths = b->widths, plane = widths * PLANE, row_plane = a->row_units * PLANE;
    for (int64_t r = 0; r < a->row_units; r++) {
        multiply(a->s + r * QUAD, b->k + u * widths * PART, plane, a->qt + r * widths * PART, plane, widths, 0);
        multiply(a->dp + r * QUAD, b->v + u * widths * PART, plane, a->doutt + r * widths * PART, plane, widths, 0);
        for (int64_t row = 0; row < SIDE; row++) { weigh(a, u * SIDE + row, row, r); }
        for (int p = 0; p < 2; p++) {
            pair_rows(a->dst + ((r * 2 + p) * UNITS + u) * PLANE, a->ds + p * row_plane + r * PLANE);
        }
    }
    for (int64_t j = 0; j < widths; j++) {
        int64_t quad = (u * widths + j) * QUAD, rows = j * a->row_units * PART;
        multiply(b->dv + quad, a->p, row_plane, a->dout + rows, row_plane, a->row_units, 1);
        multiply(b->dk + quad, a->ds, row_plane, a->q + rows, row_plane, a->row_units, 1);
    }
}

static void rows_backward(row_block *a, key_block *b, const attention_context *c) {
    for (int64_t u = 0; u < a->units; u++) { unit_backward(a, b, u); }
    for (int64_t r = 0; r < a->row_units; r++) {
        for (int64_t j = 0; j < b->widths; j++) {
            multiply(a->dqt, b->kt + j * b->units * PART, b->units * PLANE, a->dst + r * UNITS * PART, UNITS * PLANE, a->units, 0);
            add_dq(a, c, j * SIDE, r * SIDE);
        }
    }
}

/* ---- a block of keys --------------------------------------------------------------------------------------------- */

static void load_keys(key_block *b, const attention_context *c, const block_pair *pair) {
    static const float zeros[MAX_D];
    b->widths = round_up(c->d, SIDE) / SIDE, b->units = round_up(pair->keys, SIDE) / SIDE;
    for (int64_t s = 0; s < b->units * SIDE; s++) {
        int64_t at = ((pair->key_row + s) * c->hkv + pair->kv_head) * c->d, panel = s / SIDE * b->widths * PART;
        pack_row(b->k + panel, b->widths, s % SIDE, s < pair->keys ? c->k + at : zeros, c->d, 1.0f);
        pack_row(b->v + panel, b->widths, s % SIDE, s < pair->keys ? c->v + at : zeros, c->d, 1.0f);
    }
    for (int64_t i = 0; i < b->units * 2 * b->widths; i++) { /* a step of one plane of a unit */
        alignas(64) uint16_t pairs[PLANE];
        int64_t u = i / (2 * b->widths), plane = i / b->widths % 2, j = i % b->widths;
        pair_rows(pairs, b->k + i * PLANE);
        transpose_two(b->kt + ((j * 2 + plane) * b->units + u) * PLANE, pairs);
    }
    memset(b->dk, 0, (size_t)(b->units * b->widths * QUAD) * sizeof *b->dk);
    memset(b->dv, 0, (size_t)(b->units * b->widths * QUAD) * sizeof *b->dv);
}

/* to (d,) += row s of quads [unit][width] */
static void add_key(float *to, const float *quads, int64_t s, const key_block *b, int64_t d) {
    for (int64_t i = 0; i < d; i += 16) {
        const float *quad = quads + (s / SIDE * b->widths + i / SIDE) * QUAD;
        add_lanes(to + i, v_load(quad + s % SIDE / 16 * (QUAD / 2) + i % SIDE / 16 * (QUAD / 4) + s % 16 * 16), 1.0f, at_most(16, d - i));
    }
}

static void pair_backward(const attention_context *c, const block_pair *pair) {
    key_block keys;
    row_block rows;
    tile_config before;
    int64_t count = pair->queries * (c->hq / c->hkv);
    configure_tiles(&before);
    load_keys(&keys, c, pair);
    for (int64_t row0 = 0; row0 < count; row0 += ROWS) {
        load_rows(&rows, c, pair, keys.widths, row0, count);
        rows_backward(&rows, &keys, c);
    }
    restore_tiles(&before);
    for (int64_t s = 0; s < pair->keys; s++) {
        int64_t at = ((pair->key_row + s) * c->hkv + pair->kv_head) * c->d;
        add_key(c->dk + at, keys.dk, s, &keys, c->d);
        add_key(c->dv + at, keys.dv, s, &keys, c->d);
    }
}

void ql_attention_backward_amx(float *dq, float *dk, float *dv, const float *dout, const float *q, const float *k, const float *v,
                               const float *out, const float *lse, const int64_t *q_start, const int64_t *kv_start,
                               const int64_t *kv_len, int64_t b, int64_t hq, int64_t hkv, int64_t d, float scale) {
    attention_context c = {dq, dk, dv, dout, q, k, v, out, lse, q_start, kv_start, kv_len, b, hq, hkv, d, scale, 0};
    if (d > MAX_D) {
        ql_attention_backward_avx512(dq, dk, dv, dout, q, k, v, out, lse, q_start, kv_start, kv_len, b, hq, hkv, d, scale);
        return;
    }
    all_pairs(&c);
}
