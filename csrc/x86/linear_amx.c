/* linear_amx.c: y = x W^T and dx = dy W on tiles: W is decoded to bf16 a block at a time, x is rounded to bf16. Where W is
 * float32, or ql_precise() is set, both become integers of three limbs: off by 2^-24 of the largest of a row's block of k, which
 * is about 2^-20 of a result (of float32's own sums: 2^-21) where the largest are not a thousand times the rest. ql_precise()
 * with a float32 W: float32 products, on AVX-512. */
#include "../formats/packed.h" /* QL_GEMV_ROWS, QL_GEMV_TILE_ROWS */
#include "overlay.h"

#include "decode_amx.h"
#include <string.h> /* memcpy, memset */

/* elements [s, s + 32) of a row as bf16, those from `end` on 0; columns: where each of them is, or NULL */
static inline __m512i round_steps(const float *row, const int32_t *columns, int64_t s, int64_t end) {
    if (columns == NULL && s + SIDE <= end) { return to_bf16(v_load(row + s), v_load(row + s + VL)); }
    return to_bf16(load_steps(row, columns, s, end), load_steps(row, columns, s + VL, end));
}

/* the pairs of steps [s, s + 32) of 16 rows of x, of which there are `count`, k long */
static void pack_tile(uint16_t *tile, const float *x, int64_t ldx, const int32_t *columns, int64_t count, int64_t s, int64_t k) {
    alignas(64) uint16_t rows[TILE];
    for (int64_t r = 0; r < 16; r++) { /* rows beyond the last: zeros */
        _mm512_store_si512(rows + r * SIDE, round_steps(x + r * ldx, columns, s, r < count ? k : s));
    }
    transpose_tile(tile, rows, SIDE);
}

static void pack_x(uint16_t *panel, const tile_gemm *g, int64_t i, int64_t k0, int64_t k1) {
    const int32_t *columns = ((const decoder *)g->b)->w->perm;
    const int64_t tall = tall_of(g);
    for (int64_t half = 0; half < tall; half++) {
        int64_t row = i + 16 * half;
        for (int64_t s = k0; s < k1; s += SIDE) {
            uint16_t *tile = panel + (s - k0) / SIDE * tall * TILE + half * TILE;
            pack_tile(tile, (const float *)g->a + row * g->lda, g->lda, columns, g->m - row, s, k1);
        }
    }
}

/* rows of dy */
static void pack_dy(uint16_t *panel, const tile_gemm *g, int64_t i, int64_t k0, int64_t k1) {
    for (int64_t r = 0; r < SIDE; r++) {
        uint16_t *out = panel + r / 16 * TILE + r % 16 * SIDE;
        int64_t end = i + r < g->m ? k1 : k0; /* rows beyond the last: zeros */
        for (int64_t s = k0; s < k1; s += SIDE, out += 2 * TILE) {
            _mm512_store_si512(out, round_steps((const float *)g->a + (i + r) * g->lda, NULL, s, end));
        }
    }
}

/* b = W^T: rows of W, as their product with the rows of x is transposed */
static void pack_columns(uint16_t *block, const tile_gemm *g, int64_t k0, int64_t k1, int64_t j0, int64_t j1) {
    const decoder *d = g->b;
    const int few = takes_few_rows(g); /* then the next columns are the task's too */
    int64_t steps = k1 - k0;
    for (int64_t j = j0; j < j1; j += 16) {
        int64_t count = at_most(16, j1 - j);
        if (k0 == 0 || few) { fetch_codes(d->w, j + 16, at_most(j + 32, few ? d->w->n : j1), k0, k1); }
        uint16_t *tiles = panel_at(block, g, j - j0, steps) + (j - j0) % SIDE / 16 * TILE;
        decode_rows(tiles, SIDE, 2 * TILE, d, j, count, k0, k1);
        for (int64_t r = count; r < 16; r++) { /* rows beyond the last: zeros */
            for (int64_t s = 0; s < steps; s += SIDE) { _mm512_store_si512(tiles + s / SIDE * 2 * TILE + r * SIDE, vi_set1(0)); }
        }
    }
}

