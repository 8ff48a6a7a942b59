/* gemm_body.h: c (m, n) = a (m, k) b (k, n), or += where `accumulate` is set, in float32.
 *
 * A task owns `chunk` rows and some panels, of NR columns, of c. It walks k in blocks of KC: a block of b is packed once, in
 * panels in the second-level cache, then tiles of MR rows of a, in the first-level cache, meet the panels in a kernel that
 * holds the MR x NR sums in registers. The lanes of a vector are columns of c, and every element is
 *     for each block of KC: sum = fma(a[i, s], b[s, j], sum) for s in order; c[i, j] += sum
 * whatever m, the tile, the task or the number of threads: a row's result does not depend on the batch it is in.
 *
 * The file that includes this one has included vec_<isa>.h and defines GEMM_A_TRANSPOSED: 0, a is (m, k); 1, a is (k, m). Where it defines
 * GEMM_PAIRS, a step is two values of k, both operands are rounded to bf16, and a word of a tile or a panel is a pair of them: v_multiply_pairs
 * (pairs_avx512_bf16.h) takes the place of fma, and sums stay float32. All of a is packed before the tasks begin (pair_tiles.h): rounding takes
 * longer than copying, and a task would do it again for each block of b. */
#ifndef QL_GEMM_BODY_H
#define QL_GEMM_BODY_H

#include "../core/sizes.h"
#include "../quantlab.h"
#include "places.h"

#ifndef GEMM_PAIRS
#define GEMM_PAIRS 0
#endif

#if GEMM_PAIRS
#include "pair_tiles.h"
#endif

#include <math.h>     /* INFINITY */
#include <stdalign.h> /* alignas */
#include <string.h>   /* memcpy */

enum {
    MR = V_AVX512 ? 14 : 6, /* 28 or 12 registers of sums, 2 of b, the rest for a */
    NR = 2 * VL,
    KC = 512,       /* c is read and written once a block of k: as long as a tile of a, 28 KB or 12, stays in the first-level cache */
    PANELS = 12,    /* of the widest block of b: 0.8 or 0.4 MB, which stay in a second-level cache of 1 MB or 512 KB */
    FEW_PANELS = 4, /* of the widest block for few rows: wide enough that a is seldom packed, and nearer, for each panel is used
                     * a few times */
    NB = PANELS * NR,
    PANEL = KC * NR, /* a block is its panels one after another, each (KC, NR) row-major */
    BLOCK = PANELS * PANEL,
    A_ROW = GEMM_A_TRANSPOSED ? 1 : KC + 16,
    A_STEP = GEMM_A_TRANSPOSED ? VL : 1, /* element (row, step) of a tile is at row * A_ROW + step * A_STEP */
    A_SIZE = GEMM_A_TRANSPOSED ? KC * VL : MR * (KC + 16),
    A_TILES = GEMM_A_TRANSPOSED ? 4 : 1, /* tiles packed at once: a row of a transposed a is far from the next one */
    MAX_CHUNK = 2048, /* rows: a task stays well under a second */
    MOST_FEW = 64,     /* rows of c: with so many, a panel is packed a span at a time, in the first-level cache, */
    STEP = GEMM_PAIRS ? 2 : 1, /* values of k in a step */
    SPAN = 128 / STEP, /* steps each, */
    FEW_TOGETHER = 16, /* and a task has so many panels at most, which share the packed rows of a */
    PACK_A = GEMM_PAIRS ? 0 : 20,  /* packing a row of a, in a task, takes as long as its products with so many columns */
    PACK_B = GEMM_PAIRS ? 25 : 45 /* packing a column of b, as its products with so many rows */
};

