/* tile_amx.h: c (m, n) = a (m, k) b (k, n), or += where `accumulate` is set, on AMX tiles: operands of 16 bits or of
 * three bytes, float32 sums.
 *
 * Operands are cut into tiles of 1 KiB. A tile of a: 16 rows, 32 steps of k. A tile of b: 16 pairs of steps, 16 columns, the
 * two steps of a pair side by side. Both operands are one plane, their values as bf16, or two, high and low, with high + low the
 * value to 2^-16: low low, another 2^-16 of a product at most, is left out. Or both are three planes of limbs (limbs.h), and a
 * step is two values of k, a byte each: a row of a, a column of b has one scale for each block of k, in which sums are int32. All
 * tiles beyond an edge are filled with zeros.
 *
 *   packed a  [block of k][32 rows][plane][32 steps][2 tiles]    by pack_a, once a call, in scratch memory
 *   block     [32 columns][plane][32 steps][2 tiles]             by pack_b, a block of k at a time, in the second-level cache;
 *                                                                of a symmetric product by pack_a, once a call
 *   sums      [32 rows][32 columns][2 x 2 tiles]                 between blocks of k, in the second-level cache
 *
 * What is there for 32 rows or columns is a panel; one of limbs ends with the largest value of each.
 *
 * A task owns `chunk` rows and `width` columns of c. For each block of k it packs b, then each 32 rows of a, which fit the
 * first-level cache, meet all columns, 2 x 2 tiles at a time (quad_amx.h). Tile products add in the order of k, 32 steps of all
 * planes at a time, and sums are kept as they are between blocks, so an element's value does not depend on m, on the task or on
 * the number of threads. Few rows of a have tasks of their own, in which each 32 columns of b meet all of them. */
#ifndef QL_TILE_AMX_H
#define QL_TILE_AMX_H

#include "../core/sizes.h"
#include "../quantlab.h"
#include "places.h"
#include "quad_amx.h"

#include "panels.h" /* of vectors */

#include <stdalign.h> /* alignas */

enum {
    BLOCK_STEPS = 512,        /* steps of k in a block, all planes together: 32 rows of a are 32 KiB, two thirds of the cache */
    SHORT_K = 768,            /* steps that are one block still, since it needs no sums between blocks */
    LIMB_STEPS = 192,         /* of a block of limbs, */
    SHORT_LIMBS = 288,        /* steps that are one such block still: the sums of their products are far from the end of an int32 */
    MAX_WIDTH = 512,          /* columns of a task */
    MAX_SUMS = 512 * 512,     /* of a task, 1 MiB; also bounds its rows times its columns */
    MIN_CHUNK = 256,          /* rows below which packing b costs more than an idle thread */
    LARGE_RESULT = 8 << 20,   /* bytes of c, */
    LARGE_ROW = 16384,        /* and its columns, see goes_past_caches */
    PASS_ROWS = 2048,         /* rows of a that are packed at once */
    BLOCK_SIZE = 256 * SHORT_K, /* elements of a block of b */
    SCALES = 2 * SIDE,        /* elements of a panel of limbs that hold the largest values */
    FEW_IN_PLACE = 128,       /* few rows: where b is read as it lies, */
    FEW_PACKED = 64,          /* and where 32 columns of it are packed at a time, which spares sums between blocks of k */
    FEW_AHEAD = 1024          /* columns of b^T from what is read to what is fetched meanwhile */
};

