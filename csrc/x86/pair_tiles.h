/* pair_tiles.h: all of a matrix x (m, values) as pairs of bf16 (pairs_avx512_bf16.h), packed once for all tasks of a product: tiles of `rows` rows,
 * BLOCK_STEPS pairs of each, one block of steps after another. A row of a tile is a little longer than a block, so that rows do not share a set of the
 * first-level cache. */
#ifndef QL_PAIR_TILES_H
#define QL_PAIR_TILES_H

#include "pairs_avx512_bf16.h"

#include "../quantlab.h"

enum {
    BLOCK_STEPS = 512,
    TILE_ROW = BLOCK_STEPS + 16, /* words from a row of a tile to the next */
    MOST_TILED = 1024,           /* rows whose pairs are there at once: 23 MB for 11008 values */
    PACK_TASK = 1 << 16          /* values, at least, that a task packs */
};

typedef struct {
    const float *x;
    const int32_t *columns; /* (values,) or NULL: value s is column columns[s] of x */
    int64_t ldx, m, values;
    int64_t rows;  /* of a tile */
    int in_eights; /* the pairs of eight values are (0, 4), (1, 5), (2, 6), (3, 7), not neighbours */
    float *words;  /* (words_of_tiles(),) */
} pair_tiles;

static inline int64_t blocks_of_tiles(const pair_tiles *t) { return pieces(t->values, 2 * BLOCK_STEPS); }

static inline int64_t words_of_tiles(const pair_tiles *t) { return blocks_of_tiles(t) * round_up(t->m, t->rows) * TILE_ROW; }

/* the tile of rows [i, i + rows), i a multiple of rows, from step `step` on, a multiple of BLOCK_STEPS */
static inline float *tile_at(const pair_tiles *t, int64_t i, int64_t step) {
    return t->words + (step / BLOCK_STEPS * round_up(t->m, t->rows) + i) * TILE_ROW;
}

static void pack_tile(const pair_tiles *t, int64_t i) {
    for (int64_t r = i; r < at_most(i + t->rows, t->m); r++) {
        for (int64_t s = 0; s < t->values; s += 2 * BLOCK_STEPS) {
            float *out = tile_at(t, i, s / 2) + (r - i) * TILE_ROW;
            v_pairs_of_row(out, t->x + r * t->ldx, t->columns, s, at_most(s + 2 * BLOCK_STEPS, t->values), t->in_eights);
        }
    }
}

static inline int64_t tiles_a_task(const pair_tiles *t) { return pieces(PACK_TASK, t->rows * t->values); }

static void pack_tiles_task(void *context, int64_t task) {
    const pair_tiles *t = context;
    int64_t count = tiles_a_task(t) * t->rows;
    for (int64_t i = task * count; i < at_most((task + 1) * count, t->m); i += t->rows) { pack_tile(t, i); }
}

static void pack_tiles(pair_tiles *t) { ql_parallel_for(pieces(t->m, tiles_a_task(t) * t->rows), pack_tiles_task, t); }

#endif
