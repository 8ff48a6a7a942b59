/* quad_amx.h: 2 x 2 tiles of sums: the products of 32 rows of a and 32 columns of b over a block of k (tile_amx.h). */
#ifndef QL_QUAD_AMX_H
#define QL_QUAD_AMX_H

#include "../core/sizes.h"
#include "bf16_amx.h"
#include "limbs.h"

#include <stdalign.h> /* alignas */

enum { FOURS = 2 * SIDE / 4 }; /* of cache lines in 2 x 2 tiles */

/* where 2 x 2 tiles of sums go: `down` and `right` elements apart, their rows `ld` */
typedef struct {
    float *at;
    int64_t ld, down, right;
} tile_target;

typedef struct {
    const uint16_t *a, *b;
    int64_t steps, plane; /* elements between the planes of an operand */
    int planes;           /* LIMBS: limbs */
    int transposed;       /* tiles of sums are those of the transpose: with one plane */
    const float *before;  /* 2 x 2 tiles to add to, or NULL */
    tile_target after;    /* where the result goes */
    tile_target held;     /* and where that of the quad before goes, which the tiles still hold; at NULL: they hold none */
    const char *fetch, *fetch_end; /* memory that is needed soon, `fetch_pace` lines beside 32 steps */
    const char *line;              /* and what is added to or written next: pairs of lines, `line_ld` bytes apart, `lines` of them */
    int64_t fetch_pace, line_ld, lines, line_pace;
    const char *codes; /* and what the next block of b is made of: `code_bytes` of each of `code_rows` rows, `codes_ld` bytes apart, */
    int64_t codes_ld, code_bytes, code_rows, code_at, code_pace; /* from `code_at` on, so many lines at a time */
    /* Memory for whole tiles of the transpose: the result of the quad before, which goes from there to rows `out_ld` apart while
     * this one is computed, four cache lines at a time, `left` times more. */
    float *turned, *out;
    int64_t out_ld, left;
    int past_caches; /* whole cache lines of the result go to memory at once */
} quad;

/* Asks for a few lines of memory: as many beside each step as need be, since many at once keep tiles waiting. */
static inline __attribute__((always_inline)) void fetch(quad *q) {
    for (int64_t i = 0; i < q->fetch_pace && q->fetch < q->fetch_end; i++, q->fetch += 64) { _mm_prefetch(q->fetch, _MM_HINT_T1); }
    for (int64_t i = 0; i < q->line_pace && q->lines > 0; i++, q->lines--, q->line += q->line_ld) {
        __builtin_prefetch(q->line, 1);
        __builtin_prefetch(q->line + 64, 1);
    }
    for (int64_t i = 0; i < q->code_pace && q->code_rows > 0; i++) {
        _mm_prefetch(q->codes + q->code_at, _MM_HINT_T1);
        q->code_at += 64;
        if (q->code_at >= q->code_bytes) { q->code_at = 0, q->codes += q->codes_ld, q->code_rows--; }
    }
}

static inline __attribute__((always_inline)) void store_line(float *line, vf values, int past_caches) {
    if (past_caches) {
        _mm512_stream_ps(line, values);
    } else {
        v_store(line, values);
    }
}

/* four lines of the result of the quad before */
static inline __attribute__((always_inline)) void put_four(quad *q) {
    int64_t four = FOURS - q->left--, r = four / 2 * 4, half = four % 2;
    float *out = q->out + r * q->out_ld + half * 16;
    vf lines[4];
    v_transpose4(lines, q->turned + r / 16 * (QUAD / 2) + half * (QUAD / 4) + r % 16, 16);
    for (int64_t l = 0; l < 4; l++) { store_line(out + l * q->out_ld, lines[l], q->past_caches); }
}

/* what is done between tile products, which take much longer */
static inline __attribute__((always_inline)) void do_between(quad *q) {
    fetch(q);
    if (q->left > 0) { put_four(q); }
}

/* what tiles hold, a constant after inlining */
enum { PRODUCT, TRANSPOSED, PRODUCT_OF_LIMBS };

#define MULTIPLY(kind, sum, a, b)            \
    if ((kind) == PRODUCT_OF_LIMBS) {        \
        _tile_dpbssd(sum, a, b);             \
    } else if ((kind) == TRANSPOSED) {       \
        _tile_dpbf16ps(sum, b, a);           \
    } else {                                 \
        _tile_dpbf16ps(sum, a, b);           \
    }

/* sums (2 x 2 tiles of 16 x 16) += tiles 4, 5 of a, loaded from `a`, times tiles 6, 7 of b, loaded from `b` where that is not
 * NULL: past the first-level cache, where those of a stay for all columns. All loads first: products wait for them less. */