typedef struct tile_gemm tile_gemm;
struct tile_gemm {
    float *c; /* (m, n) */
    int64_t ldc;
    const int32_t *c_columns; /* (n,) or NULL: column j of the product goes to column c_columns[j] of c */
    int accumulate;
    int past_caches; /* whole cache lines of c go to memory at once, see goes_past_caches */
    int lower; /* only elements with row >= column are written */
    const void *a, *b; /* what pack_a and pack_b read */
    int64_t lda, ldb;
    /* the tiles of rows [i, i + 32) and steps [k0, k1) of a, planes plane_size(k1 - k0) apart; k0 is a multiple of 32 */
    void (*pack_a)(uint16_t *panel, const tile_gemm *g, int64_t i, int64_t k0, int64_t k1);
    /* the tiles of columns [j0, j1) and steps [k0, k1) of b: see panel_at */
    void (*pack_b)(uint16_t *block, const tile_gemm *g, int64_t k0, int64_t k1, int64_t j0, int64_t j1);
    const char *codes; /* what pack_b reads, or NULL: step k of column j is bit k code_bits of the row at j codes_ld bytes */
    int64_t codes_ld, code_bits;
    int in_place; /* they are b^T as bf16, in whole 32 steps: tiles as they lie */
    int planes; /* LIMBS: limbs */
    int64_t m, n, k;
    int transposed; /* the tiles are those of c^T = b^T a^T: pack_a leaves pairs of steps, pack_b rows; with one plane */
    int symmetric; /* b is the transpose of a: pack_a leaves the tiles of both, where packed_b is not NULL */
    /* filled by tile_gemm_run */
    int64_t i0, i1;         /* the rows of this pass */
    int64_t block_k;        /* steps of a block of k, a multiple of 32 */
    int64_t chunk, width;
    uint16_t *packed_a;
    uint16_t *packed_b;     /* all blocks of k one after another, or NULL: pack_b packs them when they are needed */
    uint16_t *blocks;       /* (workers, BLOCK_SIZE) */
    float *sums;            /* (workers, sums_size) */
    int64_t sums_size;
    places workers;
};

/* bf16 elements of one plane of a panel: 32 rows or columns, `steps` steps */
static inline int64_t plane_size(int64_t steps) { return round_up(steps, SIDE) * SIDE; }

/* whether a product has few rows, and tasks for them */
static inline int takes_few_rows(const tile_gemm *g) {
    int64_t most = g->in_place ? FEW_IN_PLACE : g->k > SHORT_K ? FEW_PACKED : 0;
    return g->m <= most && g->planes == 1 && g->transposed;
}

/* tiles of 16 rows in a panel of a: few rows leave out a second one that would be empty */
static inline int64_t tall_of(const tile_gemm *g) { return takes_few_rows(g) && g->m <= 16 ? 1 : 2; }

/* ---- tasks ------------------------------------------------------------------------------------------------------ */

/* the first `count` of 16 sums to c at (i, j) */
static inline void merge_row(const tile_gemm *g, vf sum, int64_t i, int64_t j, int64_t count) {
    float *row = g->c + i * g->ldc;
    if (g->c_columns != NULL) {
        vm lanes = vm_first(count);
        vi at = _mm512_maskz_loadu_epi32(lanes, g->c_columns + j);
        if (g->accumulate) { sum = v_add(sum, _mm512_mask_i32gather_ps(v_zero(), lanes, at, row, 4)); }
        _mm512_mask_i32scatter_ps(row, lanes, at, sum, 4);
    } else {
        if (g->accumulate) { sum = v_add(sum, v_load_tail(row + j, count)); }
        if (count == VL) {
            store_line(row + j, sum, g->past_caches);
        } else {
            v_store_tail(row + j, sum, count);
        }
    }
}

/* 2 x 2 tiles of sums to c at (i, j): at an edge, on the diagonal, to scattered columns, or to be added */
static void merge_quad(const tile_gemm *g, const float *sums, int64_t i, int64_t rows, int64_t j, int64_t columns) {
    for (int64_t r = 0; r < rows; r += 4) {
        const float *tile = sums + r / 16 * (QUAD / 2);
        for (int64_t first = 0; first < columns; first += 16, tile += QUAD / 4) {
            vf lines[4];
            if (g->transposed) {
                v_transpose4(lines, tile + r % 16, 16);
            } else {
                for (int64_t q = 0; q < 4; q++) { lines[q] = v_load(tile + (r % 16 + q) * 16); }
            }
            for (int64_t q = 0; q < at_most(4, rows - r); q++) {
                int64_t count = g->lower ? at_most(columns, i + r + q - j + 1) : columns;
                if (count > first) { merge_row(g, lines[q], i + r + q, j + first, at_most(16, count - first)); }
            }
        }
    }
}

