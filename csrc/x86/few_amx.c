/* few_amx.c: y (m, n) = x (m, k) W^T for a few rows of x on tiles: a line of a tile is what four columns of 16 rows of W have for
 * codes, a byte each, and its left operand are the limbs of all rows of x. So W is read and unpacked once for all of them, where byte
 * products in vectors (bytes_body.h) take as much time again for each. Codes that are looked up (nf4, fp4) become integers of 16 bits,
 * the high and the low bytes of which are a tile each, and x has two limbs then: finer than bfloat16, which more rows have.
 *
 * A tile product takes CHUNK columns of one group. Their codes are unpacked one chunk ahead, since a tile is not loaded before
 * what was stored there is in the cache. Limbs are in the order in which tiles need them, chunk after chunk:
 *
 *     int8 limbs[chunk][tiles][16][CHUNK]     limb l of row r of x is line r kept_limbs + l; the lines beyond the last are not used
 */
#include "bf16_amx.h" /* transpose_tile */
#include "config_amx.h"
#include "bytes.h"

#include <math.h> /* lrintf */
#include <stdalign.h>

enum {
    LINE = 64,
    TILE_BYTES = LINES * LINE,
    VECTORS = 4, /* of 16 rows of W at a time */
    MAX_SUMS = 6 /* tiles of them */
};

/* what a task works in */
typedef struct {
    alignas(64) uint8_t codes[2][VECTORS][TILE_BYTES]; /* of a chunk and the next one */
    alignas(64) uint8_t rows[TILE_BYTES];
    alignas(64) int32_t sums[2][MAX_SUMS * LINES * VL]; /* of a group and the one before it */
    alignas(64) float total[QL_GEMV_TILE_ROWS][VECTORS][VL];
} buffers;

/* A chunk: columns [j, j + count) of group `group`. */
typedef struct {
    const uint32_t *p; /* panels: its words in the first of them */
    int64_t group, j, count;
} chunk;

/* columns of a group as they are stored: in panels, those of whole blocks */
static inline int64_t columns_of(const gemv_product *g, int64_t group) {
    if (g->l.rows > 0) { return (group == g->groups - 1 ? g->l.last : g->l.blocks) * g->l.step; }
    return group == g->groups - 1 ? g->w->k - group * g->l.group : g->l.group;
}

/* the one after `c`, which has no columns behind the last one */
ALWAYS_INLINE chunk next_chunk(chunk c, const gemv_product *g, const int bits) {
    const int words = bits == 3 ? 3 : 1;
    if (bits < 8) { c.p += c.count / step_of(bits) * words * rows_of(bits); }
    c.j += c.count;
    if (c.j == columns_of(g, c.group)) { c.group++, c.j = 0, c.p += bits < 8 ? g->l.head : 0; }
    c.count = c.group < g->groups ? at_most(CHUNK, columns_of(g, c.group) - c.j) : 0;
    return c;
}

/* the high and the low bytes that 16 codes stand for */
typedef struct { vi high, low; } level_table;

static inline level_table level_table_of(const ql_weight *w) {
    alignas(16) uint8_t bytes[2][16];
    for (int code = 0; code < 16; code++) {
        float value = w->format == QL_NF4 ? ql_nf4_values[code] : ql_fp4_values[code];
        int32_t level = (int32_t)lrintf(value * LEVEL_ONE) + (1 << 15);
        bytes[0][code] = (uint8_t)(level >> 8), bytes[1][code] = (uint8_t)level;
    }
    return (level_table){_mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)(const void *)bytes[0])),
                         _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)(const void *)bytes[1]))};
}

/* a line of a tile of codes; where they are looked up, one of their high bytes and in the next tile one of the low ones */
ALWAYS_INLINE void store_line(uint8_t *line, vi codes, const level_table *table, const int halves) {
    vi_store(line, halves == 2 ? _mm512_shuffle_epi8(table->high, codes) : codes);
    if (halves == 2) { vi_store(line + TILE_BYTES, _mm512_shuffle_epi8(table->low, codes)); }
}

