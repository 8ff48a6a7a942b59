/* attention_amx.c: causal attention on tiles. Lanes are rows, a query and one of the heads that share a key head, as in
 * attention_body.h, and what is said there of a token's result holds here: it depends neither on its batch nor on its chunk.
 *
 * Every operand is split into a high and a low bf16 part, and of the four products of the parts all but low low are added: what
 * that leaves out is about 2^-17 of a term, as in the backward pass. For 16 rows and a block of KEYS keys:
 *   st (keys, rows) = k qt      scores, then weights         ot (d, rows) += v^T p
 * k and v are split once a call, for all rows (pack_task). A value of v that is not finite would spoil the rows that do not see
 * it as well: such keys are 0 in the tiles and added one by one.
 *
 * The queries at the first FIRST positions of a sequence, where splitting costs more than it saves, and a sequence with one query
 * are left to AVX-512; so are heads of other sizes than multiples of 32, and all where ql_precise() is set. */
#include "../core/sizes.h"
#include "bf16_amx.h"
#include "overlay.h"

#include <math.h>     /* logf, INFINITY */
#include <stdalign.h> /* alignas */
#include <string.h>   /* memset */

enum {
    FIRST = 64,
    MAX_D = 256,
    MAX_STEPS = MAX_D / SIDE,
    KEYS = 64,
    KEY_STEPS = KEYS / SIDE,
    ROWS = 8 * VL,               /* of a task: they share the loads of a block of keys */
    ROW_TILES = ROWS / VL,
    SUMS = VL * VL,              /* of a tile */
    BOTH = 2 * TILE              /* elements of a tile's two parts */
};

/* a block of keys: [part] tiles of k (keys, d) and of v^T (d, keys) */
typedef struct {
    uint16_t *k;     /* [16 keys][32 of d] */
    uint16_t *v;     /* [16 of d][32 keys] */
    uint64_t *apart; /* keys whose v is not finite, a bit each */
} key_block;

typedef struct {
    float *out, *lse;
    const float *q, *k, *v;
    const int64_t *q_start, *kv_start, *kv_len;
    int64_t b, hq, hkv, d;
    float scale;
    int64_t *blocks;     /* (b + 1,) blocks of keys before each sequence */
    uint16_t *packed;    /* (blocks, hkv, packed_size) */
    int64_t packed_size;
} attention_context;

/* 16 rows */
typedef struct {
    int64_t index[VL];  /* row -> query * hq + head */
    int64_t keys_max;   /* keys that the last row sees */
    alignas(64) float keys[VL]; /* that a row sees */
    alignas(64) float maximum[VL], sum[VL];
    alignas(64) uint16_t qt[MAX_STEPS * BOTH]; /* [32 of d][part] tiles (d, rows), scaled */
    alignas(64) float ot[MAX_D * VL];          /* (d, rows), not yet divided by the sum of the weights */
} row_tile;

/* what a block of keys is to 16 rows; keys are counted from the block's first */
typedef struct {
    int64_t count;  /* keys to look at, a multiple of 16 */
    int64_t plain;  /* which all rows see */
    vf seen;        /* how many each row sees */
} sight;

/* of a block of keys and 16 rows */
typedef struct {
    alignas(64) float st[KEYS * VL];              /* (keys, rows) */
    alignas(64) uint16_t p[KEY_STEPS * BOTH];     /* [32 keys][part] tiles (keys, rows) */
    int64_t keys;                                 /* in p, a multiple of 32 */
} scores;

static key_block block_at(const attention_context *c, int64_t block, int64_t kv_head) {
    uint16_t *k = c->packed + (block * c->hkv + kv_head) * c->packed_size, *v = k + KEYS * c->d * 2;
    return (key_block){k, v, (uint64_t *)(void *)(v + KEYS * c->d * 2)};
}

/* ---- splitting ------------------------------------------------------------------------------------------------------ */

/* the parts of 32 values, TILE elements apart */
static inline void split(uint16_t *line, vf first, vf second) {
    __m512i high = to_bf16(first, second);
    _mm512_store_si512(line, high);
    _mm512_store_si512(line + TILE, left_over_bf16(first, second, high));
}