static inline __attribute__((always_inline)) void multiply_step(const uint16_t *a, const uint16_t *b, const int kind, const int rows,
                                                                const int columns) {
    _tile_loadd(4, a, 64);
    if (b != NULL) { _tile_stream_loadd(6, b, 64); }
    if (rows > 1) { _tile_loadd(5, a + TILE, 64); }
    if (columns > 1 && b != NULL) { _tile_stream_loadd(7, b + TILE, 64); }
    MULTIPLY(kind, 0, 4, 6);
    if (columns > 1) { MULTIPLY(kind, 1, 4, 7); }
    if (rows > 1) { MULTIPLY(kind, 2, 5, 6); }
    if (rows > 1 && columns > 1) { MULTIPLY(kind, 3, 5, 7); }
}

/* tile t of sums to `to` */
#define STORE_SUM(t, to) _tile_stored(t, (to)->at + (t) / 2 * (to)->down + (t) % 2 * (to)->right, (to)->ld * (int64_t)sizeof *(to)->at)

/* tile t of sums: that of the quad before goes, that of this one begins */
#define NEXT_SUM(t, q)                                                  \
    if ((q)->held.at != NULL) { STORE_SUM(t, &(q)->held); }             \
    if ((q)->before != NULL) {                                          \
        _tile_stream_loadd(t, (q)->before + (t) * (QUAD / 4), 64);      \
    } else {                                                            \
        _tile_zero(t);                                                  \
    }

/* The first step. Four tiles stored one after another fill the processor's store buffer, and the tile unit waits: so those of the
 * quad before are stored one by one between the first products of this one. */
static inline __attribute__((always_inline)) void begin(quad *q, const uint16_t *a, const uint16_t *b, const int kind, const int rows,
                                                        const int columns) {
    _tile_loadd(4, a, 64);
    _tile_stream_loadd(6, b, 64);
    NEXT_SUM(0, q);
    MULTIPLY(kind, 0, 4, 6);
    if (columns > 1) {
        _tile_stream_loadd(7, b + TILE, 64);
        NEXT_SUM(1, q);
        MULTIPLY(kind, 1, 4, 7);
    }
    if (rows > 1) {
        _tile_loadd(5, a + TILE, 64);
        NEXT_SUM(2, q);
        MULTIPLY(kind, 2, 5, 6);
        if (columns > 1) {
            NEXT_SUM(3, q);
            MULTIPLY(kind, 3, 5, 7);
        }
    }
    MEMORY_BARRIER(); /* put_four reads what was held */
    q->held.at = NULL;
}