typedef struct gemm gemm;
struct gemm {
    float *c; /* (m, n) */
    int64_t ldc;
    const int32_t *c_columns; /* (n,) or NULL: column j of the product goes to column c_columns[j] of c */
    int accumulate;
    int lower; /* only elements with row >= column are written */
    const float *a;
    int64_t lda;
    const int32_t *a_columns; /* (k,) or NULL: column s of a is column a_columns[s] of the array */
    const void *b;            /* what pack_b reads */
    int64_t ldb;
    /* *block_at(block, s - k0, j - j0) = b[s, j] for s in [k0, k1), j in [j0, j1) */
    void (*pack_b)(float *block, const gemm *g, int64_t k0, int64_t k1, int64_t j0, int64_t j1);
    /* the same for a panel, the NR columns from j on, and SPAN steps at most: *(panel + (s - k0) * NR + lane), lanes beyond n are not used;
     * or NULL, or in its place */
    void (*pack_panel)(float *panel, const gemm *g, int64_t k0, int64_t k1, int64_t j);
    int64_t m, n, k;
    int64_t values;        /* of a row of a; steps are pairs of them */
#if GEMM_PAIRS
    pair_tiles tiles; /* of a */
#endif
    int64_t chunk, across; /* rows of a task; tasks side by side, which share the panels evenly */
    float *blocks;         /* (workers, BLOCK) */
    places workers;
};

/* element (step, column) of a packed block: the next NR - column % NR elements follow it */
static inline float *block_at(float *block, int64_t step, int64_t column) {
    return block + column / NR * PANEL + step * NR + column % NR;
}

/* ---- the register tile --------------------------------------------------------------------------------------- */

static inline vf multiply_words(vf a, vf b, vf sum) {
#if GEMM_PAIRS
    return v_multiply_pairs(a, b, sum);
#else
    return v_fma(a, b, sum);
#endif
}

typedef enum { SET, ADD, GO_ON } tile_mode; /* c = sum; c += sum; c = sum, which begins at c */

/* c (rows, NR) and a tile of a times a panel of b */
static inline __attribute__((always_inline)) void tile(float *c, int64_t ldc, tile_mode mode, const float *a, const float *b,
                                                       int64_t steps, const int rows) {
    vf sum[MR][2];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        sum[r][0] = sum[r][1] = v_zero();
        v_prefetch(c + r * ldc);
        v_prefetch(c + r * ldc + VL);
    }
    if (mode == GO_ON) {
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) { sum[r][0] = v_load(c + r * ldc), sum[r][1] = v_load(c + r * ldc + VL); }
    }
#pragma GCC unroll 2
    for (int64_t s = 0; s < steps; s++) {
        vf b0 = v_load(b), b1 = v_load(b + VL);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            vf x = v_set1(a[r * A_ROW]);
            sum[r][0] = multiply_words(x, b0, sum[r][0]);
            sum[r][1] = multiply_words(x, b1, sum[r][1]);
        }
        a += A_STEP, b += NR;
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        float *row = c + r * ldc;
        v_store(row, mode == ADD ? v_add(v_load(row), sum[r][0]) : sum[r][0]);
        v_store(row + VL, mode == ADD ? v_add(v_load(row + VL), sum[r][1]) : sum[r][1]);
    }
}

typedef void tile_function(float *c, int64_t ldc, tile_mode mode, const float *a, const float *b, int64_t steps);
#define TILE(rows)                                                                                             \
    static void tile_##rows(float *c, int64_t ldc, tile_mode mode, const float *a, const float *b, int64_t steps) { \
        tile(c, ldc, mode, a, b, steps, rows);                                                               \
    }
TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
#if V_AVX512
TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12) TILE(13) TILE(14)
#endif
static tile_function *const tiles[MR + 1] = {
    NULL, tile_1, tile_2, tile_3, tile_4, tile_5, tile_6,
#if V_AVX512
    tile_7, tile_8, tile_9, tile_10, tile_11, tile_12, tile_13, tile_14,
#endif
};

/* ---- packing ------------------------------------------------------------------------------------------------- */