/* the parts of 16 values of each of two steps, side by side */
static inline void split_pair(uint16_t *line, vf first, vf second) {
    __m512i high = to_bf16(first, second), low = left_over_bf16(first, second, high);
    _mm512_store_si512(line, interleave(_mm512_castsi512_si256(high), _mm512_extracti64x4_epi64(high, 1)));
    _mm512_store_si512(line + TILE, interleave(_mm512_castsi512_si256(low), _mm512_extracti64x4_epi64(low, 1)));
}

/* factor times a row of d values to lines of tiles */
static void split_row(uint16_t *line, const float *row, int64_t d, float factor) {
    vf scale = v_set1(factor);
    for (int64_t i = 0; i < d; i += SIDE, line += BOTH) { split(line, v_mul(v_load(row + i), scale), v_mul(v_load(row + i + VL), scale)); }
}

static void transpose_both(uint16_t *to, const uint16_t *from) {
    transpose_tile(to, from, SIDE);
    transpose_tile(to + TILE, from + TILE, SIDE);
}

/* tiles of v^T of 32 keys: 16 of d are KEY_STEPS * BOTH elements apart */
static void split_values(uint16_t *tiles, const float *const rows[SIDE], int64_t d) {
    for (int64_t i = 0; i < d; i += 16, tiles += KEY_STEPS * BOTH) {
        alignas(64) uint16_t lines[BOTH];
        for (int64_t s = 0; s < SIDE; s += 2) { split_pair(lines + s / 2 * SIDE, v_load(rows[s] + i), v_load(rows[s + 1] + i)); }
        transpose_both(tiles, lines);
    }
}

static int is_finite(const float *row, int64_t d) {
    vf sum = v_zero(); /* of zeros, or of NaNs */
    for (int64_t i = 0; i < d; i += VL) { sum = v_fma(v_load(row + i), v_zero(), sum); }
    return v_sum(sum) == 0.0f;
}

/* the sequence whose blocks hold `block` */
static int64_t sequence_of(const attention_context *c, int64_t block) {
    int64_t low = 0, high = c->b;
    while (high - low > 1) { /* blocks[low] <= block < blocks[high] */
        int64_t middle = (low + high) / 2;
        if (c->blocks[middle] <= block) { low = middle; } else { high = middle; }
    }
    return low;
}

/* element 0 of key `key` of a sequence, in k and v */
static int64_t key_at(const attention_context *c, int64_t sequence, int64_t key, int64_t kv_head) {
    return ((c->kv_start[sequence] + key) * c->hkv + kv_head) * c->d;
}

/* one block of keys of one key head; beyond a sequence's end its last key follows, which no row sees there */
static void pack_task(void *context, int64_t task) {
    static const float zeros[MAX_D];
    const attention_context *c = context;
    int64_t block = task / c->hkv, kv_head = task % c->hkv, sequence = sequence_of(c, block);
    int64_t first = (block - c->blocks[sequence]) * KEYS, last = c->kv_len[sequence] - 1;
    key_block to = block_at(c, block, kv_head);
    const float *values[KEYS];
    *to.apart = 0;
    for (int64_t s = 0; s < KEYS; s++) {
        int64_t at = key_at(c, sequence, at_most(first + s, last), kv_head);
        split_row(to.k + s / 16 * (c->d / SIDE) * BOTH + s % 16 * SIDE, c->k + at, c->d, 1.0f);
        values[s] = c->v + at;
        if (!is_finite(values[s], c->d)) {
            values[s] = zeros;
            if (first + s <= last) { *to.apart |= 1ull << s; }
        }
    }
    for (int64_t s = 0; s < KEYS; s += SIDE) { split_values(to.v + s / SIDE * BOTH, values + s, c->d); }
}

/* Rows [row0, row0 + count) of a sequence and key head, which begin with query `query`, that sees `keys` keys; lanes beyond repeat
 * the last and are not stored. */
