/* gptq_body.h: the column loop of GPTQ on a tile of QL_GPTQ_ROWS rows of W, float64. The lanes are rows of W, so nothing is
 * ever summed across lanes, and every row is computed alike wherever it stands in its tile.
 *
 * Arrays are (columns, QL_GPTQ_ROWS): the rows of one column are contiguous. The panel product holds TALL vectors of rows by
 * WIDE columns of z in registers and walks depth in slices of DEPTH, which keeps the slice of e in the first-level cache
 * while all columns of a block meet it. Every element is z = fma(a, e, z) in the order of the depth.
 *
 * The file that includes this one has the vector vocabulary, and defines VD_LANES and the vd_ functions that are not in it. */
#ifndef QL_GPTQ_BODY_H
#define QL_GPTQ_BODY_H

#include "../core/sizes.h"
#include "overlay.h"

enum {
    ROWS = QL_GPTQ_ROWS,
    VECTORS = ROWS / VD_LANES, /* of one column */
    TALL = 3,
    WIDE = VD_LANES,           /* 24 (AVX-512) or 12 (AVX2) registers of sums; the factors of a step lie in a cache line */
    DEPTH = 64
};

typedef struct {
    const double *e, *a;
    int64_t lda, depth;
} panel_slice;

/* ---- z += a^T e ------------------------------------------------------------------------------------------------ */

