/* attention_amx.c: causal attention on tiles. Lanes are rows, a query and one of the heads that share a key head, as in
 * attention_body.h, and what is said there of a token's result holds here: it depends neither on its batch nor on its chunk.
 *
 * k, v, the scaled queries and the weights become integers of three limbs (limbs.h), so that products are about as exact as
 * float32's. For 16 rows and a block of KEYS keys, d in units of 64:
 *   st (keys, rows) = k q^T     scores, float32, then weights
 *   ot (d, rows) += v^T p^T     p: the weights times the scale of v's row, split with one scale a row. So a key that a row does
 *                               not see is 0 for it, whatever that key holds.
 * k and v are split once a call, for all rows (pack_task). A row that sees an infinity in k or v is NaN.
 *
 * The queries at the first FIRST positions of a sequence, where splitting costs more than it saves, and a sequence with one query
 * are left to AVX-512; so are heads of other sizes than multiples of 64. */
#include "../core/sizes.h"
#include "bf16_amx.h"
#include "limbs.h"
#include "overlay.h"

#include <math.h>     /* logf, INFINITY */
#include <stdalign.h> /* alignas */

enum {
    FIRST = 64,                   /* positions */
    UNIT = 64,                    /* values in a line of a tile */
    MAX_D = 256,
    MAX_UNITS = MAX_D / UNIT,
    KEYS = UNIT,
    ROWS = 4 * VL,                /* of a task: they share the loads of a block of keys */
    ROW_TILES = ROWS / VL,
    SUMS = VL * VL,               /* of a tile */
    SPLIT = LIMBS * TILE          /* elements of a tile's limbs */
};

/* a block of keys of a key head: its limbs and the largest values of each key's k and v */
typedef struct {
    uint16_t *k, *v;        /* [16 keys][unit of d][limb] tiles (keys, d), [16 of d][limb] tiles (d, keys) */
    float *k_most, *v_most; /* (KEYS,) */
} key_block;

typedef struct {
    attention_call call;
    int64_t *blocks, *rows; /* (b + 1,) blocks of keys, tasks of a key head, before each sequence */
    uint16_t *packed;       /* (blocks, hkv, packed_size) */
    int64_t packed_size;
} attention_context;

/* 16 rows */
typedef struct {
    int64_t index[VL];  /* row -> query * hq + head */
    int64_t keys_max;   /* keys that the last row sees */
    alignas(64) float keys[VL], most[VL]; /* keys that a row sees, as a float; the largest of its scaled query */
    alignas(64) float maximum[VL], sum[VL];
    alignas(64) uint16_t qt[MAX_UNITS * SPLIT]; /* [unit][limb] tiles (d, rows) */
    alignas(64) float ot[MAX_D * VL];           /* (d, rows), not yet divided by the sum of the weights */
} row_tile;

static key_block block_at(const attention_context *c, int64_t block, int64_t kv_head) {
    uint16_t *k = c->packed + (block * c->call.hkv + kv_head) * c->packed_size, *v = k + KEYS / 16 * (c->call.d / UNIT) * SPLIT;
    float *most = (float *)(void *)(v + c->call.d / 16 * SPLIT);
    return (key_block){k, v, most, most + KEYS};
}

/* the sequence whose range of `first` (b + 1,) holds `at` */
static int64_t sequence_of(const int64_t *first, int64_t b, int64_t at) {
    int64_t low = 0, high = b;
    while (high - low > 1) { /* first[low] <= at < first[high] */
        int64_t middle = (low + high) / 2;
        if (first[middle] <= at) { low = middle; } else { high = middle; }
    }
    return low;
}

/* the queries of a sequence, its last ones, that are not AVX-512's */
static int64_t late_queries(const attention_call *c, int64_t sequence) {
    int64_t queries = c->q_start[sequence + 1] - c->q_start[sequence], late = at_most(c->kv_len[sequence] - FIRST, queries);
    return queries < 2 || late < 0 ? 0 : late;
}

