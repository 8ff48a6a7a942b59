/* quantize_affine_body.h: round to nearest on n-bit grids, bit for bit as ops/quantize_affine.c specifies it.
 *
 * Codes are bytes first: eight of them, of b bits each, are then b whole bytes of the row's stream (core/bits.h). */
#include "../core/bits.h"
#include "../core/sizes.h"
#include "../formats/grid.h"
#include "overlay.h"

#include <string.h> /* memcpy, memmove */

enum { TASK_ELEMENTS = 1 << 16, CODES = 512 };

typedef struct {
    uint32_t *codes;
    float *scales;
    uint8_t *zeros;
    const float *w;
    int64_t n, k;
    int bits;
    int64_t group, rows_per_task;
} quantize_context;

typedef struct {
    uint8_t *next, *end; /* what is left of the row */
    int64_t waiting;     /* codes that are not in the row yet */
    int bits;
    uint8_t codes[CODES + VL];
} code_stream;

/* Eight bytes that hold codes, the least first, with nothing between them. */
static inline uint64_t without_gaps(uint64_t codes, int bits) {
    codes = (codes & 0x00ff00ff00ff00ffu) | (codes & 0xff00ff00ff00ff00u) >> (8 - bits);
    codes = (codes & 0x0000ffff0000ffffu) | (codes & 0xffff0000ffff0000u) >> 2 * (8 - bits);
    return (codes & 0x00000000ffffffffu) | (codes & 0xffffffff00000000u) >> 4 * (8 - bits);
}

/* Puts the waiting codes into the row, eight at a time. Bytes after them become zero, where the row has them. */
static void write_codes(code_stream *s) {
    int64_t i = 0;
    for (; i + 8 <= s->waiting; i += 8, s->next += s->bits) {
        uint64_t codes;
        memcpy(&codes, s->codes + i, sizeof codes);
        codes = without_gaps(codes, s->bits);
        if (s->end - s->next >= (int64_t)sizeof codes) {
            memcpy(s->next, &codes, sizeof codes);
        } else {
            memcpy(s->next, &codes, (size_t)(s->end - s->next));
        }
    }
    s->waiting -= i;
    memmove(s->codes, s->codes + i, (size_t)s->waiting);
}

/* The codes that are no eight, and zeros to the end of the row. */
static void end_row(code_stream *s) {
    write_codes(s);
    uint64_t codes = 0;
    memcpy(&codes, s->codes, (size_t)s->waiting);
    codes = without_gaps(codes, s->bits);
    for (; s->next < s->end; codes >>= 8) { *s->next++ = (uint8_t)codes; }
}

static vf load_part(const float *x, int64_t lanes) { return lanes == VL ? v_load(x) : v_load_tail(x, lanes); }

static ql_grid fit_grid(const float *x, int64_t count, int bits, int sym) {
    vf low = v_zero(), high = v_zero();
    for (int64_t i = 0; i < count; i += VL) {
        vf part = load_part(x + i, at_most(VL, count - i));
        low = v_min(part, low), high = v_max(part, high);
    }
    return ql_grid_over(0.0f - v_hmax(v_sub(v_zero(), low)), v_hmax(high), bits, sym);
}

/* ql_grid_encode of x (count,) */
static void encode(code_stream *s, const float *x, int64_t count, const ql_grid *grid) {
    const vf shift = v_set1(12582912.0f), scale = v_set1(grid->scale), zero = v_set1(grid->zero);
    const vf low = v_set1(-grid->zero), high = v_set1(grid->maxq - grid->zero);
    for (int64_t i = 0; i < count; i += VL) {
        int64_t lanes = at_most(VL, count - i);
        vf code = v_max(v_min(v_div(load_part(x + i, lanes), scale), high), low);
        vi_store_i8(s->codes + s->waiting, vi_from_vf(v_add(v_sub(v_add(code, shift), shift), zero)));
        s->waiting += lanes;
        if (s->waiting > CODES) { write_codes(s); }
    }
}

static void quantize_row(const quantize_context *c, int64_t i) {
    int64_t words = ql_words_per_row(c->k, c->bits), groups = pieces(c->k, c->group);
    const float *x = c->w + i * c->k;
    code_stream s = {.bits = c->bits};
    s.next = (uint8_t *)(c->codes + i * words), s.end = (uint8_t *)(c->codes + (i + 1) * words);
    for (int64_t g = 0; g < groups; g++) {
        int64_t first = g * c->group, count = at_most(c->group, c->k - first);
        ql_grid grid = fit_grid(x + first, count, c->bits, c->zeros == NULL);
        encode(&s, x + first, count, &grid);
        c->scales[i * groups + g] = grid.scale;
        if (c->zeros != NULL) { c->zeros[i * groups + g] = (uint8_t)grid.zero; }
    }
    end_row(&s);
}

static void quantize_rows(void *context, int64_t task) {
    const quantize_context *c = context;
    int64_t begin = task * c->rows_per_task, end = at_most(begin + c->rows_per_task, c->n);
    for (int64_t i = begin; i < end; i++) { quantize_row(c, i); }
}

void V_NAME(quantize_affine_forward)(uint32_t *codes, float *scales, uint8_t *zeros, const float *w, int64_t n, int64_t k,
                                     int bits, int64_t group) {
    int64_t rows = k < TASK_ELEMENTS ? TASK_ELEMENTS / k : 1;
    quantize_context c = {codes, scales, zeros, w, n, k, bits, group, rows};
    ql_parallel_for(pieces(n, rows), quantize_rows, &c);
}
