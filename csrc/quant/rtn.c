/* rtn.c: round to nearest on an n-bit grid, group by group. */
#include "quantizers.h"

#include "../core/bits.h"
#include "grid.h"

#include <string.h> /* memset */

enum { ROWS_PER_TASK = 4, CODES_PER_STEP = 256 };

typedef struct {
    uint32_t *codes;
    float *scales;
    uint8_t *zeros;
    const float *w;
    int64_t n, k;
    int bits;
    int64_t group;
} rtn_context;

/* columns first .. end of one group; encoded first and packed then, so that the compiler can use vectors */
static void encode_group(uint32_t *row, const float *x, const ql_grid *grid, int64_t first, int64_t end, int bits) {
    uint32_t codes[CODES_PER_STEP];
    for (int64_t j = first; j < end; j += CODES_PER_STEP) {
        int64_t count = end - j < CODES_PER_STEP ? end - j : CODES_PER_STEP;
        for (int64_t e = 0; e < count; e++) { codes[e] = ql_grid_encode(grid, x[j + e]); }
        for (int64_t e = 0; e < count; e++) { ql_code_put(row, j + e, bits, codes[e]); }
    }
}

static void quantize_row(const rtn_context *c, int64_t i) {
    int64_t words = ql_words_per_row(c->k, c->bits), groups = (c->k + c->group - 1) / c->group;
    uint32_t *row = c->codes + i * words;
    memset(row, 0, (size_t)words * sizeof *row);
    for (int64_t g = 0; g < groups; g++) {
        int64_t first = g * c->group, end = first + c->group < c->k ? first + c->group : c->k;
        const float *x = c->w + i * c->k;
        ql_grid grid = ql_grid_fit(x + first, end - first, c->bits, c->zeros == NULL);
        encode_group(row, x, &grid, first, end, c->bits);
        c->scales[i * groups + g] = grid.scale;
        if (c->zeros != NULL) { c->zeros[i * groups + g] = (uint8_t)grid.zero; }
    }
}

static void quantize_rows(void *context, int64_t task) {
    const rtn_context *c = context;
    int64_t end = (task + 1) * ROWS_PER_TASK < c->n ? (task + 1) * ROWS_PER_TASK : c->n;
    for (int64_t i = task * ROWS_PER_TASK; i < end; i++) { quantize_row(c, i); }
}

void ql_quantize_rtn(uint32_t *codes, float *scales, uint8_t *zeros, const float *w, int64_t n, int64_t k, int bits,
                     int64_t group) {
    rtn_context context = {codes, scales, zeros, w, n, k, bits, group};
    ql_parallel_for((n + ROWS_PER_TASK - 1) / ROWS_PER_TASK, quantize_rows, &context);
}