/* elements of a panel of `steps` steps */
static inline int64_t panel_size(const tile_gemm *g, int64_t steps) {
    return g->planes * plane_size(steps) + (g->planes == LIMBS ? SCALES : 0);
}

/* the panel of column j in a block of b of `steps` steps */
static inline uint16_t *panel_at(uint16_t *block, const tile_gemm *g, int64_t j, int64_t steps) {
    return block + j / SIDE * panel_size(g, steps);
}

/* the panel of packed a that holds row i and block [k0, k1); the blocks before it have block_k steps each */
static inline uint16_t *panel_of_a(const tile_gemm *g, int64_t i, int64_t k0, int64_t k1) {
    int64_t before = pieces(g->i1 - g->i0, SIDE) * (k0 / g->block_k) * panel_size(g, g->block_k);
    return g->packed_a + before + (i - g->i0) / SIDE * panel_size(g, k1 - k0);
}

/* the panel of packed b that holds column j and block [k0, k1) */
static inline uint16_t *panel_of_b(const tile_gemm *g, int64_t j, int64_t k0, int64_t k1) {
    return panel_at(g->packed_b + pieces(g->n, SIDE) * (k0 / g->block_k) * panel_size(g, g->block_k), g, j, k1 - k0);
}

static void pack_a_task(void *context, int64_t task) {
    const tile_gemm *g = context;
    int64_t i = g->i0 + task * SIDE;
    for (int64_t k0 = 0; k0 < g->k; k0 += g->block_k) {
        int64_t k1 = at_most(k0 + g->block_k, g->k);
        g->pack_a(panel_of_a(g, i, k0, k1), g, i, k0, k1);
    }
}

/* what a task multiplies: 32 rows of a from row i, block [k0, k1), columns [j0, j1) */
typedef struct {
    int64_t i, j0, j1, k0, k1;
    int64_t next_j, next_end; /* columns whose codes of the next block are asked for meanwhile */
} strip;

/* which codes the quad of column j asks for: its share of those that are left */
static void take_codes(quad *q, const tile_gemm *g, strip *s, int64_t j) {
    int64_t from = s->k1 * g->code_bits / 8 / 64 * 64, end = at_most(s->k1 + g->block_k, g->k) * g->code_bits / 8;
    q->codes = g->codes + s->next_j * g->codes_ld + from, q->codes_ld = g->codes_ld, q->code_bytes = end - from, q->code_at = 0;
    q->code_rows = pieces(s->next_end - s->next_j, pieces(s->j1 - j, SIDE));
    q->code_pace = pieces(q->code_rows * pieces(end - from, 64), pieces(s->k1 - s->k0, SIDE));
    s->next_j += q->code_rows;
}

