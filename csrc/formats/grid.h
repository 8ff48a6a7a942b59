/* grid.h: the n-bit grid of one group: a scale that a float16 holds and an integer zero point, as the GPTQ reference's
 * quantizer finds them (Frantar et al. 2022; `find_params` of its code). */
#ifndef QL_FORMAT_GRID_H
#define QL_FORMAT_GRID_H

#include "../core/half.h"

#include <math.h> /* rintf */

typedef struct {
    float scale; /* a positive float16 value */
    float zero;  /* an integer in [0, maxq] */
    float maxq;  /* 2^bits - 1 */
} ql_grid;

/* scale rounded to the nearest float16, kept positive and finite so that a stored file gives the same weights */
static inline float ql_grid_round_scale(float scale) {
    float rounded = ql_f16_to_float(ql_float_to_f16(scale < 65504.0f ? scale : 65504.0f));
    return rounded > 0.0f ? rounded : 5.9604644775390625e-8f; /* the least positive float16 */
}

/* Grid over [low, high] = [min(x, 0), max(x, 0)] of a group x. sym: over [-max|x|, max|x|] with zero 2^(bits-1); a group
 * without negatives keeps its lower end at 0, as the reference has it. A group of zeros: [-1, 1]. */
static inline ql_grid ql_grid_over(float low, float high, int bits, int sym) {
    float maxq = (float)((1 << bits) - 1);
    if (sym) {
        high = -low > high ? -low : high;
        low = low < 0.0f ? -high : low;
    }
    if (low == 0.0f && high == 0.0f) { low = -1.0f, high = 1.0f; }
    ql_grid grid = {.scale = ql_grid_round_scale((high - low) / maxq), .maxq = maxq};
    float zero = sym ? (maxq + 1.0f) / 2.0f : rintf(-low / grid.scale);
    grid.zero = zero < maxq ? zero : maxq;
    return grid;
}

/* clamp, round to even. Adding 1.5 * 2^23 leaves no bits for a fraction; rintf is a call at the x86-64 baseline. */
static inline uint32_t ql_grid_encode(const ql_grid *grid, float x) {
    const float shift = 12582912.0f;
    float code = x / grid->scale, low = -grid->zero, high = grid->maxq - grid->zero;
    code = code < high ? code : high;
    code = code > low ? code : low;
    return (uint32_t)(int32_t)((code + shift) - shift + grid->zero);
}

#endif