/* the codes of a chunk of 16 rows of W, whose words begin at p; a chunk that is not full ends with lines of zeros */
ALWAYS_INLINE void unpack_words(uint8_t *tile, const uint32_t *p, int64_t count, int64_t ahead, const level_table *table,
                                const int bits, const int halves) {
    const int step = step_of(bits), words = bits == 3 ? 3 : 1, rows = rows_of(bits), full = CHUNK / step;
    if (count == CHUNK) {
#pragma GCC unroll 8
        for (int b = 0; b < full; b++) {
            const uint32_t *block = p + b * words * rows;
            for (int word = 0; word < words; word++) { v_prefetch((const char *)(block + word * rows) + ahead); }
#pragma GCC unroll 8
            for (int h = 0; h < step / 4; h++) { store_line(tile + (b * step / 4 + h) * LINE, codes_of(block, bits, h), table, halves); }
        }
        return;
    }
    int64_t line = 0;
    for (int64_t b = 0; b < count / step; b++, p += words * rows) {
        for (int h = 0; h < step / 4; h++, line++) { store_line(tile + line * LINE, codes_of(p, bits, h), table, halves); }
    }
    for (; line < LINES; line++) {
        for (int half = 0; half < halves; half++) { vi_store(tile + half * TILE_BYTES + line * LINE, vi_set1(0)); }
    }
}

/* The codes of a chunk of rows [i, i + 16) of bytes: fours of columns of 16 rows become a line. int8 codes are made unsigned;
 * what is beyond the chunk's columns is 0. */
ALWAYS_INLINE void unpack_bytes(uint8_t *tile, uint8_t *rows, const gemv_product *g, int64_t i, const chunk *c) {
    const ql_weight *w = g->w;
    int64_t column = c->group * g->l.group + c->j, stride = g->stride, ahead = row_ahead(column, w->k, stride, BYTE_ROWS, AHEAD);
    const char *codes = (const char *)g->codes + i * stride + column;
    const __mmask64 columns = c->count < CHUNK ? (1ull << c->count) - 1 : ~0ull;
    const vi sign = _mm512_maskz_set1_epi8(w->format == QL_INT8 ? columns : 0, (char)0x80);
    for (int64_t r = 0; r < LINES; r++) {
        v_prefetch(codes + r * stride + ahead);
        vi_store(rows + r * LINE, _mm512_xor_si512(sign, _mm512_maskz_loadu_epi8(i + r < w->n ? columns : 0, codes + r * stride)));
    }
    transpose_tile((uint16_t *)(void *)tile, (const uint16_t *)(const void *)rows, LINE / 2);
}

/* The eight tiles: first the sums, `tiles` for each tile of codes, then limbs, then codes. With three tiles of limbs there is one place
 * for them: `multiply` loads them for each tile of codes. */
ALWAYS_INLINE void load_limbs(const int8_t *limbs, const int tiles) {
    if (tiles == 1) { _tile_loadd(4, limbs, LINE); }
    if (tiles == 2) { _tile_loadd(4, limbs, LINE); _tile_loadd(5, limbs + TILE_BYTES, LINE); }
}

ALWAYS_INLINE void load_codes(const uint8_t *tile, const int tiles, const int v) {
    if (tiles == 1 && v % 2 == 0) { _tile_loadd(5, tile, LINE); }
    if (tiles == 1 && v % 2 == 1) { _tile_loadd(6, tile, LINE); }
    if (tiles == 2 && v == 0) { _tile_loadd(6, tile, LINE); }
    if ((tiles == 2 && v == 1) || tiles == 3) { _tile_loadd(7, tile, LINE); }
}

ALWAYS_INLINE void multiply(const int8_t *limbs, const int tiles, const int v) {
    if (tiles == 1) {
        switch (v) {
        case 0: _tile_dpbsud(0, 4, 5); break;
        case 1: _tile_dpbsud(1, 4, 6); break;
        case 2: _tile_dpbsud(2, 4, 5); break;
        default: _tile_dpbsud(3, 4, 6); break;
        }
    } else if (tiles == 2 && v == 0) {
        _tile_dpbsud(0, 4, 6); _tile_dpbsud(1, 5, 6);
    } else if (tiles == 2) {
        _tile_dpbsud(2, 4, 7); _tile_dpbsud(3, 5, 7);
    } else if (v == 0) {
        _tile_loadd(6, limbs, LINE); _tile_dpbsud(0, 6, 7);
        _tile_loadd(6, limbs + TILE_BYTES, LINE); _tile_dpbsud(1, 6, 7);
        _tile_loadd(6, limbs + 2 * TILE_BYTES, LINE); _tile_dpbsud(2, 6, 7);
    } else {
        _tile_loadd(6, limbs, LINE); _tile_dpbsud(3, 6, 7);
        _tile_loadd(6, limbs + TILE_BYTES, LINE); _tile_dpbsud(4, 6, 7);
        _tile_loadd(6, limbs + 2 * TILE_BYTES, LINE); _tile_dpbsud(5, 6, 7);
    }
}

