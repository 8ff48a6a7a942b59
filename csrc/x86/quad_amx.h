/* quad_amx.h: 2 x 2 tiles of sums: the products of 32 rows of a and 32 columns of b over a block of k (tile_amx.h). */
#ifndef QL_QUAD_AMX_H
#define QL_QUAD_AMX_H

#include "../core/sizes.h"
#include "bf16_amx.h"
#include "limbs_amx.h"

#include <stdalign.h> /* alignas */

enum {
    FETCH = 4,              /* cache lines, or pairs of them, to ask for beside 32 steps */
    FOURS = 2 * SIDE / 4,   /* of cache lines in 2 x 2 tiles */
    LAST_STEPS = 2 * SIDE   /* see multiply_plane */
};

typedef struct {
    const uint16_t *a, *b;
    int64_t steps, plane; /* elements between the planes of an operand */
    int planes;           /* LIMBS: limbs */
    int transposed;       /* tiles of sums are those of the transpose: with one plane */
    const float *before;  /* 2 x 2 tiles to add to, or NULL */
    float *after;         /* where the result goes, its tiles `down` and `right` elements apart, rows `ld` */
    int64_t ld, down, right;
    const char *fetch, *fetch_end; /* memory that is needed soon */
    const char *line;              /* and what is added to or written next: pairs of lines, `line_ld` bytes apart, `lines` of them */
    int64_t line_ld, lines;
    const char *codes; /* and what the next block of b is made of: `code_bytes` of each of `code_rows` rows, `codes_ld` bytes apart, */
    int64_t codes_ld, code_bytes, code_rows, code_at, code_pace; /* from `code_at` on, so many lines at a time */
    /* The result of the quad before, whole tiles of the transpose, which goes to rows `out_ld` apart while this one is computed:
     * four cache lines at a time, `left` times more. */
    const float *turned;
    float *out;
    int64_t out_ld, left;
    int past_caches; /* whole cache lines of the result go to memory at once */
} quad;

/* asks for a few lines of memory */
static inline __attribute__((always_inline)) void fetch(quad *q) {
    if (q->fetch < q->fetch_end) {
        for (int i = 0; i < FETCH; i++) { _mm_prefetch(q->fetch + 64 * i, _MM_HINT_T1); }
        q->fetch += 64 * FETCH;
    }
    for (int i = 0; i < FETCH && q->lines > 0; i++, q->lines--, q->line += q->line_ld) {
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
 * NULL: past the first-level cache, where those of a stay for all columns */
static inline __attribute__((always_inline)) void multiply_step(const uint16_t *a, const uint16_t *b, const int kind, const int rows,
                                                                const int columns) {
    if (b != NULL) { _tile_stream_loadd(6, b, 64); }
    _tile_loadd(4, a, 64);
    MULTIPLY(kind, 0, 4, 6);
    if (columns > 1) {
        if (b != NULL) { _tile_stream_loadd(7, b + TILE, 64); }
        MULTIPLY(kind, 1, 4, 7);
    }
    if (rows > 1) {
        _tile_loadd(5, a + TILE, 64);
        MULTIPLY(kind, 2, 5, 6);
        if (columns > 1) { MULTIPLY(kind, 3, 5, 7); }
    }
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

/* the tiles of sums of one column of tiles to `out`, where they are `down` elements apart and their rows `ld` */
static inline __attribute__((always_inline)) void store_column(void *out, int64_t ld, int64_t down, const int rows, const int column) {
    float *to = out; /* or integers: as wide */
    int64_t stride = ld * (int64_t)sizeof *to;
    if (column == 0) { _tile_stored(0, to, stride); } else { _tile_stored(1, to, stride); }
    if (rows > 1) {
        if (column == 0) { _tile_stored(2, to + down, stride); } else { _tile_stored(3, to + down, stride); }
    }
}

/* sums += the products of two planes */
static inline __attribute__((always_inline)) void multiply_planes(quad *q, const int rows, const int columns) {
    const uint16_t *a = q->a, *b = q->b;
    for (int64_t s = 0; s < q->steps; s += SIDE, a += 2 * TILE, b += 2 * TILE) { /* as few tile loads as there can be */
        multiply_step(a + q->plane, b, PRODUCT, rows, columns);
        multiply_step(a, NULL, PRODUCT, rows, columns);
        multiply_same_rows(b + q->plane, rows, columns);
        do_between(q);
    }
    store_column(q->after, q->ld, q->down, rows, 0);
    if (columns > 1) { store_column(q->after + q->right, q->ld, q->down, rows, 1); }
}

/* sums += a b of one tile of columns over steps [from, steps) */
static inline __attribute__((always_inline)) void multiply_column(const quad *q, int64_t from, const int kind, const int rows,
                                                                  const int column) {
    const uint16_t *a = q->a + from * SIDE, *b = q->b + from * SIDE + column * TILE;
    for (int64_t s = from; s < q->steps; s += SIDE, a += 2 * TILE, b += 2 * TILE) {
        _tile_stream_loadd(6, b, 64);
        _tile_loadd(4, a, 64);
        if (column == 0) { MULTIPLY(kind, 0, 4, 6) } else { MULTIPLY(kind, 1, 4, 6) }
        if (rows > 1) {
            _tile_loadd(5, a + TILE, 64);
            if (column == 0) { MULTIPLY(kind, 2, 5, 6) } else { MULTIPLY(kind, 3, 5, 6) }
        }
    }
}

/* Sums += the products of one plane, and to where the result goes. Four tiles stored one after another fill the processor's
 * store buffer, and the tile unit waits: so the last steps are done for the first columns, whose tiles are stored while those of
 * the others are multiplied. */
static inline __attribute__((always_inline)) void multiply_plane(quad *q, const int kind, const int rows, const int columns) {
    const int64_t steps = round_up(q->steps, SIDE), last = columns > 1 && steps > LAST_STEPS ? steps - LAST_STEPS : 0;
    const uint16_t *a = q->a, *b = q->b;
    for (int64_t s = 0; s < last; s += SIDE, a += 2 * TILE, b += 2 * TILE) {
        multiply_step(a, b, kind, rows, columns);
        do_between(q);
    }
    while (q->left > 0) { put_four(q); }
    multiply_column(q, last, kind, rows, 0);
    store_column(q->after, q->ld, q->down, rows, 0);
    if (columns > 1) {
        multiply_column(q, last, kind, rows, 1);
        store_column(q->after + q->right, q->ld, q->down, rows, 1);
    }
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
        float *after = q->after + tile / 2 * q->down + tile % 2 * q->right;
        vf columns_most = v_load(column_most + tile % 2 * 16);
        for (int64_t r = 0, ld = q->ld, at = tile * (QUAD / 4); r < 16; r++, at += 16, after += ld) {
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
    store_column(sums, 16, QUAD / 2, rows, 0);
    if (columns > 1) { store_column(sums + QUAD / 4, 16, QUAD / 2, rows, 1); }
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
    if (q->before == NULL) {
        zero_tiles();
    } else {
        _tile_loadd(0, q->before, 64);
        if (columns > 1) { _tile_loadd(1, q->before + QUAD / 4, 64); }
        if (rows > 1) { _tile_loadd(2, q->before + QUAD / 2, 64); }
        if (rows > 1 && columns > 1) { _tile_loadd(3, q->before + 3 * QUAD / 4, 64); }
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
