/* few_amx.c: y (m, n) = x (m, k) W^T for a few rows of x on tiles, where W is integers of 2 to 4 bits in panels: a line of a tile is
 * what four columns of 16 rows of W have for codes, a byte each, and its left operand are the limbs of all rows of x. So W is read and
 * unpacked once for all of them, where byte products in vectors (gemv_amx.c) take as much time again for each.
 *
 * A tile product takes CHUNK columns of one group. Their codes are unpacked one chunk ahead, since a tile is not loaded before
 * what was stored there is in the cache. Limbs are in the order in which tiles need them, chunk after chunk:
 *
 *     int8 limbs[chunk][tiles][16][CHUNK]     limb l of row r of x is line r LIMBS + l; the lines beyond the last are not used
 */
#include "config_amx.h"
#include "gemv_amx.h"

#include <stdalign.h>

enum { LINE = 64, LINES = 16, TILE_BYTES = LINES * LINE, VECTORS = 4, MAX_SUMS = 6 };

/* where the words of a chunk are in a panel */
typedef struct {
    const uint32_t *p;
    int64_t group, block; /* block: of the group */
} chunk;

static inline int64_t blocks_of(const ql_packed_layout *l, int64_t group) { return group == l->groups - 1 ? l->last : l->blocks; }

/* the next one, and whether it begins another group */
ALWAYS_INLINE int next_chunk(chunk *c, const ql_packed_layout *l, const int bits) {
    const int words = bits == 3 ? 3 : 1;
    int64_t left = blocks_of(l, c->group) - c->block, count = at_most(CHUNK / step_of(bits), left);
    c->block += count, c->p += count * words * rows_of(bits);
    if (count < left) { return 0; }
    c->group++, c->block = 0, c->p += l->head;
    return 1;
}

/* the codes of a chunk of 16 rows of W, whose words begin at p; a chunk that is not full ends with lines of zeros */
ALWAYS_INLINE void unpack(uint8_t *tile, const uint32_t *p, int64_t count, int64_t ahead, const int bits) {
    const int step = step_of(bits), words = bits == 3 ? 3 : 1, rows = rows_of(bits), full = CHUNK / step;
    if (count >= full) {
#pragma GCC unroll 8
        for (int b = 0; b < full; b++, p += words * rows) {
            for (int word = 0; word < words; word++) { v_prefetch((const char *)(p + word * rows) + ahead); }
#pragma GCC unroll 8
            for (int h = 0; h < step / 4; h++) { vi_store(tile + (b * step / 4 + h) * LINE, codes_of(p, bits, h)); }
        }
        return;
    }
    int64_t line = 0;
    for (int64_t b = 0; b < count; b++, p += words * rows) {
        for (int h = 0; h < step / 4; h++, line++) { vi_store(tile + line * LINE, codes_of(p, bits, h)); }
    }
    for (; line < LINES; line++) { vi_store(tile + line * LINE, vi_set1(0)); }
}

/* Eight tiles: those of limbs, of codes, and the sums, `tiles` for each vector of W. */
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

/* total[r][v] += the sums of group `group`, scaled; see few_lanes */
ALWAYS_INLINE void add_sums(float (*total)[VECTORS][VL], const gemv_product *g, const int32_t *sums, const uint32_t *head, int64_t lane,
                            int64_t group, const int vectors, const int bits, const int tiles) {
    const int rows = rows_of(bits);
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
        const uint32_t *scales = lanes_of(head + lane, &g->l, v, rows);
        int64_t to = 4 * rows - (lane + v % (rows / VL) * VL) * 2; /* scales are 4 bytes, offsets 2 */
        for (int64_t r = 0; r < g->m; r++) {
            const int32_t *line = sums + (v * tiles * LINES + r * LIMBS) * VL, *begin = g->begin + (r * g->l.groups + group) * LIMBS;
            vi sum[LIMBS];
            for (int a = 0; a < LIMBS; a++) { sum[a] = vi_add(vi_load(line + a * VL), vi_set1(begin[a])); }
            v_store(total[r][v], add_group(g, v_load(total[r][v]), sum, scales, to, r, group));
        }
    }
}