/* b = W: two rows of W are a pair of steps */
static void pack_pairs(uint16_t *block, const tile_gemm *g, int64_t k0, int64_t k1, int64_t j0, int64_t j1) {
    const decoder *d = g->b;
    alignas(64) uint16_t rows[2][MAX_WIDTH]; /* of the pair */
    int64_t steps = k1 - k0;
    for (int64_t s = 0; s < round_up(steps, SIDE); s += 2) {
        for (int r = 0; r < 2; r++) {
            if (s + r < steps) {
                decode_rows(rows[r], 0, SIDE, d, k0 + s + r, 1, j0, j1);
            } else {
                memset(rows[r], 0, sizeof rows[r]);
            }
        }
        for (int64_t j = 0; j < j1 - j0; j += 16) {
            uint16_t *tile = panel_at(block, g, j, steps) + s / SIDE * 2 * TILE + j % SIDE / 16 * TILE;
            __m256i first = _mm256_load_si256((const __m256i *)(const void *)(rows[0] + j));
            __m256i second = _mm256_load_si256((const __m256i *)(const void *)(rows[1] + j));
            _mm512_store_si512(tile + s % SIDE / 2 * SIDE, interleave(first, second));
        }
    }
}

/* ---- limbs --------------------------------------------------------------------------------------------------------- */

enum { LIMB_VALUES = 2 * SHORT_LIMBS }; /* of a row in a block */

/* Values [j, end) of a row as limbs: each 64 to a line of a tile (store_limbs), the lines `step` elements apart. Zeros follow up to a
 * multiple of 64. Returns the largest of them. */
static float split_row(uint16_t *out, int64_t step, int64_t plane, const float *row, const int32_t *columns, int64_t j, int64_t end) {
    vi largest = vi_set1(0);
    for (int64_t c = j; c < end; c += VL) { largest = larger_bits(largest, load_steps(row, columns, c, end)); }
    limb_scale scale = limb_scale_of(_mm512_reduce_max_epi32(largest));
    vf up = v_set1(scale.up), inverse = v_set1(scale.inverse);
    for (int64_t c = j; c < end; c += 4 * VL, out += step) {
        vi limbs[4];
        for (int q = 0; q < 4; q++) { limbs[q] = to_limbs(to_integers(load_steps(row, columns, c + q * VL, end), up, inverse)); }
        store_limbs(out, plane, limbs);
    }
    return scale.most;
}

/* where a panel of limbs keeps the largest value of each row or column */
static inline float *most_of(uint16_t *panel, int64_t plane) { return (float *)(void *)(panel + LIMBS * plane); }

/* rows of x or dy, which have `count` values */
static void split_rows(uint16_t *panel, const tile_gemm *g, const int32_t *columns, int64_t i, int64_t k0, int64_t k1, int64_t count) {
    int64_t plane = plane_size(k1 - k0);
    float *most = most_of(panel, plane);
    for (int64_t r = 0; r < SIDE; r++) {
        int64_t end = i + r < g->m ? at_most(2 * k1, count) : 2 * k0;
        uint16_t *out = panel + r / 16 * TILE + r % 16 * SIDE;
        if (end > 2 * k0) {
            most[r] = split_row(out, 2 * TILE, plane, (const float *)g->a + (i + r) * g->lda, columns, 2 * k0, end);
            continue;
        }
        most[r] = 0.0f; /* rows beyond the last */
        for (int64_t s = k0; s < k1; s += SIDE, out += 2 * TILE) {
            for (int l = 0; l < LIMBS; l++) { _mm512_store_si512(out + l * plane, _mm512_setzero_si512()); }
        }
    }
}

static void split_x(uint16_t *panel, const tile_gemm *g, int64_t i, int64_t k0, int64_t k1) {
    const ql_weight *w = ((const decoder *)g->b)->w;
    split_rows(panel, g, w->perm, i, k0, k1, w->k);
}

static void split_dy(uint16_t *panel, const tile_gemm *g, int64_t i, int64_t k0, int64_t k1) {
    split_rows(panel, g, NULL, i, k0, k1, ((const decoder *)g->b)->w->n);
}

