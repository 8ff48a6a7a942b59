/* linear_parts.cuh: what a launch of a product on the packed weight is given.
 *
 * A tile is 16 outputs: two units of 8 rows, which need not be neighbours: for rotary embeddings they are rows i and i + d/2 of a
 * head, for SwiGLU the same rows of gate and up, so that what the epilogue combines lies in one lane. Up to three weights stand
 * side by side in one launch (`part`). */
#ifndef QL_CUDA_LINEAR_PARTS_CUH
#define QL_CUDA_LINEAR_PARTS_CUH

#include "cuda.h"
#include "low_rank.cuh"
#include "norm_ahead.cuh"
#include "units.cuh"

/* what becomes of a sum v0 (upper unit's row) and v1 (lower unit's row) of a token */
enum small_output { SMALL_FLOAT, SMALL_FLOAT_ADD, SMALL_BF16, SMALL_ROPE, SMALL_SWIGLU } /* in the order of ql_output */;

struct small_part {
    const uint8_t *upper, *lower;       /* records of the units of tile 0 */
    const float *factor, *factor_lower; /* what the sums are multiplied by */
    const int32_t *rows;                /* SMALL_ROPE: row of `out` of each token, or NULL */
    void *out;                          /* (rows, n) */
    int tiles;
    int ordered;                        /* SMALL_SWIGLU: whether columns go to their ordered_column */
    int divisor, multiplier;            /* unit of tile t: t / divisor * multiplier + t % divisor, counted from upper and lower */
    int lower_rows;                     /* rows that the lower unit's rows stand below the upper's */
    int n, output;
    ql_low_rank_term term[2];           /* what an adapter adds to the upper unit's rows, and to the lower's */
};

/* What a block asks for as it starts stands at the head: arguments come in lines, and each is waited for. */
struct small_args {
    int tiles;                  /* of all parts */
    int units;                  /* along k */
    int record, parts, zeros;   /* bytes of a record, scales a row and unit, whether there are zero points */
    int m, stages;
    int ordered;                /* whether x has each column at its ordered_column */
    int k, x_line;
    int d;
    int slots, ahead;           /* linear_group.cuh: units of activations that a warpgroup has room for; stages asked for before them */
    int alone;                  /* linear_wide.cuh: items that each block takes alone */
    int adapted;                /* whether a part has a term */
    float eps;
    small_part part[3];
    const bf16 *x;              /* (m, x_line) activations, zeros beyond k; not yet normed where made.halves is not NULL; or NULL and: */
    const float *floats, *gain; /* (k,) of a single token, normed where gain is not NULL */
    const int32_t *perm;        /* (k,) or NULL: stored column j is column perm[j] of floats */
    const float *cos, *sin;     /* SMALL_ROPE: (positions, d / 2) */
    const int32_t *positions;   /* (m,) */
    uint16_t values[16];        /* codes of a table: bfloat16 */
    ql_norm_ahead made, next;   /* of the norm of x; for the norm of what part 0 adds to, (m, n) */
};

struct small_tile {
    const uint8_t *upper, *lower;
    int part, unit;
};

__device__ __forceinline__ small_tile locate_tile(const small_args &a, int t) {
    small_tile tile;
    tile.part = 0;
    while (tile.part < 2 && t >= a.part[tile.part].tiles) { t -= a.part[tile.part++].tiles; }
    const small_part &p = a.part[tile.part];
    tile.unit = p.divisor == 1 ? t * p.multiplier : t / p.divisor * p.multiplier + t % p.divisor;
    int64_t offset = (int64_t)tile.unit * a.units * a.record;
    tile.upper = p.upper + offset, tile.lower = p.lower + offset;
    return tile;
}

#endif