ALWAYS_INLINE void zero_sums(const int count) {
    _tile_zero(0);
    _tile_zero(1);
    if (count > 2) { _tile_zero(2); }
    if (count > 3) { _tile_zero(3); }
    if (count > 4) { _tile_zero(4); }
    if (count > 5) { _tile_zero(5); }
}

ALWAYS_INLINE void take_sums(int32_t *sums, const int count) {
    _tile_stored(0, sums, LINE);
    _tile_stored(1, sums + 256, LINE);
    if (count > 2) { _tile_stored(2, sums + 512, LINE); }
    if (count > 3) { _tile_stored(3, sums + 768, LINE); }
    if (count > 4) { _tile_stored(4, sums + 1024, LINE); }
    if (count > 5) { _tile_stored(5, sums + 1280, LINE); }
}

/* of the rows of bytes from i on */
static group_scale byte_scale(const gemv_product *g, int64_t i, int64_t group) {
    const ql_weight *w = g->w;
    int64_t count = at_most(VL, w->n - i), middle = w->format == QL_INT8 ? 0 : ql_affine_symmetric_zero(w->bits);
    alignas(64) float scale[VL] = {0}, offset[VL] = {0};
    for (int64_t r = 0; r < count; r++) {
        int64_t at = (i + r) * g->groups + group;
        scale[r] = w->format == QL_INT8 ? QL_INT8_STEP * w->scales[i + r] : w->scales[at];
        offset[r] = w->zeros != NULL ? (float)(w->zeros[at] - middle) : 0.0f;
    }
    return (group_scale){v_load(scale), v_load(offset)};
}

/* rows of W that are multiplied at a time: vectors of them from row i on; in panels, from lane `lane` of the panel on that
 * begins at p, see lanes_of */
typedef struct {
    const gemv_product *g;
    buffers *b;
    const uint32_t *p;
    int64_t lane, i;
    level_table table;
} place;

/* the codes of vector v of a chunk, `halves` tiles */
ALWAYS_INLINE void unpack(uint8_t *tile, const place *at, const chunk *c, const int v, const int vectors, const int bits, const int halves) {
    const ql_packed_layout *l = &at->g->l;
    if (bits == 8) {
        unpack_bytes(tile, at->b->rows, at->g, at->i + v * VL, c);
    } else {
        const int rows = rows_of(bits), panels = (vectors * VL + rows - 1) / rows;
        int64_t ahead = ahead_of(l, c->group, panels, AHEAD);
        unpack_words(tile, lanes_of(c->p + at->lane, l, v, rows), c->count, ahead, &at->table, bits, halves);
    }
}

/* total[r][v] += the sums of group `group`, scaled; panels: it begins at `head` */
ALWAYS_INLINE void add_sums(const place *at, const uint32_t *head, int64_t group, const int vectors, const int bits, const int halves,
                            const int tiles) {
    const gemv_product *g = at->g;
    const int32_t *sums = at->b->sums[group % 2];
    float (*total)[VECTORS][VL] = at->b->total;
    const int half = tiles * LINES * VL, kept = kept_limbs(halves); /* half: from the sums of high bytes to those of low ones */
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
        group_scale by = bits == 8 ? byte_scale(g, at->i + v * VL, group) : panel_scale(g, head, at->lane, v, rows_of(bits));
        for (int64_t r = 0; r < g->m; r++) {
            const int32_t *line = sums + v * halves * half + r * kept * VL, *begin = g->begin + (r * g->groups + group) * LIMBS;
            vi sum[LIMBS] = {vi_set1(0), vi_set1(0), vi_set1(0)};
            for (int a = 0; a < kept; a++) {
                sum[a] = vi_add(vi_load(line + a * VL), vi_set1(begin[a]));
                if (halves == 2) { sum[a] = vi_add(vi_shl(sum[a], 8), vi_load(line + half + a * VL)); }
            }
            v_store(total[r][v], add_group(g, v_load(total[r][v]), sum, by, r, group));
        }
    }
}