/* `vectors` vectors of rows of W, the first at lane `lane` of the panel at p, which begins with row i; see lanes_of */
ALWAYS_INLINE void few_lanes(const gemv_product *g, const uint32_t *p, int64_t lane, int64_t i, const int vectors, const int bits,
                             const int tiles) {
    const ql_packed_layout *l = &g->l;
    const int rows = rows_of(bits), panels = (vectors * VL + rows - 1) / rows;
    alignas(64) uint8_t codes[2][VECTORS][TILE_BYTES];
    alignas(64) int32_t sums[2][MAX_SUMS * LINES * VL]; /* of a group and the one before it */
    alignas(64) float total[QL_GEMV_TILE_ROWS][VECTORS][VL];
    for (int64_t r = 0; r < g->m; r++) {
        for (int v = 0; v < vectors; v++) { v_store(total[r][v], v_zero()); }
    }
    const uint32_t *head = p, *before = NULL;
    const int8_t *limbs = g->limbs;
    chunk next = {p + l->head, 0, 0};
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
        unpack(codes[0][v], lanes_of(next.p + lane, l, v, rows), blocks_of(l, 0), ahead_of(l, 0, panels, AHEAD), bits);
    }
    zero_sums(vectors * tiles);
    for (int64_t group = 0, turn = 0; group < l->groups; turn ^= 1, limbs += tiles * TILE_BYTES) {
        int last_of_group = next_chunk(&next, l, bits);
        int64_t count = next.group < l->groups ? blocks_of(l, next.group) - next.block : 0;
        int64_t ahead = ahead_of(l, next.group, panels, AHEAD);
        MEMORY_BARRIER();
        load_limbs(limbs, tiles);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            load_codes(codes[turn][v], tiles, v);
            if (count > 0) { unpack(codes[turn ^ 1][v], lanes_of(next.p + lane, l, v, rows), count, ahead, bits); }
            multiply(limbs, tiles, v);
        }
        if (before != NULL) { add_sums(total, g, sums[group % 2 ^ 1], before, lane, group - 1, vectors, bits, tiles), before = NULL; }
        if (!last_of_group) { continue; }
        take_sums(sums[group % 2], vectors * tiles);
        zero_sums(vectors * tiles);
        before = head, head = next.p - l->head, group++;
    }
    MEMORY_BARRIER();
    add_sums(total, g, sums[l->groups % 2 ^ 1], before, lane, l->groups - 1, vectors, bits, tiles);
    for (int64_t r = 0; r < g->m; r++) {
        for (int v = 0; v < vectors; v++) { store_lanes(g, r, i + lane + v * VL, v_load(total[r][v])); }
    }
}

ALWAYS_INLINE void few_panels(const gemv_product *g, int64_t panel, int64_t end, const int bits, const int tiles) {
    const int rows = rows_of(bits), vectors = tiles == 1 ? 4 : 2, at_once = vectors * VL > rows ? 2 : 1; /* panels */
    const uint32_t *p = (const uint32_t *)g->codes + panel * g->l.panel;
    for (; panel + at_once <= end; panel += at_once, p += at_once * g->l.panel) {
        for (int64_t lane = 0; lane < rows; lane += vectors * VL) { few_lanes(g, p, lane, panel * rows, vectors, bits, tiles); }
    }
    for (; panel < end; panel++) { few_lanes(g, p, 0, panel * rows, 2, bits, tiles); }
}

#define OF_TILES(BITS)                                            \
    switch (g->tiles) {                                           \
    case 1: few_panels(g, panel, end, BITS, 1); break;            \
    case 2: few_panels(g, panel, end, BITS, 2); break;            \
    default: few_panels(g, panel, end, BITS, 3); break;           \
    }

void ql_few_panels_amx(const gemv_product *g, int64_t panel, int64_t end) {
    tile_config before;
    configure_tiles(&before);
    switch (g->w->bits) {
    case 2: OF_TILES(2) break;
    case 3: OF_TILES(3) break;
    default: OF_TILES(4) break;
    }
    restore_tiles(&before);
}