/* b = W^T: 16 rows of W at a time are split, then their fours of values are transposed */
static void split_transposed(uint16_t *block, const tile_gemm *g, int64_t k0, int64_t k1, int64_t j0, int64_t j1) {
    enum { LD = SHORT_LIMBS + SIDE };
    const ql_weight *w = ((const decoder *)g->b)->w;
    alignas(64) uint16_t rows[LIMBS][16 * LD];
    alignas(64) float values[LIMB_VALUES];
    int64_t steps = k1 - k0, plane = plane_size(steps), first = 2 * k0, end = at_most(2 * k1, w->k);
    for (int64_t j = j0; j < j1; j += 16) {
        uint16_t *panel = panel_at(block, g, j - j0, steps);
        float *most = most_of(panel, plane) + (j - j0) % SIDE;
        if (j1 - j < 16) { memset(rows, 0, sizeof rows), memset(most, 0, 16 * sizeof *most); }
        for (int64_t r = 0; r < at_most(16, j1 - j); r++) {
            const float *row = values;
            if (w->format == QL_F32) {
                row = (const float *)w->codes + (j + r) * w->k + first;
            } else {
                ql_decode_forward_avx512(values, LIMB_VALUES, w, j + r, j + r + 1, first, end);
            }
            most[r] = split_row(rows[0] + r * LD, SIDE, 16 * LD, row, NULL, 0, end - first);
        }
        for (int l = 0; l < LIMBS; l++) {
            uint16_t *out = panel + l * plane + (j - j0) % SIDE / 16 * TILE;
            for (int64_t s = 0; s < steps; s += SIDE, out += 2 * TILE) { transpose_tile(out, rows[l] + s, LD); }
        }
    }
}

/* a block of W, (count, 16): four rows are a line of a tile */
static void split_columns(uint16_t *tiles, float *most, int64_t plane, const float *values, int64_t count, int64_t steps) {
    vi largest = vi_set1(0);
    for (int64_t s = 0; s < count; s++) { largest = larger_bits(largest, v_load(values + s * VL)); }
    alignas(64) int32_t bits[VL];
    alignas(64) float up[VL], inverse[VL];
    vi_store(bits, largest);
    for (int c = 0; c < VL; c++) {
        limb_scale scale = limb_scale_of(bits[c]);
        most[c] = scale.most, up[c] = scale.up, inverse[c] = scale.inverse;
    }
    for (int64_t s = 0; s < 2 * steps; s += 4) { /* the columns of dy are in the order of store_limbs */
        vi limbs[4], lines[LIMBS];
        for (int r = 0; r < 4; r++) {
            vf row = s + r < count ? v_load(values + (s + r) * VL) : v_zero();
            limbs[r] = to_limbs(to_integers(row, v_load(up), v_load(inverse)));
        }
        limbs_of_four(lines, limbs);
        uint16_t *out = tiles + s / (2 * SIDE) * 2 * TILE + place_of_four(s % (2 * SIDE) / 4) * SIDE;
        for (int l = 0; l < LIMBS; l++) { _mm512_store_si512(out + l * plane, lines[l]); }
    }
}

/* b = W */
static void split_fours(uint16_t *block, const tile_gemm *g, int64_t k0, int64_t k1, int64_t j0, int64_t j1) {
    const ql_weight *w = ((const decoder *)g->b)->w;
    alignas(64) float values[LIMB_VALUES * 16];
    int64_t steps = k1 - k0, plane = plane_size(steps), first = 2 * k0, end = at_most(2 * k1, w->n);
    for (int64_t j = j0; j < j1; j += 16) {
        uint16_t *panel = panel_at(block, g, j - j0, steps);
        if (j1 - j < 16) { memset(values, 0, sizeof values); }
        ql_decode_forward_avx512(values, 16, w, first, end, j, at_most(j + 16, j1));
        split_columns(panel + (j - j0) % SIDE / 16 * TILE, most_of(panel, plane) + (j - j0) % SIDE, plane, values, end - first,
                      round_up(steps, SIDE));
    }
}

/* ---- the products ---------------------------------------------------------------------------------------------------- */

enum { NARROW = 64 };

static int takes_limbs(const ql_weight *w) { return w->format == QL_F32 || ql_precise(); }

/* float32 products: of float32 matrices where they are asked for, and of those with a short side, adapters', which would fill
 * tiles with zeros */
static int takes_floats(const ql_weight *w) {
    return w->format == QL_F32 && (ql_precise() || w->n < NARROW || w->k < NARROW);
}

/* Whether a store should leave out the caches: they would read each line of c first, and find other memory to let go. Only where c is as wide
 * as a vocabulary: what a layer leaves is read from the caches by the next op. */