/* 32 rows of a, one block of k, against all columns of the task. The last result is still on its way then, see q. */
static void multiply_rows(const tile_gemm *g, quad *q, strip s, uint16_t *block, float *sums) {
    int64_t rows = at_most(SIDE, g->i1 - s.i), steps = s.k1 - s.k0, size = panel_size(g, steps);
    int64_t asks = pieces(steps, SIDE) * (g->planes == LIMBS ? LIMBS : 1); /* times that a quad asks for memory */
    int last_block = s.k1 == g->k, turns = last_block && g->transposed;
    q->a = panel_of_a(g, s.i, s.k0, s.k1), q->steps = steps, q->plane = plane_size(steps);
    q->fetch = (const char *)(q->a + size), q->fetch_end = (const char *)(q->a + 2 * size);
    q->fetch_pace = pieces(size * (int64_t)sizeof *q->a, 64 * asks * pieces(s.j1 - s.j0, SIDE));
    for (int64_t j = s.j0; j < s.j1 && !(g->lower && j > s.i + rows - 1); j += SIDE, sums += QUAD) {
        int64_t columns = at_most(SIDE, s.j1 - j);
        int whole = rows == SIDE && columns == SIDE && !(g->lower && j + columns - 1 > s.i);
        int inside = whole && !g->accumulate && g->c_columns == NULL, direct = last_block && inside && !turns;
        float *c = g->c + s.i * g->ldc + j;
        q->b = panel_at(block, g, j - s.j0, steps);
        q->before = s.k0 > 0 ? sums : NULL;
        q->after = (tile_target){turns ? q->turned : sums, 16, QUAD / 2, QUAD / 4};
        if (direct) { q->after = (tile_target){c, g->ldc, 16 * g->ldc, 16}; }
        q->code_rows = 0;
        if (s.next_j < s.next_end) { take_codes(q, g, &s, j); }
        q->past_caches = g->past_caches && (turns || direct);
        if (q->past_caches && !turns) {
            q->lines = 0;
        } else if (direct && g->planes == LIMBS) { /* whole tiles go to c faster where nobody has asked for its lines before */
            q->line = (const char *)c, q->line_ld = g->ldc * (int64_t)sizeof *c, q->lines = rows;
        } else { /* the next sums */
            q->line = (const char *)(sums + QUAD), q->line_ld = 2 * 64, q->lines = g->k > g->block_k ? SIDE : 0;
        }
        q->line_pace = pieces(q->lines, asks);
        multiply_quad(q, rows > 16 ? 2 : 1, columns > 16 ? 2 : 1);
        if (turns && inside) {
            q->out = c, q->out_ld = g->ldc, q->left = FOURS;
        } else if (last_block && !inside) {
            release(q);
            merge_quad(g, q->after.at, s.i, rows, j, columns);
        }
    }
}

static void tile_gemm_task(void *context, int64_t task) {
    const tile_gemm *g = context;
    int64_t across = pieces(g->n, g->width);
    int64_t i0 = g->i0 + task / across * g->chunk, i1 = at_most(i0 + g->chunk, g->i1);
    int64_t j0 = task % across * g->width, j1 = at_most(j0 + g->width, g->n);
    if (g->lower && j0 > i1 - 1) { return; }
    int64_t worker = take_place(&g->workers), quads_a_row = pieces(g->width, SIDE);
    uint16_t *block = g->blocks + worker * BLOCK_SIZE;
    float *sums = g->sums + worker * g->sums_size;
    alignas(64) float turned[QUAD];
    quad q = {.planes = g->planes, .transposed = g->transposed, .turned = turned};
    tile_config before;
    configure_tiles(&before);
    for (int64_t k0 = 0; k0 < g->k; k0 += g->block_k) {
        int64_t k1 = at_most(k0 + g->block_k, g->k);
        uint16_t *panels = block;
        if (g->packed_b != NULL) {
            panels = panel_of_b(g, j0, k0, k1);
        } else {
            g->pack_b(block, g, k0, k1, j0, j1);
        }
        for (int64_t i = i0; i < i1; i += SIDE) {
            int64_t kept = g->k > g->block_k ? (i - i0) / SIDE * quads_a_row * QUAD : 0;
            strip s = {.i = i, .j0 = j0, .j1 = j1, .k0 = k0, .k1 = k1};
            if (g->codes != NULL && k1 < g->k) { /* its share of the columns */
                s.next_j = j0 + (j1 - j0) * (i - i0) / (i1 - i0);
                s.next_end = j0 + (j1 - j0) * at_most(i + SIDE - i0, i1 - i0) / (i1 - i0);
            }
            multiply_rows(g, &q, s, panels, sums + kept);
        }
    }
    release(&q);
    while (q.left > 0) { put_four(&q); }
    restore_tiles(&before);
    if (g->past_caches) { _mm_sfence(); }
    leave_place(&g->workers, worker);
}

static int64_t task_count(const tile_gemm *g) { return pieces(g->i1 - g->i0, g->chunk) * pieces(g->n, g->width); }

/* The rest is for `count` products of one a, of one kind and one k: all their tasks are one loop. */