/* blocks of keys that those see */
static int64_t late_blocks(const attention_call *c, int64_t sequence) {
    return late_queries(c, sequence) > 0 ? pieces(c->kv_len[sequence], KEYS) : 0;
}

/* ---- splitting ------------------------------------------------------------------------------------------------------ */

static limb_scale scale_of_row(const float *row, int64_t d, vf factor) {
    vi largest = vi_set1(0);
    for (int64_t i = 0; i < d; i += VL) { largest = larger_bits(largest, v_mul(v_load(row + i), factor)); }
    return limb_scale_of(_mm512_reduce_max_epi32(largest));
}

/* factor times a row of d values to lines of tiles, one of each unit; returns the largest */
static float split_row(uint16_t *line, const float *row, int64_t d, float factor) {
    limb_scale scale = scale_of_row(row, d, v_set1(factor));
    vf up = v_set1(scale.up), inverse = v_set1(scale.inverse);
    for (int64_t i = 0; i < d; i += UNIT, line += SPLIT) {
        vi limbs[4];
        for (int64_t j = 0; j < 4; j++) {
            limbs[j] = to_limbs(to_integers(v_mul(v_load(row + i + j * VL), v_set1(factor)), up, inverse));
        }
        store_limbs(line, TILE, limbs);
    }
    return scale.most;
}

/* v^T of KEYS keys, key s at rows[s] */
static void split_values(uint16_t *tiles, float *most, const float *const rows[KEYS], int64_t d) {
    float up[KEYS], inverse[KEYS];
    for (int64_t s = 0; s < KEYS; s++) {
        limb_scale scale = scale_of_row(rows[s], d, v_set1(1.0f));
        most[s] = scale.most, up[s] = scale.up, inverse[s] = scale.inverse;
    }
    for (int64_t i = 0; i < d; i += 16, tiles += SPLIT) {
        alignas(64) uint16_t lines[SPLIT]; /* [limb][four keys][16 of d][4 bytes] */
        for (int64_t s = 0; s < KEYS; s += 4) {
            vi limbs[4], line[LIMBS];
            for (int64_t j = 0; j < 4; j++) {
                limbs[j] = to_limbs(to_integers(v_load(rows[s + j] + i), v_set1(up[s + j]), v_set1(inverse[s + j])));
            }
            limbs_of_four(line, limbs);
            for (int l = 0; l < LIMBS; l++) { vi_store((int32_t *)(void *)(lines + l * TILE + s / 4 * SIDE), line[l]); }
        }
        for (int l = 0; l < LIMBS; l++) { transpose_tile(tiles + l * TILE, lines + l * TILE, SIDE); }
    }
}

/* one block of keys of one key head; beyond a sequence's end its last key follows, which no row sees there */
static void pack_task(void *context, int64_t task) {
    const attention_context *c = context;
    const attention_call *call = &c->call;
    int64_t number = task / call->hkv, kv_head = task % call->hkv, sequence = sequence_of(c->blocks, call->b, number);
    int64_t first = (number - c->blocks[sequence]) * KEYS, last = call->kv_len[sequence] - 1;
    key_block block = block_at(c, number, kv_head);
    const float *values[KEYS];
    for (int64_t s = 0; s < KEYS; s++) {
        int64_t at = ((call->kv_start[sequence] + at_most(first + s, last)) * call->hkv + kv_head) * call->d;
        values[s] = call->v + at;
        block.k_most[s] = split_row(block.k + s / 16 * (call->d / UNIT) * SPLIT + s % 16 * SIDE, call->k + at, call->d, 1.0f);
    }
    split_values(block.v, block.v_most, values, call->d);
}

/* rows [row0, row0 + count) of a sequence and key head, which begin with query `query` that sees `keys` keys; lanes beyond repeat
 * the last and are not stored */