#if !GEMM_PAIRS
/* rows [i, i + rows) of a, at most A_TILES tiles, steps [k0, k1) */
static void pack_a(float *tile_a, const gemm *g, int64_t i, int64_t rows, int64_t k0, int64_t k1) {
#if GEMM_A_TRANSPOSED
    for (int64_t s = k0; s < k1; s++) {
        const float *row = g->a + s * g->lda + i;
        float *out = tile_a + (s - k0) * A_STEP;
        for (int64_t r = 0; r < rows; r += MR, out += A_SIZE) { v_store(out, v_load_tail(row + r, at_most(MR, rows - r))); }
    }
#else
    for (int64_t r = 0; r < rows; r++) {
        const float *row = g->a + (i + r) * g->lda;
        float *out = tile_a + r * A_ROW;
        if (g->a_columns == NULL) {
            memcpy(out, row + k0, (size_t)(k1 - k0) * sizeof *out);
        } else {
            for (int64_t s = k0; s < k1; s++) { out[s - k0] = row[g->a_columns[s]]; }
        }
    }
#endif
}

/* one row of a block from contiguous columns */
static inline void pack_row(float *block, int64_t step, const float *row, int64_t columns) {
    for (int64_t j = 0; j < columns; j += NR) {
        memcpy(block_at(block, step, j), row + j, (size_t)at_most(NR, columns - j) * sizeof *row);
    }
}

/* the columns that fill the last panel of a block are zero */
static void pad_block(float *block, int64_t steps, int64_t columns) {
    int64_t missing = pieces(columns, NR) * NR - columns;
    for (int64_t s = 0; s < steps && missing > 0; s++) {
        memset(block_at(block, s, columns), 0, (size_t)missing * sizeof *block);
    }
}
#endif

/* ---- tasks --------------------------------------------------------------------------------------------------- */

/* a tile that cannot go to c as it is: a partial panel, the diagonal, scattered columns */
static void merge_tile(const gemm *g, const float *sums, int add, int64_t i, int64_t rows, int64_t j, int64_t columns) {
    for (int64_t r = 0; r < rows; r++) {
        float *row = g->c + (i + r) * g->ldc;
        int64_t count = g->lower ? at_most(columns, i + r - j + 1) : columns;
        for (int64_t q = 0; q < count; q++) {
            float *element = row + (g->c_columns != NULL ? g->c_columns[j + q] : j + q);
            *element = add ? *element + sums[r * NR + q] : sums[r * NR + q];
        }
    }
}

static void multiply_tile(const gemm *g, const float *tile_a, const float *block, int add, int64_t i, int64_t rows, int64_t j0,
                          int64_t j1, int64_t steps) {
    alignas(64) float sums[MR * NR];
    for (int64_t j = j0; j < j1; j += NR) {
        int64_t columns = at_most(NR, j1 - j);
        if (g->lower && j > i + rows - 1) { break; }
        if (columns == NR && g->c_columns == NULL && !(g->lower && j + NR - 1 > i)) {
            tiles[rows](g->c + i * g->ldc + j, g->ldc, add ? ADD : SET, tile_a, block + (j - j0) / NR * PANEL, steps);
        } else {
            tiles[rows](sums, NR, SET, tile_a, block + (j - j0) / NR * PANEL, steps);
            merge_tile(g, sums, add, i, rows, j, columns);
        }
    }
}

/* of a tile, where `rows` are shared evenly by as few tiles as possible: one of a few rows is slower, row by row */
static inline int64_t even_rows(int64_t rows) { return pieces(rows, pieces(rows, MR)); }

/* rows [i0, i1) of c, columns [j0, j1), with steps [k, k + steps), whose block of b is packed */
static void multiply_rows(const gemm *g, const float *block, int64_t i0, int64_t i1, int64_t j0, int64_t j1, int64_t k,
                          int64_t steps) {
    const int add = g->accumulate || k > 0;
#if GEMM_PAIRS
    for (int64_t i = i0, rows = g->tiles.rows; i < i1; i += rows) {
        multiply_tile(g, tile_at(&g->tiles, i, k), block, add, i, at_most(rows, i1 - i), j0, j1, steps);
    }
#else
    alignas(64) float tile_a[A_TILES * A_SIZE];
    const int64_t rows = GEMM_A_TRANSPOSED ? MR : even_rows(i1 - i0);
    for (int64_t i = i0; i < i1; i += A_TILES * rows) {
        int64_t end = at_most(i + A_TILES * rows, i1);
        pack_a(tile_a, g, i, end - i, k, k + steps);
        for (int64_t r = i; r < end; r += rows) {
            multiply_tile(g, tile_a + (r - i) / MR * A_SIZE, block, add, r, at_most(rows, end - r), j0, j1, steps);
        }
    }
#endif
}