static int64_t widest_of(const tile_gemm *g, int64_t count) {
    int64_t widest = 0;
    for (int64_t p = 0; p < count; p++) { widest = g[p].width > widest ? g[p].width : widest; }
    return widest;
}

/* 1: no thread waits for another at the end, were all tasks as large as the largest; what tiles fill up with zeros counts too */
static double balance(const tile_gemm *g, int64_t count, int64_t threads) {
    int64_t tasks = 0, columns = 0;
    for (int64_t p = 0; p < count; p++) { tasks += task_count(&g[p]), columns += round_up(g[p].n, SIDE); }
    double shares = (double)(threads * pieces(tasks, threads)) * (double)(widest_of(g, count) * g->chunk);
    return threads == 1 ? 1.0 : (double)round_up(g->i1 - g->i0, SIDE) * (double)columns / shares;
}

static void narrow(tile_gemm *g, int64_t count) {
    int64_t width = widest_of(g, count) - SIDE;
    for (int64_t p = 0; p < count; p++) { g[p].width = at_most(g[p].width, width); }
}

static void choose_tasks(tile_gemm *g, int64_t count, int64_t threads) {
    const double enough = 0.9;
    int64_t rows = g->i1 - g->i0, most = at_most(MAX_WIDTH, BLOCK_SIZE / panel_size(g, g->block_k) * SIDE);
    int64_t tallest = MAX_SUMS / most / SIDE * SIDE;
    for (int64_t p = 0; p < count; p++) {
        g[p].width = round_up(pieces(g[p].n, pieces(g[p].n, most)), SIDE);
        g[p].chunk = round_up(pieces(rows, pieces(rows, tallest)), SIDE);
    }
    while (balance(g, count, threads) < enough && widest_of(g, count) > 3 * SIDE) { narrow(g, count); }
    while (balance(g, count, threads) < enough && g->chunk >= 2 * MIN_CHUNK) {
        int64_t chunk = round_up(pieces(g->chunk, 2), SIDE);
        for (int64_t p = 0; p < count; p++) { g[p].chunk = chunk; }
    }
    while (balance(g, count, threads) < enough && widest_of(g, count) > SIDE) { narrow(g, count); }
}

/* Whether one thread multiplies all of it sooner than another core has the packed rows: that costs about 15 us, as measured, the more beside what there
 * is to do the fewer the columns. */
static int is_small(const tile_gemm *g, int64_t count) {
    const double few_columns = 256, small = 8e6, small_of_few = 15e6; /* products of a row, a column and a step */
    double columns = 0;
    for (int64_t p = 0; p < count; p++) { columns += (double)g[p].n; }
    return (double)(g->i1 - g->i0) * columns * (double)g->k <= (columns <= few_columns ? small_of_few : small);
}

/* alone: by this thread, some tens of microseconds in all */
static void run_loops(ql_loop *loops, int64_t n, int alone) {
    if (!alone) { ql_parallel_loops(loops, n); return; }
    for (int64_t l = 0; l < n; l++) {
        for (int64_t i = 0; i < loops[l].count; i++) { loops[l].task(loops[l].context, i); }
    }
}

/* rows [i0, i1) of all products */
static void run_pass(tile_gemm *g, int64_t count, int64_t i0, int64_t i1) {
    ql_loop pack = {pieces(i1 - i0, SIDE), pack_a_task, g}, loops[QL_PRODUCTS];
    for (int64_t p = 0; p < count; p++) { g[p].i0 = i0, g[p].i1 = i1; }
    int alone = is_small(g, count);
    choose_tasks(g, count, alone ? 1 : g->workers.count);
    run_loops(&pack, 1, alone);
    for (int64_t p = 0; p < count; p++) { loops[p] = (ql_loop){task_count(&g[p]), tile_gemm_task, &g[p]}; }
    run_loops(loops, count, alone);
}

/* ---- few rows --------------------------------------------------------------------------------------------------- */

/* 32 columns of b, as rows of b^T: where they are, and elements between rows of a tile, tiles of 32 steps, tiles of 16 columns */
typedef struct {
    const uint16_t *at;
    int64_t ld, step, right;
} few_b;