static void load_rows(row_tile *a, const attention_call *c, int64_t query, int64_t keys, int64_t kv_head, int64_t row0, int64_t count) {
    int64_t group = c->hq / c->hkv;
    alignas(64) uint16_t lines[MAX_UNITS * SPLIT];
    for (int64_t r = 0; r < VL; r++) {
        int64_t row = row0 + at_most(r, count - 1);
        a->index[r] = (query + row / group) * c->hq + kv_head * group + row % group;
        a->keys_max = keys + row / group, a->keys[r] = (float)a->keys_max;
        a->most[r] = split_row(lines + r * SIDE, c->q + a->index[r] * c->d, c->d, c->scale);
        a->maximum[r] = -INFINITY, a->sum[r] = 0.0f;
    }
    for (int64_t t = 0; t < c->d / UNIT * LIMBS; t++) { transpose_tile(a->qt + t * TILE, lines + t * TILE, SIDE); }
    for (int64_t i = 0; i < c->d; i++) { v_store(a->ot + i * VL, v_zero()); }
}

/* ---- 16 rows and a block of keys -------------------------------------------------------------------------------------- */

/* sums [group][16][16] = products of limbs whose places add up to 0, 1, 2: a tile (16, 64) of a times one (64, 16) of b, `units` of
 * them */
