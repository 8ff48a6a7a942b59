/* gram_amx.c: h += a^T b on tiles, high and low parts of both operands: three bf16 products for one of float32. What they
 * leave out is at most 2^-16 of a factor and of either sign, and low low, 2^-19 of the diagonal in the mean: in all an error of
 * about 2^-19 of the result, where float32 sums have 2^-22; GPTQ's damping alone moves the diagonal by 2^-7. */
#include "overlay.h"
#include "tile_amx.h"

#include <stdalign.h> /* alignas */

enum { MAX_TOKENS = 2048 }; /* added at once: bounds the packed operand */

/* rows s and s + 1 of x, 16 columns from column j: one row of a tile of b, high and low part. Missing rows and columns: 0. */
typedef struct {
    __m512i part[2];
} pair;

static inline pair load_pair(const float *x, int64_t ld, int64_t s, int64_t end, int64_t j, int64_t columns) {
    _mm_prefetch((const char *)(x + s * ld + j + 2 * VL), _MM_HINT_T1); /* columns for which this thread comes back */
    _mm_prefetch((const char *)(x + (s + 1) * ld + j + 2 * VL), _MM_HINT_T1);
    vm lanes = vm_first(columns - j < 0 ? 0 : at_most(columns - j, VL));
    vf first = s < end ? _mm512_maskz_loadu_ps(lanes, x + s * ld + j) : v_zero();
    vf second = s + 1 < end ? _mm512_maskz_loadu_ps(lanes, x + (s + 1) * ld + j) : v_zero();
    __m512i high = to_bf16(first, second), low = left_over_bf16(first, second, high);
    return (pair){{interleave(_mm512_castsi512_si256(high), _mm512_extracti64x4_epi64(high, 1)),
                   interleave(_mm512_castsi512_si256(low), _mm512_extracti64x4_epi64(low, 1))}};
}

/* the tiles of b for 16 columns from column j, 32 steps from s: `part` p at tiles + p * plane */
static void pack_tile(uint16_t *tiles, int64_t plane, const float *x, int64_t ld, int64_t s, int64_t end, int64_t j, int64_t columns) {
    for (int64_t r = 0; r < VL; r++) {
        pair p = load_pair(x, ld, s + 2 * r, end, j, columns);
        _mm512_store_si512(tiles + r * SIDE, p.part[0]);
        _mm512_store_si512(tiles + plane + r * SIDE, p.part[1]);
    }
}

static void pack_b(uint16_t *block, const tile_gemm *g, int64_t k0, int64_t k1, int64_t j0, int64_t j1) {
    int64_t steps = k1 - k0, plane = plane_size(steps);
    for (int64_t j = j0; j < j1; j += VL) {
        uint16_t *tiles = panel_at(block, g, j - j0, steps) + (j - j0) % SIDE / VL * TILE;
        for (int64_t s = k0; s < k1; s += SIDE, tiles += 2 * TILE) { pack_tile(tiles, plane, g->b, g->ldb, s, k1, j, j1); }
    }
}

/* a tile of a^T: the pairs of steps of a tile of b, transposed */
static void pack_a(uint16_t *panel, const tile_gemm *g, int64_t i, int64_t k0, int64_t k1) {
    int64_t plane = plane_size(k1 - k0);
    alignas(64) uint16_t pairs[2 * TILE];
    for (int64_t s = k0; s < k1; s += SIDE) {
        for (int half = 0; half < 2; half++) {
            int64_t place = (s - k0) / SIDE * 2 * TILE + half * TILE;
            uint16_t *high = pairs, *low = pairs + TILE;
            if (g->packed_b != NULL) { high = panel_of_b(g, i, k0, k1) + place, low = high + plane; }
            pack_tile(high, low - high, g->a, g->lda, s, k1, i + half * VL, g->m);
            transpose_tile(panel + place, high, SIDE);
            transpose_tile(panel + place + plane, low, SIDE);
        }
    }
}

void ql_gram_forward_amx(float *h, const float *a, const float *b, int64_t t, int64_t ka, int64_t kb, int lower) {
    if (ka != kb && (ka <= QL_FEW || kb <= QL_FEW)) {
        ql_gram_forward_avx512(h, a, b, t, ka, kb, lower);
        return;
    }
    for (int64_t s = 0; s < t; s += MAX_TOKENS) {
        int64_t tokens = at_most(t - s, MAX_TOKENS);
        tile_gemm g = {.c = h, .ldc = kb, .accumulate = 1, .lower = lower, .a = a + s * ka, .lda = ka, .b = b + s * kb, .ldb = kb,
                       .pack_a = pack_a, .pack_b = pack_b, .planes = 2, .m = ka, .n = kb, .k = tokens,
                       .symmetric = a == b && ka == kb};
        if (!tile_gemm_run(&g, 1)) { ql_gram_forward_avx512(h, a + s * ka, b + s * kb, tokens, ka, kb, lower); }
    }
}