/* `vectors` vectors of rows of W for all rows of x */
ALWAYS_INLINE void few_rows(const place *at, const int vectors, const int bits, const int halves, const int tiles) {
    const gemv_product *g = at->g;
    const int code_tiles = vectors * halves;
    buffers *b = at->b;
    for (int64_t r = 0; r < g->m; r++) {
        for (int v = 0; v < vectors; v++) { v_store(b->total[r][v], v_zero()); }
    }
    const uint32_t *head = at->p, *before = NULL;
    const int8_t *limbs = g->limbs;
    chunk c = {bits < 8 ? at->p + g->l.head : NULL, 0, 0, at_most(CHUNK, columns_of(g, 0))};
    int pending = 0; /* whether the sums of the last group are not yet added up */
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) { unpack(b->codes[0][v * halves], at, &c, v, vectors, bits, halves); }
    zero_sums(code_tiles * tiles);
    for (int64_t turn = 0; c.count > 0; turn ^= 1, limbs += tiles * TILE_BYTES) {
        chunk next = next_chunk(c, g, bits);
        MEMORY_BARRIER();
        load_limbs(limbs, tiles);
#pragma GCC unroll 4
        for (int t = 0; t < code_tiles; t++) {
            load_codes(b->codes[turn][t], tiles, t);
            if (next.count > 0 && t % halves == 0) { unpack(b->codes[turn ^ 1][t], at, &next, t / halves, vectors, bits, halves); }
            multiply(limbs, tiles, t);
        }
        if (pending) { add_sums(at, before, c.group - 1, vectors, bits, halves, tiles); }
        pending = next.group > c.group;
        if (pending) {
            take_sums(b->sums[c.group % 2], code_tiles * tiles);
            zero_sums(code_tiles * tiles);
            before = head, head = bits < 8 ? next.p - g->l.head : NULL;
        }
        c = next;
    }
    MEMORY_BARRIER();
    add_sums(at, before, g->groups - 1, vectors, bits, halves, tiles);
    for (int64_t r = 0; r < g->m; r++) {
        for (int v = 0; v < vectors; v++) { store_lanes(g->y, g->w->n, r, at->i + v * VL, v_load(b->total[r][v]), g->accumulate); }
    }
}

/* panels [panel, end); where two are taken at a time, the last one may be alone */
ALWAYS_INLINE void few_panels(const gemv_product *g, buffers *b, int64_t panel, int64_t end, const int bits, const int halves, const int tiles) {
    const int rows = rows_of(bits), vectors = (tiles == 1 ? 4 : 2) / halves, at_once = vectors * VL > rows ? 2 : 1; /* panels */
    place at = {.g = g, .b = b};
    if (halves == 2) { at.table = level_table_of(g->w); }
    for (int count = at_once; panel < end; panel += count) {
        if (end - panel < at_once) { count = 1; }
        at.p = (const uint32_t *)g->codes + panel * g->l.panel;
        for (at.lane = 0; at.lane < rows; at.lane += vectors * VL) {
            at.i = panel * rows + at.lane;
            if (count == at_once) { few_rows(&at, vectors, bits, halves, tiles); }
            if (count < at_once) { few_rows(&at, vectors / 2, bits, halves, tiles); }
        }
    }
}

ALWAYS_INLINE void few_bytes(const gemv_product *g, buffers *b, int64_t first, int64_t end, const int tiles) {
    place at = {.g = g, .b = b};
    for (at.i = first * BYTE_ROWS; first < end; first++, at.i += BYTE_ROWS) { few_rows(&at, BYTE_ROWS / VL, 8, 1, tiles); }
}

#define OF_TILES(FUNCTION, ...)                       \
    switch (g->tiles) {                               \
    case 1: FUNCTION(__VA_ARGS__, 1); break;          \
    case 2: FUNCTION(__VA_ARGS__, 2); break;          \
    default: FUNCTION(__VA_ARGS__, 3); break;         \
    }

void ql_few_amx(const gemv_product *g, int64_t first, int64_t end) {
    buffers b;
    tile_config before;
    configure_tiles(&before);
    switch (g->halves == 2 ? 0 : g->l.rows > 0 ? g->w->bits : 8) {
    case 0: OF_TILES(few_panels, g, &b, first, end, 4, 2) break;
    case 2: OF_TILES(few_panels, g, &b, first, end, 2, 1) break;
    case 3: OF_TILES(few_panels, g, &b, first, end, 3, 1) break;
    case 4: OF_TILES(few_panels, g, &b, first, end, 4, 1) break;
    default: OF_TILES(few_bytes, g, &b, first, end) break;
    }
    restore_tiles(&before);
}