static void pack_block(float *block, const gemm *g, int64_t k0, int64_t k1, int64_t j0, int64_t j1) {
#if !GEMM_PAIRS
    if (g->pack_panel == NULL) {
        g->pack_b(block, g, k0, k1, j0, j1);
        pad_block(block, k1 - k0, j1 - j0);
        return;
    }
#endif
    for (int64_t j = j0; j < j1; j += NR) {
        for (int64_t k = k0; k < k1; k += SPAN) { g->pack_panel(block_at(block, k - k0, j - j0), g, k, at_most(k + SPAN, k1), j); }
    }
}

#if !GEMM_A_TRANSPOSED
/* All rows of c, MOST_FEW at most, columns [j0, j1): sums of a panel go on from span to span, as those of a tile do in registers. */
static void few_rows(const gemm *g, float *memory, int64_t j0, int64_t j1) {
    float *panel = memory, *sums = panel + SPAN * NR;
    int64_t rows = even_rows(g->m);
    for (int64_t k = 0; k < g->k; k += KC) {
        int64_t end = at_most(k + KC, g->k);
#if GEMM_PAIRS
        const float *a = tile_at(&g->tiles, 0, k);
#else
        float *a = sums + MOST_FEW * NR;
        pack_a(a, g, 0, g->m, k, end);
#endif
        for (int64_t j = j0; j < j1; j += NR) {
            for (int64_t s = k; s < end; s += SPAN) {
                int64_t steps = at_most(SPAN, end - s);
                g->pack_panel(panel, g, s, s + steps, j);
                for (int64_t i = 0; i < g->m; i += rows) {
                    tiles[at_most(rows, g->m - i)](sums + i * NR, NR, s > k ? GO_ON : SET, a + i * A_ROW + s - k, panel, steps);
                }
            }
            merge_tile(g, sums, g->accumulate || k > 0, 0, g->m, j, at_most(NR, j1 - j));
        }
    }
}

static void few_task(void *context, int64_t task) {
    const gemm *g = context;
    int64_t panels = pieces(g->n, NR), worker = take_place(&g->workers);
    few_rows(g, g->blocks + worker * BLOCK, task * panels / g->across * NR, at_most((task + 1) * panels / g->across * NR, g->n));
    leave_place(&g->workers, worker);
}
#endif

static void gemm_task(void *context, int64_t task) {
    const gemm *g = context;
    int64_t i0 = task / g->across * g->chunk, i1 = at_most(i0 + g->chunk, g->m);
    int64_t panels = pieces(g->n, NR), place = task % g->across;
    int64_t j0 = place * panels / g->across * NR, j1 = at_most((place + 1) * panels / g->across * NR, g->n);
    if (g->lower && j0 > i1 - 1) { return; }
    int64_t worker = take_place(&g->workers);
    float *block = g->blocks + worker * BLOCK;
    for (int64_t k = 0; k < g->k; k += KC) {
        int64_t steps = at_most(KC, g->k - k);
        pack_block(block, g, k, k + steps, j0, j1);
        multiply_rows(g, block, i0, i1, j0, j1, k, steps);
    }
    leave_place(&g->workers, worker);
}

static int64_t task_count(const gemm *g) { return pieces(g->m, g->chunk) * g->across; }

/* what the busiest thread does, in products of a row and a column. The tasks of a triangle differ: all together are half of
 * what they would be, and the largest may be the last. */