/* the same with the tiles of a that are there, and another plane of b */
static inline __attribute__((always_inline)) void multiply_same_rows(const uint16_t *b, const int rows, const int columns) {
    _tile_stream_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (rows > 1) { _tile_dpbf16ps(2, 5, 6); }
    if (columns > 1) {
        _tile_stream_loadd(7, b + TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (rows > 1) { _tile_dpbf16ps(3, 5, 7); }
    }
}

static inline __attribute__((always_inline)) void zero_tiles(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

static inline __attribute__((always_inline)) void store_sums(const tile_target *to, const int rows, const int columns) {
    STORE_SUM(0, to);
    if (columns > 1) { STORE_SUM(1, to); }
    if (rows > 1) { STORE_SUM(2, to); }
    if (rows > 1 && columns > 1) { STORE_SUM(3, to); }
}

/* what the tiles hold goes to its place */
static void release(quad *q) {
    if (q->held.at == NULL) { return; }
    MEMORY_BARRIER();
    store_sums(&q->held, 2, 2);
    MEMORY_BARRIER();
    q->held.at = NULL;
}

/* the end of a quad: 2 x 2 tiles stay where they are, see begin */
static inline __attribute__((always_inline)) void end(quad *q, const int rows, const int columns) {
    while (q->left > 0) { put_four(q); }
    if (rows > 1 && columns > 1) {
        q->held = q->after;
    } else {
        store_sums(&q->after, rows, columns);
    }
}

/* sums += the products of two planes */
static inline __attribute__((always_inline)) void multiply_planes(quad *q, const int rows, const int columns) {
    const uint16_t *a = q->a, *b = q->b;
    for (int64_t s = 0; s < q->steps; s += SIDE, a += 2 * TILE, b += 2 * TILE) { /* as few tile loads as there can be */
        if (s == 0) {
            begin(q, a + q->plane, b, PRODUCT, rows, columns);
        } else {
            multiply_step(a + q->plane, b, PRODUCT, rows, columns);
        }
        multiply_step(a, NULL, PRODUCT, rows, columns);
        multiply_same_rows(b + q->plane, rows, columns);
        do_between(q);
    }
    end(q, rows, columns);
}

/* sums += the products of one plane */
static inline __attribute__((always_inline)) void multiply_plane(quad *q, const int kind, const int rows, const int columns) {
    const uint16_t *a = q->a, *b = q->b;
    begin(q, a, b, kind, rows, columns);
    do_between(q);
    for (int64_t s = SIDE; s < q->steps; s += SIDE) {
        a += 2 * TILE, b += 2 * TILE;
        multiply_step(a, b, kind, rows, columns);
        do_between(q);
    }
    end(q, rows, columns);
}

/* after = sums times the largest values of their rows and columns, and + before where `add` is set; sums: of the products of limbs 0 0, of
 * 0 1 and 1 0, of 0 2, 1 1 and 2 0, each 256 of the next. What is left out is 2^-23 of the product of the largest values at most. */
static inline __attribute__((always_inline)) void scale_quad(const quad *q, const int32_t *sums, const int add, const int rows,
                                                             const int columns) {
    const float *row_most = (const float *)(const void *)(q->a + LIMBS * q->plane);
    const float *column_most = (const float *)(const void *)(q->b + LIMBS * q->plane);
    const float *before = q->before;
    const vf unit = product_unit();
    const int past_caches = q->past_caches;
    for (int tile = 0; tile < 2 * rows; tile++) {
        if (tile % 2 >= columns) { continue; }
        float *after = q->after.at + tile / 2 * q->after.down + tile % 2 * q->after.right;
        vf columns_most = v_load(column_most + tile % 2 * 16);
        for (int64_t r = 0, ld = q->after.ld, at = tile * (QUAD / 4); r < 16; r++, at += 16, after += ld) {
            vf sum = join_limbs(vi_load(sums + at), vi_load(sums + QUAD + at), vi_load(sums + 2 * QUAD + at));
            sum = v_mul(v_mul(sum, unit), v_mul(columns_most, v_set1(row_most[tile / 2 * 16 + r])));
            store_line(after, add ? v_add(v_load(before + at), sum) : sum, past_caches);
        }
    }
}

/* products of limbs whose places add up to `group`, to integers of 2 x 2 tiles */
static inline __attribute__((always_inline)) void multiply_group(quad *q, int32_t *sums, const int group, const int rows,
                                                                 const int columns) {
    const uint16_t *a = q->a, *b = q->b;
    const int64_t plane = q->plane;
    zero_tiles();
    for (int64_t s = 0; s < q->steps; s += SIDE, a += 2 * TILE, b += 2 * TILE) {
        multiply_step(a, b + group * plane, PRODUCT_OF_LIMBS, rows, columns);
        if (group > 0) { multiply_step(a + plane, b + (group - 1) * plane, PRODUCT_OF_LIMBS, rows, columns); }
        if (group > 1) { multiply_step(a + 2 * plane, b, PRODUCT_OF_LIMBS, rows, columns); }
        do_between(q);
    }
    store_sums(&(tile_target){(float *)(void *)sums, 16, QUAD / 2, QUAD / 4}, rows, columns);
}

static inline __attribute__((always_inline)) void multiply_limbs(quad *q, const int rows, const int columns) {
    alignas(64) int32_t sums[LIMBS * QUAD];
    multiply_group(q, sums, 0, rows, columns);
    multiply_group(q, sums + QUAD, 1, rows, columns);
    multiply_group(q, sums + 2 * QUAD, 2, rows, columns);
    MEMORY_BARRIER();
    if (q->before != NULL) {
        scale_quad(q, sums, 1, rows, columns);
    } else {
        scale_quad(q, sums, 0, rows, columns);
    }
}

static inline __attribute__((always_inline)) void multiply_tiles(quad *q, const int rows, const int columns) {
    if (q->planes == LIMBS) {
        multiply_limbs(q, rows, columns);
        return;
    }
    if (q->planes > 1) {
        multiply_planes(q, rows, columns);
    } else if (q->transposed) {
        multiply_plane(q, TRANSPOSED, rows, columns);
    } else {
        multiply_plane(q, PRODUCT, rows, columns);
    }
}

static void multiply_quad(quad *q, int rows, int columns) {
    if (rows < 2 || columns < 2) { release(q); }
    MEMORY_BARRIER();
    if (rows > 1 && columns > 1) {
        multiply_tiles(q, 2, 2);
    } else if (rows > 1) {
        multiply_tiles(q, 2, 1);
    } else if (columns > 1) {
        multiply_tiles(q, 1, 2);
    } else {
        multiply_tiles(q, 1, 1);
    }
    MEMORY_BARRIER();
}

#endif