static void load_rows(row_tile *a, const attention_context *c, int64_t query, int64_t keys, int64_t kv_head, int64_t row0, int64_t count) {
    int64_t group = c->hq / c->hkv;
    alignas(64) uint16_t lines[MAX_STEPS * BOTH];
    for (int64_t r = 0; r < VL; r++) {
        int64_t row = row0 + at_most(r, count - 1);
        a->index[r] = (query + row / group) * c->hq + kv_head * group + row % group;
        a->keys_max = keys + row / group, a->keys[r] = (float)a->keys_max;
        split_row(lines + r * SIDE, c->q + a->index[r] * c->d, c->d, c->scale);
        a->maximum[r] = -INFINITY, a->sum[r] = 0.0f;
    }
    for (int64_t i = 0; i < c->d / SIDE; i++) { transpose_both(a->qt + i * BOTH, lines + i * BOTH); }
    memset(a->ot, 0, (size_t)(c->d * VL) * sizeof *a->ot);
}

/* ---- 16 rows and a block of keys -------------------------------------------------------------------------------------- */

/* st = the scores of keys [s, s + 32) */
static void multiply_scores(scores *w, const row_tile *a, const key_block *block, int64_t s, int64_t d) {
    const uint16_t *k = block->k + s / 16 * (d / SIDE) * BOTH, *next = k + d / SIDE * BOTH, *q = a->qt;
    MEMORY_BARRIER();
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t i = 0; i < d; i += SIDE, k += BOTH, next += BOTH, q += BOTH) {
        _tile_loadd(2, q, 64);
        _tile_loadd(4, k, 64);
        _tile_dpbf16ps(0, 4, 2);
        _tile_loadd(3, q + TILE, 64);
        _tile_dpbf16ps(0, 4, 3);
        _tile_loadd(5, next, 64);
        _tile_dpbf16ps(1, 5, 2);
        _tile_dpbf16ps(1, 5, 3);
        _tile_loadd(6, k + TILE, 64);
        _tile_dpbf16ps(0, 6, 2);
        _tile_loadd(7, next + TILE, 64);
        _tile_dpbf16ps(1, 7, 2);
    }
    _tile_stored(0, w->st + s * VL, 64);
    _tile_stored(1, w->st + (s + 16) * VL, 64);
    MEMORY_BARRIER();
}

/* elements [i, i + 16) of ot += v^T p */
static void add_values(row_tile *a, const scores *w, const key_block *block, int64_t i) {
    const uint16_t *v = block->v + i / 16 * KEY_STEPS * BOTH, *p = w->p;
    MEMORY_BARRIER();
    _tile_loadd(0, a->ot + i * VL, 64);
    for (int64_t s = 0; s < w->keys; s += SIDE, v += BOTH, p += BOTH) {
        _tile_loadd(4, v, 64);
        _tile_loadd(2, p, 64);
        _tile_loadd(3, p + TILE, 64);
        _tile_loadd(5, v + TILE, 64);
        _tile_dpbf16ps(0, 5, 2);
        _tile_dpbf16ps(0, 4, 3);
        _tile_dpbf16ps(0, 4, 2);
    }
    _tile_stored(0, a->ot + i * VL, 64);
    MEMORY_BARRIER();
}

static sight sight_of(const row_tile *a, int64_t first) {
    int64_t count = at_most(round_up(a->keys_max - first, 16), KEYS), plain = (int64_t)a->keys[0] - first;
    return (sight){count, plain < 0 ? 0 : at_most(plain, count), v_sub(v_load(a->keys), v_set1((float)first))};
}

static inline vm sees(const sight *eye, int64_t s) { return v_lt(v_set1((float)s), eye->seen); }

/* the largest score of each row, or what it was; ot and sum follow it. Returns it. */
static vf move_maximum(row_tile *a, const scores *w, const sight *eye, int64_t d) {
    vf old = v_load(a->maximum), maximum = old;
    for (int64_t s = 0; s < eye->plain; s++) { maximum = v_max(maximum, v_load(w->st + s * VL)); }
    for (int64_t s = eye->plain; s < eye->count; s++) {
        maximum = v_max(maximum, v_select(sees(eye, s), v_load(w->st + s * VL), maximum));
    }
    vf keep = v_exp(v_sub(old, maximum));
    for (int64_t i = 0; i < d; i++) { v_store(a->ot + i * VL, v_mul(v_load(a->ot + i * VL), keep)); }
    v_store(a->sum, v_mul(v_load(a->sum), keep));
    v_store(a->maximum, maximum);
    return maximum;
}