static double cost(const gemm *g, int64_t threads) {
    double rows = (double)g->chunk, columns = (double)g->n / (double)g->across;
    double tasks = (double)task_count(g), even = (double)pieces(task_count(g), threads);
    double rounds = g->lower ? (tasks / 2 + (double)threads - 1) / (double)threads : even;
    return rounds * (rows * columns + rows * PACK_A + columns * PACK_B);
}

/* Tasks as large as the number of threads allows: the cheapest of m, m / 2, … rows and of the numbers of tasks side by side
 * from the smallest on: every `threads` of them one gives all threads as many tasks, and a triangle may want some more. */
static void choose_tasks(gemm *g, int64_t threads) {
    const int64_t panels = pieces(g->n, NR), first = pieces(panels, g->m < PACK_B ? FEW_PANELS : PANELS);
#if GEMM_PAIRS
    const int64_t unit = g->tiles.rows;
#else
    const int64_t unit = MR;
#endif
    gemm best = *g, trial = *g;
    double least = INFINITY;
    for (trial.chunk = at_most(g->m, MAX_CHUNK);; trial.chunk = pieces(pieces(trial.chunk, 2), unit) * unit) {
        for (trial.across = first; trial.across <= at_most(first + 2 * threads, panels); trial.across++) {
            double c = cost(&trial, threads);
            if (c < least) { least = c, best = trial; }
        }
        if (trial.chunk <= PACK_B) { break; }
    }
    *g = best;
}

#if GEMM_PAIRS
/* g->tiles but for its words; returns their size */
static int64_t plan_tiles(gemm *g) {
    g->tiles = (pair_tiles){.x = g->a, .columns = g->a_columns, .ldx = g->lda, .m = g->m, .values = g->values, .rows = even_rows(g->m)};
    return words_of_tiles(&g->tiles);
}

static int gemm_run(gemm *g, int64_t count);

static int run_halves(const gemm *g, int64_t count) {
    gemm first[QL_PRODUCTS], second[QL_PRODUCTS];
    for (int64_t p = 0; p < count; p++) {
        first[p] = second[p] = g[p];
        first[p].m = pieces(g[p].m, 2), second[p].m = g[p].m - first[p].m; /* no half of it needs more memory than the first */
        second[p].a += first[p].m * g[p].lda, second[p].c += first[p].m * g[p].ldc;
    }
    return gemm_run(first, count) && gemm_run(second, count);
}
#endif

/* the product, for which there is memory */
static void run_tasks(gemm *g, int64_t threads) {
#if !GEMM_A_TRANSPOSED
    if (g->m <= MOST_FEW && g->pack_panel != NULL) {
        int64_t panels = pieces(g->n, NR);
        g->across = at_most(pieces(panels, threads * FEW_TOGETHER) * threads, panels);
        ql_parallel_for(g->across, few_task, g);
        return;
    }
#endif
    choose_tasks(g, threads);
    ql_parallel_for(task_count(g), gemm_task, g);
}

/* `count` products of one a, one after the other. 0: no memory for the blocks of b, nothing is written */
static int gemm_run(gemm *g, int64_t count) {
    if (g->m < 1) { return 1; }
    int64_t threads = ql_threads(), size = threads * BLOCK, packed = 0;
#if GEMM_PAIRS
    if (g->m > MOST_TILED) { return run_halves(g, count); }
    packed = plan_tiles(g);
#endif
    float *memory = ql_scratch((size_t)(size + packed) * sizeof *memory + (size_t)threads * sizeof(atomic_int));
    if (memory == NULL) { return 0; }
#if GEMM_PAIRS
    g->tiles.words = memory + size;
    pack_tiles(&g->tiles);
#endif
    for (int64_t p = 0; p < count; p++) {
        g[p].blocks = memory, g[p].workers = make_places((atomic_int *)(void *)(memory + size + packed), threads);
#if GEMM_PAIRS
        g[p].tiles = g->tiles;
#endif
        if (g[p].n > 0) { run_tasks(&g[p], threads); }
    }
    return 1;
}

#endif