static int goes_past_caches(const tile_gemm *g) {
    int64_t line = VL * (int64_t)sizeof *g->c;
    int in_lines = (uintptr_t)g->c % (uintptr_t)line == 0 && g->ldc % VL == 0 && g->c_columns == NULL;
    return in_lines && !g->accumulate && g->n >= LARGE_ROW && g->m * g->n * (int64_t)sizeof *g->c >= LARGE_RESULT;
}

/* y = x W^T on tiles, of `count` products that are alike; 0: nothing done, they have no such kernel, or there is no memory */
static int tile_forward(const ql_linear_product *products, int64_t count, const float *x, int64_t m, int accumulate) {
    decoder d[QL_PRODUCTS];
    tile_gemm g[QL_PRODUCTS];
    for (int64_t i = 0; i < count; i++) {
        const ql_weight *w = products[i].w;
        if (takes_floats(w)) { return 0; }
        d[i] = decoder_of(w);
        g[i] = (tile_gemm){.c = products[i].y, .ldc = w->n, .accumulate = accumulate, .a = x, .lda = w->k, .b = &d[i], .pack_a = pack_x,
                           .pack_b = pack_columns, .codes = w->codes, .codes_ld = row_bytes_of(w), .code_bits = bits_of(w),
                           .planes = 1, .in_place = w->format == QL_BF16 && w->k % SIDE == 0, .transposed = 1, .m = m, .n = w->n, .k = w->k};
        if (takes_limbs(w)) {
            g[i].planes = LIMBS, g[i].k = pieces(w->k, 2), g[i].pack_a = split_x, g[i].pack_b = split_transposed;
            g[i].transposed = 0, g[i].codes = NULL;
        }
        g[i].past_caches = goes_past_caches(&g[i]);
    }
    return tile_gemm_run(g, count);
}

/* rows of x, at most, that AVX-512 takes where no kernel here does: float32 as limbs is for more rows */
static int64_t vector_rows(const ql_weight *w) { return w->format == QL_F32 ? QL_GEMV_TILE_ROWS : QL_GEMV_ROWS; }

/* whether few rows of x become integers for it (bytes_body.h), where it is packed or needs not be */
static int takes_integers(const ql_weight *w) { return w->format == QL_INT8 || w->format == QL_AFFINE; }

void ql_linear_forward_amx(float *y, const float *x, const ql_weight *w, int64_t m, int accumulate) {
    const ql_linear_product product = {y, w};
    if (ql_gemv_forward_amx(&product, 1, x, m, accumulate)) { return; } /* W is read once: more exact products cost no more */
    if (w->format == QL_F32 && ql_gemv_forward_avx512(&product, 1, x, m, accumulate)) { return; }
    if (m > vector_rows(w) && tile_forward(&product, 1, x, m, accumulate)) { return; }
    ql_linear_forward_avx512(y, x, w, m, accumulate);
}

void ql_linear_many_forward_amx(const ql_linear_product *products, int64_t count, const float *x, int64_t m) {
    const ql_weight *w = products[0].w;
    if (ql_products_alike(products, count)) {
        if (ql_gemv_forward_amx(products, count, x, m, 0)) { return; }
        if (m <= vector_rows(w) && !takes_integers(w) && ql_gemv_forward_avx512(products, count, x, m, 0)) { return; }
        if (m > vector_rows(w) && tile_forward(products, count, x, m, 0)) { return; }
    }
    for (int64_t i = 0; i < count; i++) { ql_linear_forward_amx(products[i].y, x, products[i].w, m, 0); }
}

void ql_linear_backward_input_amx(float *dx, const float *dy, const ql_weight *w, int64_t m, int accumulate) {
    decoder d = decoder_of(w);
    tile_gemm g = {.c = dx, .ldc = w->k, .c_columns = w->perm, .accumulate = accumulate, .a = dy, .lda = w->n, .b = &d,
                   .pack_a = pack_dy, .pack_b = pack_pairs, .planes = 1, .m = m, .n = w->k, .k = w->n};
    if (takes_limbs(w)) {
        g.planes = LIMBS, g.k = pieces(w->n, 2), g.pack_a = split_dy, g.pack_b = split_fours;
    }
    if (takes_floats(w) || !tile_gemm_run(&g, 1)) { ql_linear_backward_input_avx512(dx, dy, w, m, accumulate); }
}