static void multiply(int32_t *sums, const uint16_t *a, const uint16_t *b, int64_t units) {
    MEMORY_BARRIER();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    for (int64_t u = 0; u < units; u++, a += SPLIT, b += SPLIT) {
        _tile_loadd(3, a, 64);
        _tile_loadd(5, b, 64);
        _tile_dpbssd(0, 3, 5);
        _tile_loadd(6, b + TILE, 64);
        _tile_dpbssd(1, 3, 6);
        _tile_loadd(4, a + TILE, 64);
        _tile_dpbssd(1, 4, 5);
        _tile_dpbssd(2, 4, 6);
        _tile_loadd(7, a + 2 * TILE, 64);
        _tile_dpbssd(2, 7, 5);
        _tile_loadd(7, b + 2 * TILE, 64);
        _tile_dpbssd(2, 3, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + SUMS, 64);
    _tile_stored(2, sums + 2 * SUMS, 64);
    MEMORY_BARRIER();
}

/* line i of the sums as products of values, the largest of which are `most` */
static inline vf join(const int32_t *sums, int64_t i, vf most) {
    const int32_t *line = sums + i * VL;
    return v_mul(v_mul(join_limbs(vi_load(line), vi_load(line + SUMS), vi_load(line + 2 * SUMS)), product_unit()), most);
}

/* st (keys, VL) = the scores of `keys` keys, a multiple of 16; the sums of 16 keys are joined while the tile unit has the next */
static void score(float *st, const row_tile *a, const key_block *block, int64_t keys, int64_t units) {
    alignas(64) int32_t sums[2][LIMBS * SUMS];
    vf most = v_load(a->most);
    for (int64_t s = 0; s < keys + 16; s += 16) {
        if (s < keys) { multiply(sums[s / 16 % 2], block->k + s / 16 * units * SPLIT, a->qt, units); }
        if (s == 0) { continue; }
        for (int64_t i = 0; i < 16; i++) {
            v_store(st + (s - 16 + i) * VL, v_mul(join(sums[(s - 16) / 16 % 2], i, most), v_set1(block->k_most[s - 16 + i])));
        }
    }
}

/* which rows see key s of a block; all see the first `plain` */
static inline vm sees(vf seen, int64_t s) { return v_lt(v_set1((float)s), seen); }

/* st from scores to weights exp(score - maximum), 0 where a row does not see the key; maximum and sum move on. Returns
 * exp(old - new maximum). */
static vf softmax(float *st, row_tile *a, vf seen, int64_t plain, int64_t keys) {
    vf old = v_load(a->maximum), maximum = old;
    for (int64_t s = 0; s < plain; s++) { maximum = v_max(maximum, v_load(st + s * VL)); }
    for (int64_t s = plain; s < keys; s++) { maximum = v_max(maximum, v_select(sees(seen, s), v_load(st + s * VL), maximum)); }
    vf keep = v_exp(v_sub(old, maximum)), sum = v_mul(v_load(a->sum), keep);
    for (int64_t s = 0; s < keys; s++) {
        vf weight = v_exp(v_sub(v_load(st + s * VL), maximum));
        if (s >= plain) { weight = v_select(sees(seen, s), weight, v_zero()); }
        v_store(st + s * VL, weight);
        sum = v_add(sum, weight);
    }
    v_store(a->maximum, maximum);
    v_store(a->sum, sum);
    return keep;
}

/* Weights times the largest of each key's v to limbs, tiles (KEYS, rows); what a row does not see stays 0. Returns the largest. */
static vf split_weights(uint16_t *p, float *st, const float *v_most, vf seen, int64_t plain, int64_t keys) {
    vi largest = vi_set1(0);
    for (int64_t s = 0; s < keys; s++) {
        vf weight = v_mul(v_load(st + s * VL), v_set1(v_most[s]));
        if (s >= plain) { weight = v_select(sees(seen, s), weight, v_zero()); }
        v_store(st + s * VL, weight);
        largest = larger_bits(largest, weight);
    }
    vf most = vi_as_vf(largest), up = v_select(v_lt(most, v_set1(0x1p-64f)), v_set1(0x1p64f), v_set1(1.0f));
    vf inverse = v_select(v_lt(v_zero(), most), v_div(v_set1((float)MOST), v_mul(most, up)), v_zero());
    for (int64_t s = 0; s < KEYS; s += 4) {
        vi limbs[4], line[LIMBS] = {vi_set1(0), vi_set1(0), vi_set1(0)};
        if (s < keys) {
            for (int64_t j = 0; j < 4; j++) { limbs[j] = to_limbs(to_integers(v_load(st + (s + j) * VL), up, inverse)); }
            limbs_of_four(line, limbs);
        }
        for (int l = 0; l < LIMBS; l++) { vi_store((int32_t *)(void *)(p + l * TILE + s / 4 * SIDE), line[l]); }
    }
    return most;
}

/* ot = ot * keep + v^T p^T, joined as in score */
static void add_values(row_tile *a, const key_block *block, const uint16_t *p, vf keep, vf most, int64_t d) {
    alignas(64) int32_t sums[2][LIMBS * SUMS];
    for (int64_t i = 0; i < d + 16; i += 16) {
        if (i < d) { multiply(sums[i / 16 % 2], block->v + i / 16 * SPLIT, p, 1); }
        if (i == 0) { continue; }
        for (int64_t r = 0; r < 16; r++) {
            float *ot = a->ot + (i - 16 + r) * VL;
            v_store(ot, v_fma(v_load(ot), keep, join(sums[(i - 16) / 16 % 2], r, most)));
        }
    }
}

/* a block of keys that begins with key `first` of the sequence */
static void attend_block(row_tile *a, const key_block *block, int64_t first, int64_t d) {
    alignas(64) float st[KEYS * VL];
    alignas(64) uint16_t p[SPLIT];
    int64_t keys = at_most(round_up(a->keys_max - first, 16), KEYS), plain = (int64_t)a->keys[0] - first;
    vf seen = v_sub(v_load(a->keys), v_set1((float)first));
    plain = plain < 0 ? 0 : at_most(plain, keys);
    score(st, a, block, keys, d / UNIT);
    vf keep = softmax(st, a, seen, plain, keys);
    vf most = split_weights(p, st, block->v_most, seen, plain, keys);
    add_values(a, block, p, keep, most, d);
}

static void store_rows(const row_tile *a, const attention_call *c, int64_t count) {
    vf inverse = v_div(v_set1(1.0f), v_load(a->sum));
    for (int64_t i = 0; i < c->d; i += 16) {
        alignas(64) float o[SUMS];
        for (int64_t r = 0; r < 16; r++) { v_store(o + r * VL, v_mul(v_load(a->ot + (i + r) * VL), inverse)); }
        for (int64_t r = 0; r < count; r += 4) {
            vf rows[4];
            v_transpose4(rows, o + r, VL);
            for (int64_t j = 0; j < at_most(4, count - r); j++) { v_store(c->out + a->index[r + j] * c->d + i, rows[j]); }
        }
    }
    for (int64_t r = 0; c->lse != NULL && r < count; r++) { c->lse[a->index[r]] = a->maximum[r] + logf(a->sum[r]); }
}

/* ---- tasks -------------------------------------------------------------------------------------------------------------- */

/* the last rows come first: under the causal mask they take longest */
static void attention_task(void *context, int64_t task) {
    const attention_context *c = context;
    const attention_call *call = &c->call;
    int64_t number = c->rows[call->b] - 1 - task / call->hkv, kv_head = task % call->hkv, s = sequence_of(c->rows, call->b, number);
    int64_t late = late_queries(call, s), rows = late * (call->hq / call->hkv), row0 = (number - c->rows[s]) * ROWS;
    int64_t count = at_most(pieces(rows - row0, VL), ROW_TILES);
    row_tile tiles[ROW_TILES];
    tile_config config;
    for (int64_t t = 0, row = row0; t < count; t++, row += VL) {
        load_rows(tiles + t, call, call->q_start[s + 1] - late, call->kv_len[s] - late + 1, kv_head, row, rows - row);
    }
    configure_tiles(&config);
    for (int64_t first = 0; first < tiles[count - 1].keys_max; first += KEYS) {
        key_block block = block_at(c, c->blocks[s] + first / KEYS, kv_head);
        for (int64_t t = 0; t < count; t++) {
            if (first < tiles[t].keys_max) { attend_block(tiles + t, &block, first, call->d); }
        }
    }
    restore_tiles(&config);
    for (int64_t t = 0; t < count; t++) { store_rows(tiles + t, call, at_most(rows - row0 - t * VL, VL)); }
}

/* 0: no memory for what is packed */
static int attend_late(const attention_call *call) {
    attention_context c = {.call = *call};
    int64_t blocks = 0, starts = round_up(call->b + 1, 8); /* whole cache lines */
    for (int64_t s = 0; s < call->b; s++) { blocks += late_blocks(call, s); }
    if (blocks == 0) { return 1; }
    c.packed_size = 2 * KEYS / 16 * (call->d / UNIT) * SPLIT + 2 * KEYS * (int64_t)(sizeof(float) / sizeof(uint16_t));
    char *memory = ql_scratch((size_t)(2 * starts) * sizeof *c.blocks + (size_t)(blocks * call->hkv * c.packed_size) * sizeof *c.packed);
    if (memory == NULL) { return 0; }
    c.blocks = (int64_t *)(void *)memory, c.rows = c.blocks + starts, c.packed = (uint16_t *)(void *)(c.rows + starts);
    c.blocks[0] = c.rows[0] = 0;
    for (int64_t s = 0; s < call->b; s++) {
        c.blocks[s + 1] = c.blocks[s] + late_blocks(call, s);
        c.rows[s + 1] = c.rows[s] + pieces(late_queries(call, s) * (call->hq / call->hkv), ROWS);
    }
    ql_parallel_for(blocks * call->hkv, pack_task, &c);
    ql_parallel_for(c.rows[call->b] * call->hkv, attention_task, &c);
    return 1;
}

void ql_attention_forward_amx(float *out, float *lse, const float *q, const float *k, const float *v, const int64_t *q_start,
                              const int64_t *kv_start, const int64_t *kv_len, int64_t b, int64_t hq, int64_t hkv, int64_t d,
                              float scale) {
    attention_call call = {out, lse, q, k, v, q_start, kv_start, kv_len, b, hq, hkv, d, scale, FIRST};
    if (d > MAX_D || d % UNIT != 0 || !attend_late(&call)) {
        ql_attention_forward_avx512(out, lse, q, k, v, q_start, kv_start, kv_len, b, hq, hkv, d, scale);
    } else {
        ql_attention_first_avx512(&call);
    }
}
