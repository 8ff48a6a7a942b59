/* linear_amx.c: y = x W^T and dx = dy W on tiles: W is decoded to bf16 a block at a time, x is rounded to bf16. Where
 * ql_precise() is set both are split into a high and a low part (bf16 weights are exact as they are). */
#include "../formats/packed.h" /* QL_GEMV_ROWS */
#include "overlay.h"

#include "decode_amx.h"

/* elements [s, s + VL) of a row, those from `end` on 0; columns: where each of them is, or NULL */
static inline vf load_steps(const float *row, const int32_t *columns, int64_t s, int64_t end) {
    vm lanes = vm_first(end < s ? 0 : at_most(end - s, VL));
    if (columns == NULL) { return _mm512_maskz_loadu_ps(lanes, row + s); }
    return _mm512_mask_i32gather_ps(v_zero(), lanes, _mm512_maskz_loadu_epi32(lanes, columns + s), row, 4);
}

/* rows of x or dy; columns: where step s of a row is, or NULL */
static void pack_rows(uint16_t *panel, const tile_gemm *g, const int32_t *columns, int64_t i, int64_t k0, int64_t k1,
                      int64_t plane) {
    for (int64_t r = 0; r < SIDE; r++) {
        const float *row = (const float *)g->a + (i + r) * g->lda;
        uint16_t *out = panel + r / 16 * TILE + r % 16 * SIDE;
        int64_t s = k0, end = i + r < g->m ? k1 : k0; /* rows beyond the last: zeros */
        for (; columns == NULL && g->a_planes == 1 && s + SIDE <= end; s += SIDE, out += 2 * TILE) {
            _mm512_store_si512(out, to_bf16(v_load(row + s), v_load(row + s + VL)));
        }
        for (; s < k1; s += SIDE, out += 2 * TILE) {
            vf first = load_steps(row, columns, s, end), second = load_steps(row, columns, s + VL, end);
            __m512i rounded = to_bf16(first, second);
            _mm512_store_si512(out, rounded);
            if (g->a_planes > 1) { _mm512_store_si512(out + plane, left_over_bf16(first, second, rounded)); }
        }
    }
}

static void pack_x(uint16_t *panel, const tile_gemm *g, int64_t i, int64_t k0, int64_t k1, int64_t plane) {
    pack_rows(panel, g, ((const decoder *)g->b)->w->perm, i, k0, k1, plane);
}

static void pack_dy(uint16_t *panel, const tile_gemm *g, int64_t i, int64_t k0, int64_t k1, int64_t plane) {
    pack_rows(panel, g, NULL, i, k0, k1, plane);
}

enum { LD_ROWS = SHORT_K + SIDE };

/* b = W^T: 16 rows of W at a time are decoded, then their pairs of steps are transposed */
static void pack_transposed(uint16_t *block, const tile_gemm *g, int64_t k0, int64_t k1, int64_t j0, int64_t j1) {
    const decoder *d = g->b;
    alignas(64) uint16_t rows[2][16 * LD_ROWS];
    int64_t steps = k1 - k0, plane = plane_size(steps);
    for (int64_t j = j0; j < j1; j += 16) {
        int64_t count = at_most(16, j1 - j);
        if (k0 == 0) { fetch_codes(d->w, j + 16, at_most(j + 32, j1), k0, k1); }
        fetch_codes(d->w, j, j + count, k1, at_most(k1 + steps, g->k)); /* the next block */
        if (count < 16) { memset(rows, 0, sizeof rows); }
        decode_rows(rows[0], g->b_planes > 1 ? rows[1] : NULL, LD_ROWS, d, j, count, k0, k1);
        for (int p = 0; p < g->b_planes; p++) {
            uint16_t *out = panel_at(block, (j - j0) / SIDE, g->b_planes, steps) + p * plane + (j - j0) % SIDE / 16 * TILE;
            for (int64_t s = 0; s < steps; s += SIDE, out += 2 * TILE) { transpose_tile(out, rows[p] + s, LD_ROWS); }
        }
    }
}

/* b = W: two rows of W are a pair of steps */
static void pack_pairs(uint16_t *block, const tile_gemm *g, int64_t k0, int64_t k1, int64_t j0, int64_t j1) {
    const decoder *d = g->b;
    alignas(64) uint16_t rows[2][2][MAX_WIDTH]; /* plane, row of the pair */
    int64_t steps = k1 - k0, plane = plane_size(steps);
    for (int64_t s = 0; s < round_up(steps, SIDE); s += 2) {
        for (int r = 0; r < 2; r++) {
            if (s + r < steps) {
                decode_rows(rows[0][r], g->b_planes > 1 ? rows[1][r] : NULL, 0, d, k0 + s + r, 1, j0, j1);
            } else {
                memset(rows[0][r], 0, sizeof rows[0][r]), memset(rows[1][r], 0, sizeof rows[1][r]);
            }
        }
        for (int p = 0; p < g->b_planes; p++) {
            for (int64_t j = 0; j < j1 - j0; j += 16) {
                uint16_t *tile = panel_at(block, j / SIDE, g->b_planes, steps) + p * plane + s / SIDE * 2 * TILE + j % SIDE / 16 * TILE;
                __m256i first = _mm256_load_si256((const __m256i *)(const void *)(rows[p][0] + j));
                __m256i second = _mm256_load_si256((const __m256i *)(const void *)(rows[p][1] + j));
                _mm512_store_si512(tile + s % SIDE / 2 * SIDE, interleave(first, second));
            }
        }
    }
}

static void set_planes(tile_gemm *g, const ql_weight *w) {
    g->a_planes = ql_precise() ? 2 : 1;
    g->b_planes = ql_precise() && w->format != QL_BF16 ? 2 : 1;
}

void ql_linear_forward_amx(float *y, const float *x, const ql_weight *w, int64_t m, int accumulate) {
    if (m <= QL_GEMV_ROWS) { /* W is read once: what is as exact as float32 costs no more */
        if (!ql_gemv_forward_amx(y, x, w, m, accumulate)) { ql_linear_forward_avx512(y, x, w, m, accumulate); }
        return;
    }
    tile_gemm g = {.c = y, .ldc = w->n, .accumulate = accumulate, .a = x, .lda = w->k, .pack_a = pack_x,
                   .pack_b = pack_transposed, .m = m, .n = w->n, .k = w->k};
    set_planes(&g, w);
    decoder d = decoder_of(w, g.b_planes);
    g.b = &d;
    if (!tile_gemm_run(&g)) { ql_linear_forward_avx512(y, x, w, m, accumulate); }
}

void ql_linear_backward_input_amx(float *dx, const float *dy, const ql_weight *w, int64_t m, int accumulate) {
    tile_gemm g = {.c = dx, .ldc = w->k, .c_columns = w->perm, .accumulate = accumulate, .a = dy, .lda = w->n,
                   .pack_a = pack_dy, .pack_b = pack_pairs, .m = m, .n = w->k, .k = w->n};
    set_planes(&g, w);
    decoder d = decoder_of(w, g.b_planes);
    g.b = &d;
    if (!tile_gemm_run(&g)) { ql_linear_backward_input_avx512(dx, dy, w, m, accumulate); }
}
