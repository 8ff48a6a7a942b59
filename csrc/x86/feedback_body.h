/* feedback_body.h: z (rows, width) += e (rows, depth) a (depth, width), float64.
 *
 * depth is walked in steps of DEPTH, so that the slice of a stays in the second-level cache while every tile of ROWS x
 * (2 vectors) of z, held in registers, meets it. Every element is z = fma(e[r, i], a[i, j], z) for i in order, whatever
 * the tile. The file that includes this one defines vd, VD_LANES, vd_load, vd_store, vd_set1 and vd_fma. */
#ifndef QL_FEEDBACK_BODY_H
#define QL_FEEDBACK_BODY_H

#include "overlay.h"

#include <math.h> /* fma */

enum { DEPTH = 128, ROWS = VD_LANES == 8 ? 14 : 4, COLUMNS = 2 * VD_LANES };

typedef struct {
    const double *e; /* (rows, depth) */
    const double *a; /* (depth, width) */
    int64_t lde, lda, depth;
} feedback_slice;

/* `rows` is a constant at each call: the sums stay in registers */
static inline __attribute__((always_inline)) void feedback_tile(double *z, int64_t ldz, const feedback_slice *s, const int rows) {
    vd sum[2 * ROWS];
    for (int r = 0; r < rows; r++) {
        sum[2 * r] = vd_load(z + r * ldz);
        sum[2 * r + 1] = vd_load(z + r * ldz + VD_LANES);
    }
    for (int64_t i = 0; i < s->depth; i++) {
        vd left = vd_load(s->a + i * s->lda), right = vd_load(s->a + i * s->lda + VD_LANES);
        for (int r = 0; r < rows; r++) {
            vd factor = vd_set1(s->e[r * s->lde + i]);
            sum[2 * r] = vd_fma(factor, left, sum[2 * r]);
            sum[2 * r + 1] = vd_fma(factor, right, sum[2 * r + 1]);
        }
    }
    for (int r = 0; r < rows; r++) {
        vd_store(z + r * ldz, sum[2 * r]);
        vd_store(z + r * ldz + VD_LANES, sum[2 * r + 1]);
    }
}

/* columns that fill no tile */
static void feedback_rest(double *z, int64_t ldz, const feedback_slice *s, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t i = 0; i < s->depth; i++) {
            for (int64_t j = 0; j < width; j++) {
                z[r * ldz + j] = fma(s->e[r * s->lde + i], s->a[i * s->lda + j], z[r * ldz + j]);
            }
        }
    }
}

static void feedback(double *z, const double *e, const double *a, int64_t rows, int64_t depth, int64_t width, int64_t ldz,
                     int64_t lde, int64_t lda) {
    int64_t whole = width / COLUMNS * COLUMNS;
    for (int64_t first = 0; first < depth; first += DEPTH) {
        int64_t count = first + DEPTH < depth ? DEPTH : depth - first;
        for (int64_t j = 0; j < whole; j += COLUMNS) {
            for (int64_t r = 0; r < rows;) {
                feedback_slice s = {e + r * lde + first, a + first * lda + j, lde, lda, count};
                double *tile = z + r * ldz + j;
                if (r + ROWS <= rows) {
                    feedback_tile(tile, ldz, &s, ROWS);
                    r += ROWS;
                } else {
                    feedback_tile(tile, ldz, &s, 1);
                    r++;
                }
            }
        }
        feedback_slice s = {e + first, a + first * lda + whole, lde, lda, count};
        feedback_rest(z + whole, ldz, &s, rows, width - whole);
    }
}

#endif