/* the weights exp(score - maximum) of keys [s, s + 16) to p, 0 where a row does not see the key, and to st where keys are apart */
static void weigh(row_tile *a, scores *w, const sight *eye, int64_t s, vf maximum, int apart) {
    vf sum = v_load(a->sum);
    for (int64_t i = s; i < s + 16; i += 2) {
        vf weight[2];
        for (int64_t j = 0; j < 2; j++) {
            weight[j] = v_exp(v_sub(v_load(w->st + (i + j) * VL), maximum));
            if (i + j >= eye->plain) { weight[j] = v_select(sees(eye, i + j), weight[j], v_zero()); }
            if (apart) { v_store(w->st + (i + j) * VL, weight[j]); }
            sum = v_add(sum, weight[j]);
        }
        split_pair(w->p + i / SIDE * BOTH + i % SIDE / 2 * SIDE, weight[0], weight[1]);
    }
    v_store(a->sum, sum);
}

/* what add_values has left out: key s, for the rows that see it; v: its values */
static void add_apart(row_tile *a, const scores *w, const sight *eye, int64_t s, const float *v, int64_t d) {
    vm seen = s < eye->count ? sees(eye, s) : 0;
    for (int64_t i = 0; i < d; i++) {
        vf o = v_load(a->ot + i * VL);
        v_store(a->ot + i * VL, v_select(seen, v_fma(v_set1(v[i]), v_load(w->st + s * VL), o), o));
    }
}

/* what keys beyond the last are in p */
static void end_weights(scores *w, int64_t keys) {
    w->keys = round_up(keys, SIDE);
    for (int64_t s = keys; s < w->keys; s += 2) { split_pair(w->p + s / SIDE * BOTH + s % SIDE / 2 * SIDE, v_zero(), v_zero()); }
}

/* A block of keys that begins with key `first` of the sequence, for tiles [0, count) of rows; values: v of its first key. The tile
 * unit works beside the vector units, which make weights of a tile's scores: on the values of the tile before and the scores of
 * the next. */
static void attend_block(const attention_context *c, row_tile *tiles, int64_t count, const key_block *block, int64_t first,
                         const float *values) {
    const int64_t d = c->d, share = pieces(d, KEYS) * 16; /* elements of a head beside 16 keys */
    scores both[2];
    sight eye = sight_of(tiles, first);
    for (int64_t s = 0; s < eye.count; s += SIDE) { multiply_scores(both, tiles, block, s, d); }
    for (int64_t t = 0; t < count; t++) {
        scores *now = both + t % 2, *other = both + (t + 1) % 2;
        row_tile *a = tiles + t;
        sight next = t + 1 < count ? sight_of(a + 1, first) : (sight){0};
        int64_t i = t > 0 ? 0 : d, s = 0;
        vf maximum = move_maximum(a, now, &eye, d);
        for (; s < eye.count; s += 16) {
            for (int64_t end = i + share; i < at_most(end, d); i += 16) { add_values(a - 1, other, block, i); }
            if (s % SIDE == 0 && s < next.count) { multiply_scores(other, a + 1, block, s, d); }
            weigh(a, now, &eye, s, maximum, *block->apart != 0);
        }
        for (; i < d; i += 16) { add_values(a - 1, other, block, i); }
        for (s = round_up(s, SIDE); s < next.count; s += SIDE) { multiply_scores(other, a + 1, block, s, d); }
        end_weights(now, eye.count);
        for (uint64_t left = *block->apart; left != 0; left &= left - 1) {
            int64_t key = __builtin_ctzll(left);
            add_apart(a, now, &eye, key, values + key * c->hkv * d, d);
        }
        eye = next;
    }
    for (int64_t i = 0; i < d; i += 16) { add_values(tiles + count - 1, both + (count - 1) % 2, block, i); }
}