/* `wide` is a constant at each call: the sums stay in registers */
static inline __attribute__((always_inline)) void panel_tile(double *z, const panel_slice *s, const int wide) {
    vd sum[WIDE][TALL];
#pragma GCC unroll 8
    for (int j = 0; j < wide; j++) {
#pragma GCC unroll 3
        for (int v = 0; v < TALL; v++) { sum[j][v] = vd_load(z + j * ROWS + v * VD_LANES); }
    }
    const double *e = s->e, *a = s->a;
    for (int64_t i = 0; i < s->depth; i++, e += ROWS, a += s->lda) {
        vd error[TALL];
#pragma GCC unroll 3
        for (int v = 0; v < TALL; v++) { error[v] = vd_load(e + v * VD_LANES); }
        __builtin_prefetch(a + WIDE); /* of the next columns: rows of a are too far apart for the machine to foresee */
#pragma GCC unroll 8
        for (int j = 0; j < wide; j++) {
            vd factor = vd_set1(a[j]);
#pragma GCC unroll 3
            for (int v = 0; v < TALL; v++) { sum[j][v] = vd_fma(factor, error[v], sum[j][v]); }
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < wide; j++) {
#pragma GCC unroll 3
        for (int v = 0; v < TALL; v++) { vd_store(z + j * ROWS + v * VD_LANES, sum[j][v]); }
    }
}

/* one panel of at most WIDE columns */
static void panel_columns(double *z, const panel_slice *s, int64_t columns) {
    switch (columns) {
    case 1: panel_tile(z, s, 1); break;
    case 2: panel_tile(z, s, 2); break;
    case 3: panel_tile(z, s, 3); break;
#if VD_LANES == 8
    case 4: panel_tile(z, s, 4); break;
    case 5: panel_tile(z, s, 5); break;
    case 6: panel_tile(z, s, 6); break;
    case 7: panel_tile(z, s, 7); break;
#endif
    default: panel_tile(z, s, WIDE);
    }
}

void V_NAME(gptq_panel_forward)(double *z, const double *e, const double *a, int64_t depth, int64_t width, int64_t lda) {
    for (int64_t first = 0; first < depth; first += DEPTH) {
        int64_t count = first + DEPTH < depth ? DEPTH : depth - first;
        for (int64_t j = 0; j < width; j += WIDE) {
            for (int64_t r = 0; r < ROWS; r += TALL * VD_LANES) {
                panel_slice s = {e + first * ROWS + r, a + first * lda + j, lda, count};
                panel_columns(z + j * ROWS + r, &s, width - j < WIDE ? width - j : WIDE);
            }
        }
    }
}

/* ---- column after column --------------------------------------------------------------------------------------- */

static inline vd round_even(vd x) { /* |x| < 2^51: the sum has no bits left below 1 */
    const vd shift = vd_set1(6755399441055744.0);
    return vd_sub(vd_add(x, shift), shift);
}

/* round(clamp(x / scale, low, high)), a whole number of steps from zero */
static inline vd whole_steps(vd quotient, vd low, vd high) { return round_even(vd_min(vd_max(quotient, low), high)); }

void V_NAME(gptq_steps_forward)(uint8_t *codes, double *e, double *z, double *loss, const ql_gptq_steps *s) {
    const vd nothing = vd_set1(0.0), maxq = vd_set1(s->maxq);
    for (int64_t j = 0; j < s->count; j++) {
        const double *a = s->a + j * s->lda;
        vd half_d2 = vd_set1(0.5 * s->diagonal[j] * s->diagonal[j]);
        for (int v = 0; v < VECTORS; v++) {
            int64_t place = j * ROWS + v * VD_LANES;
            vd now = vd_load(z + place), q = now;
            if (codes != NULL) {
                vd scale = vd_load(s->scale + place), zero = vd_load(s->zero + place);
                vd steps = whole_steps(vd_div(now, scale), vd_sub(nothing, zero), vd_sub(maxq, zero));
                vd_store_bytes(codes + place, vd_add(steps, zero));
                q = vd_mul(scale, steps);
                vd moved = vd_sub(now, q), sum = vd_load(loss + v * VD_LANES);
                vd_store(loss + v * VD_LANES, vd_add(sum, vd_mul(vd_mul(moved, moved), half_d2)));
            }
            vd error = vd_sub(vd_load_floats(s->w + place), q);
            vd_store(e + place, error);
            for (int64_t i = j + 1; i < s->count; i++) {
                double *later = z + i * ROWS + v * VD_LANES;
                vd_store(later, vd_fma(vd_set1(a[i]), error, vd_load(later)));
            }
        }
    }
}

void V_NAME(gptq_error_forward)(double *error, const double *x, const double *importance, const double *scale,
                                 const double *zero, double maxq, int64_t count) {
    for (int v = 0; v < VECTORS; v++) {
        vd step = vd_load(scale + v * VD_LANES), offset = vd_load(zero + v * VD_LANES);
        vd inverse = vd_div(vd_set1(1.0), step), sum = vd_set1(0.0);
        vd low = vd_sub(sum, offset), high = vd_sub(vd_set1(maxq), offset);
        for (int64_t j = 0; j < count; j++) {
            vd value = vd_load(x + j * ROWS + v * VD_LANES);
            vd moved = vd_sub(vd_mul(step, whole_steps(vd_mul(value, inverse), low, high)), value);
            sum = vd_fma(vd_mul(moved, moved), vd_set1(importance[j]), sum);
        }
        vd_store(error + v * VD_LANES, sum);
    }
}

/* ---- powers of errors ------------------------------------------------------------------------------------------ */

/* |e|^2.4 = c c^(-1/5) with c = |e|^3. The bits of a float are nearly a logarithm: a fifth of those of c, taken from a
 * constant, are a root r to 3.6 %. Then c^(-1/5) = r (1 - h)^(-1/5) with h = 1 - c r^5, by a polynomial in h that is within
 * 4.2e-6 of it wherever h can lie (least relative error; found by linear programming). 0 gives 0. */
static inline vf power_2_4(vf e) {
    vf size = v_abs(e), c = v_mul(v_mul(size, size), size);
    vf bits = v_fma(vi_to_vf(vf_as_vi(c)), v_set1(-0.2f), v_set1(0x1.30930cp+30f));
    vf r = vi_as_vf(vi_from_vf(bits)), r2 = v_mul(r, r), power = v_mul(c, r);
    vf h = v_fnma(power, v_mul(r2, r2), v_set1(1.0f));
    vf p = v_fma(h, v_set1(0x1.3ef4aep-3f), v_set1(0x1.a873fap-4f));
    p = v_fma(h, p, v_set1(0x1.9c80f8p-3f));
    p = v_fma(h, p, v_set1(0x1.fffb40p-1f));
    return v_mul(power, p);
}

void V_NAME(gptq_power_forward)(float *error, const float *enough, const float *x, const float *scale, const float *zero,
                                float maxq, int64_t count) {
    enum { STRETCH = 16 }; /* columns between two looks at the sums */
    for (int64_t r = 0; r < ROWS; r += VL) {
        vf step = v_load(scale + r), offset = v_load(zero + r), inverse = v_div(v_set1(1.0f), step), sum = v_zero();
        vf low = v_sub(sum, offset), high = v_sub(v_set1(maxq), offset), most = v_load(enough + r);
        for (int64_t first = 0; first < count && !vm_all(v_gt(sum, most)); first += STRETCH) {
            for (int64_t j = first; j < at_most(first + STRETCH, count); j++) {
                vf value = v_load(x + j * ROWS + r), quotient = v_mul(value, inverse);
                vf steps = v_round(v_min(v_max(quotient, low), high));
                sum = v_add(sum, power_2_4(v_fnma(step, steps, value)));
            }
        }
        v_store(error + r, sum);
    }
}

#endif
