/* bf16_amx.h: float32 to bf16 tiles: rounding, what it leaves over, pairs of steps, transposition. */
#ifndef QL_BF16_AMX_H
#define QL_BF16_AMX_H

#include "config_amx.h"
#include "pairs_avx512_bf16.h" /* to_bf16 */

enum {
    SIDE = 32,         /* rows, columns and steps of a 2 x 2 of tiles */
    TILE = 512,        /* bf16 elements of a tile */
    QUAD = SIDE * SIDE /* sums of 2 x 2 tiles */
};

/* what rounding to bf16 left over */
static inline __m512 left_over(__m512 x, __m256i rounded) {
    return _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16)));
}
static inline __m512i left_over_bf16(__m512 low, __m512 high, __m512i rounded) {
    return to_bf16(left_over(low, _mm512_castsi512_si256(rounded)), left_over(high, _mm512_extracti64x4_epi64(rounded, 1)));
}

/* 16 words of each of two steps to one row of a tile of b */
static inline __m512i interleave(__m256i first, __m256i second) {
    return interleave_halves(_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1));
}

/* rows of 16 dwords, `ld` bf16 elements apart, to columns: the tile of b whose columns are these rows, and back */
static inline void transpose_tile(uint16_t *tile, const uint16_t *rows, int64_t ld) {
    for (int q = 0; q < VL; q += 4) {
        vf columns[4];
        v_transpose4(columns, (const float *)(const void *)(rows + 2 * q), ld / 2);
        for (int r = 0; r < 4; r++) { v_store((float *)(void *)(tile + (q + r) * SIDE), columns[r]); }
    }
}

#endif