static void store_rows(const row_tile *a, const attention_context *c, int64_t count) {
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

/* Sequence s owns the row blocks [first_rows(s), first_rows(s + 1)): at least as many as it needs. */
static int64_t first_rows(const attention_context *c, int64_t sequence) {
    return (c->q_start[sequence] - c->q_start[0]) * (c->hq / c->hkv) / ROWS + sequence;
}

/* the last rows come first: under the causal mask they take longest */
static void attention_task(void *context, int64_t task) {
    const attention_context *c = context;
    int64_t rows_block = first_rows(c, c->b) - 1 - task / c->hkv, kv_head = task % c->hkv, low = 0, high = c->b;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (first_rows(c, middle) <= rows_block) { low = middle; } else { high = middle; }
    }
    int64_t queries = c->q_start[low + 1] - c->q_start[low], before = c->kv_len[low] - queries, row0 = (rows_block - first_rows(c, low)) * ROWS;
    int64_t early = before < FIRST ? at_most(FIRST - before, queries) : 0, rows = (queries - early) * (c->hq / c->hkv);
    if (queries < 2 || row0 >= rows) { return; }
    row_tile tiles[ROW_TILES];
    tile_config config;
    int64_t count = at_most(pieces(rows - row0, VL), ROW_TILES);
    for (int64_t t = 0; t < count; t++) {
        load_rows(tiles + t, c, c->q_start[low] + early, before + early + 1, kv_head, row0 + t * VL, rows - row0 - t * VL);
    }
    configure_tiles(&config);
    for (int64_t first = 0, t = 0; first < tiles[count - 1].keys_max; first += KEYS) {
        key_block block = block_at(c, c->blocks[low] + first / KEYS, kv_head);
        while (tiles[t].keys_max <= first) { t++; }
        attend_block(c, tiles + t, count - t, &block, first, c->v + key_at(c, low, first, kv_head));
    }
    restore_tiles(&config);
    for (int64_t t = 0; t < count; t++) { store_rows(tiles + t, c, at_most(rows - row0 - t * VL, VL)); }
}

/* blocks of keys of a sequence that has queries at late positions */
static int64_t late_blocks(const attention_context *c, int64_t sequence) {
    int64_t queries = c->q_start[sequence + 1] - c->q_start[sequence];
    return queries > 1 && c->kv_len[sequence] > FIRST ? pieces(c->kv_len[sequence], KEYS) : 0;
}

/* 0: no memory for what is packed */
static int attend_late(attention_context *c) {
    int64_t blocks = 0, starts = round_up(c->b + 1, 8); /* whole cache lines */
    for (int64_t s = 0; s < c->b; s++) { blocks += late_blocks(c, s); }
    if (blocks == 0) { return 1; }
    c->packed_size = 2 * KEYS * c->d * 2 + SIDE; /* k, v, and a cache line with `apart` */
    char *memory = ql_scratch((size_t)starts * sizeof *c->blocks + (size_t)(blocks * c->hkv * c->packed_size) * sizeof *c->packed);
    if (memory == NULL) { return 0; }
    c->blocks = (int64_t *)(void *)memory, c->packed = (uint16_t *)(void *)(c->blocks + starts);
    c->blocks[0] = 0;
    for (int64_t s = 0; s < c->b; s++) { c->blocks[s + 1] = c->blocks[s] + late_blocks(c, s); }
    ql_parallel_for(blocks * c->hkv, pack_task, c);
    ql_parallel_for(first_rows(c, c->b) * c->hkv, attention_task, c);
    return 1;
}

void ql_attention_forward_amx(float *out, float *lse, const float *q, const float *k, const float *v, const int64_t *q_start,
                              const int64_t *kv_start, const int64_t *kv_len, int64_t b, int64_t hq, int64_t hkv, int64_t d,
                              float scale) {
    attention_context c = {.out = out, .lse = lse, .q = q, .k = k, .v = v, .q_start = q_start, .kv_start = kv_start,
                           .kv_len = kv_len, .b = b, .hq = hq, .hkv = hkv, .d = d, .scale = scale};
    if (ql_precise() || d > MAX_D || d % SIDE != 0 || !attend_late(&c)) {
        ql_attention_forward_avx512(out, lse, q, k, v, q_start, kv_start, kv_len, b, hq, hkv, d, scale);
    } else {
        ql_attention_first_avx512(out, lse, q, k, v, q_start, kv_start, kv_len, b, hq, hkv, d, scale, FIRST);
    }
}