/* The products of rows [i, i + 32) of a, `tall` tiles of them, with 32 columns of b, as 2 x 2 tiles of the transpose. Where b is read as
 * it lies, each step fetches what comes soon; with more rows of a, their share of the next 32 columns. Meanwhile the products before these
 * go to c, from the same memory. */
ALWAYS_INLINE void few_products(const tile_gemm *g, float *sums, const few_b *b, int64_t i, int in_place, quad *before, const int tall) {
    const uint16_t *a = panel_of_a(g, i, 0, g->k), *tiles = b->at;
    const int64_t step = tall_of(g) * TILE, turns = pieces(g->m, SIDE), turn = i / SIDE;
    const int64_t first = SIDE * turn / turns, end = in_place ? SIDE * (turn + 1) / turns : 0;
    _tile_zero(0);
    _tile_zero(1);
    if (tall > 1) { _tile_zero(2); _tile_zero(3); }
    for (int64_t s = 0; s < g->k; s += SIDE, a += step, tiles += b->step) {
        int64_t ahead = turns > 1 ? SIDE * b->ld : row_ahead(s, g->k, b->ld, SIDE, FEW_AHEAD);
        for (int64_t r = first; r < end; r++) { v_prefetch(tiles + r * b->ld + ahead); }
        if (before->left > 0) { put_four(before); }
        _tile_loadd(4, a, 64);
        _tile_loadd(6, tiles, 2 * b->ld);
        _tile_dpbf16ps(0, 6, 4);
        _tile_loadd(7, tiles + b->right, 2 * b->ld);
        _tile_dpbf16ps(1, 7, 4);
        if (tall > 1) {
            _tile_loadd(5, a + TILE, 64);
            _tile_dpbf16ps(2, 6, 5);
            _tile_dpbf16ps(3, 7, 5);
        }
    }
    while (before->left > 0) { put_four(before); }
    MEMORY_BARRIER();
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + QUAD / 4, 64);
    if (tall > 1) {
        _tile_stored(2, sums + QUAD / 2, 64);
        _tile_stored(3, sums + 3 * QUAD / 4, 64);
    }
}

/* Columns [j, j + 32) for all rows, all steps: those of a row add in the order of many rows, so it has the same bits. */
static void few_columns(const tile_gemm *g, uint16_t *block, float *sums, quad *before, int64_t j) {
    const int64_t columns = at_most(SIDE, g->n - j), ld = g->codes_ld / 2;
    const int in_place = g->in_place && columns == SIDE;
    few_b b = {block, SIDE, 2 * TILE, TILE};
    if (in_place) { b = (few_b){(const uint16_t *)(const void *)g->codes + j * ld, ld, SIDE, 16 * ld}; }
    for (int64_t k0 = 0; k0 < g->k && !in_place; k0 += BLOCK_STEPS) {
        g->pack_b(block + k0 * SIDE, g, k0, at_most(k0 + BLOCK_STEPS, g->k), j, j + columns);
    }
    for (int64_t i = 0; i < g->m; i += SIDE) {
        int64_t rows = at_most(SIDE, g->m - i);
        MEMORY_BARRIER();
        if (rows > 16) {
            few_products(g, sums, &b, i, in_place, before, 2);
        } else {
            few_products(g, sums, &b, i, in_place, before, 1);
        }
        MEMORY_BARRIER();
        if (rows == SIDE && columns == SIDE && !g->accumulate) {
            before->out = g->c + i * g->ldc + j, before->left = FOURS;
        } else {
            merge_quad(g, sums, i, rows, j, columns);
        }
    }
}

static void few_task(void *context, int64_t task) {
    const tile_gemm *g = context;
    const int64_t end = at_most((task + 1) * g->width, g->n), worker = take_place(&g->workers);
    alignas(64) float sums[QUAD];
    quad last = {.turned = sums, .out_ld = g->ldc, .past_caches = g->past_caches};
    tile_config before;
    configure_tiles(&before);
    for (int64_t j = task * g->width; j < end; j += SIDE) { few_columns(g, g->blocks + worker * plane_size(g->k), sums, &last, j); }
    while (last.left > 0) { put_four(&last); }
    restore_tiles(&before);
    if (g->past_caches) { _mm_sfence(); }
    leave_place(&g->workers, worker);
}

