/* quantize_affine.c: round to nearest on an n-bit grid, group by group. */
#include "../core/bits.h"
#include "../core/sizes.h"
#include "../formats/grid.h"
#include "../quantlab.h"

#include <string.h> /* memset */

enum { ROWS_PER_TASK = 4 };

typedef struct {
    uint32_t *codes;
    float *scales;
    uint8_t *zeros;
    const float *w;
    int64_t n, k;
    int bits;
    int64_t group;
} quantize_context;

static ql_grid fit_grid(const float *x, int64_t count, int bits, int sym) {
    float low = 0.0f, high = 0.0f;
    for (int64_t i = 0; i < count; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
    }
    return ql_grid_over(low, high, bits, sym);
}

static void quantize_row(const quantize_context *c, int64_t i) {
    int64_t words = ql_words_per_row(c->k, c->bits), groups = pieces(c->k, c->group);
    const float *x = c->w + i * c->k;
    uint32_t *row = c->codes + i * words;
    memset(row, 0, (size_t)words * sizeof *row);
    for (int64_t g = 0; g < groups; g++) {
        int64_t first = g * c->group, end = at_most(first + c->group, c->k);
        ql_grid grid = fit_grid(x + first, end - first, c->bits, c->zeros == NULL);
        for (int64_t j = first; j < end; j++) { ql_code_put(row, j, c->bits, ql_grid_encode(&grid, x[j])); }
        c->scales[i * groups + g] = grid.scale;
        if (c->zeros != NULL) { c->zeros[i * groups + g] = (uint8_t)grid.zero; }
    }
}

static void quantize_rows(void *context, int64_t task) {
    const quantize_context *c = context;
    int64_t end = at_most((task + 1) * ROWS_PER_TASK, c->n);
    for (int64_t i = task * ROWS_PER_TASK; i < end; i++) { quantize_row(c, i); }
}

void ql_quantize_affine_forward_scalar(uint32_t *codes, float *scales, uint8_t *zeros, const float *w, int64_t n, int64_t k,
                                       int bits, int64_t group) {
    quantize_context context = {codes, scales, zeros, w, n, k, bits, group};
    ql_parallel_for(pieces(n, ROWS_PER_TASK), quantize_rows, &context);
}