/* What tile_gemm_run does, for few rows. 0: no memory for the packed operands. */
static int few_rows_run(tile_gemm *g, int64_t count) {
    const int64_t workers = ql_threads(), size = plane_size(g->k);
    int64_t a_size = pieces(g->m, SIDE) * size, strips = 0;
    ql_loop loops[QL_PRODUCTS];
    uint16_t *memory = ql_scratch((size_t)(a_size + workers * size) * sizeof *memory + (size_t)workers * sizeof(atomic_int));
    if (memory == NULL) { return 0; }
    places all = make_places((atomic_int *)(void *)(memory + a_size + workers * size), workers);
    for (int64_t p = 0; p < count; p++) { strips += pieces(g[p].n, SIDE); }
    for (int64_t p = 0; p < count; p++) {
        g[p].i0 = 0, g[p].i1 = g->m, g[p].block_k = round_up(g->k, SIDE), g[p].workers = all;
        g[p].packed_a = memory, g[p].blocks = memory + a_size;
        g[p].width = SIDE * part_of(strips, SIDE * g->k * (int64_t)sizeof *memory, 1, g->m);
        loops[p] = (ql_loop){pieces(g[p].n, g[p].width), few_task, &g[p]};
    }
    ql_parallel_for(pieces(g->m, SIDE), pack_a_task, g);
    ql_parallel_loops(loops, count);
    return 1;
}

/* 0: no memory for the packed operands, nothing is written */
static int tile_gemm_run(tile_gemm *g, int64_t count) {
    if (g->m < 1 || g->n < 1) { return 1; }
    if (takes_few_rows(g)) { return few_rows_run(g, count); }
    int64_t workers = ql_threads();
    int64_t most = (g->planes * g->k <= SHORT_K ? SHORT_K : BLOCK_STEPS) / g->planes;
    if (g->planes == LIMBS) { most = g->k <= SHORT_LIMBS ? SHORT_LIMBS : LIMB_STEPS; }
    g->block_k = round_up(pieces(g->k, pieces(g->k, most)), SIDE);
    int64_t pass = at_most(g->m, PASS_ROWS);
    int64_t a_size = pieces(pass, SIDE) * pieces(g->k, g->block_k) * panel_size(g, g->block_k);
    int64_t b_size = g->symmetric && g->m <= PASS_ROWS ? a_size : 0;
    g->sums_size = g->k > g->block_k ? MAX_SUMS : MAX_WIDTH * SIDE;
    int64_t held_size = round_up(workers, 16); /* whole cache lines */
    char *memory = ql_scratch((size_t)(a_size + b_size + workers * BLOCK_SIZE) * sizeof *g->packed_a +
                              (size_t)(workers * g->sums_size) * sizeof *g->sums + (size_t)held_size * sizeof(atomic_int));
    if (memory == NULL) { return 0; }
    g->packed_a = (uint16_t *)(void *)memory;
    g->packed_b = b_size > 0 ? g->packed_a + a_size : NULL;
    g->blocks = g->packed_a + a_size + b_size;
    g->sums = (float *)(void *)(g->blocks + workers * BLOCK_SIZE);
    g->workers = make_places((atomic_int *)(void *)(g->sums + workers * g->sums_size), workers);
    for (int64_t p = 1; p < count; p++) {
        g[p].block_k = g->block_k, g[p].packed_a = g->packed_a, g[p].packed_b = NULL, g[p].blocks = g->blocks;
        g[p].sums = g->sums, g[p].sums_size = g->sums_size, g[p].workers = g->workers;
    }
    for (int64_t i = 0; i < g->m; i += PASS_ROWS) { run_pass(g, count, i, at_most(i + PASS_ROWS, g->m)); }
    return 1;
}

#endif
