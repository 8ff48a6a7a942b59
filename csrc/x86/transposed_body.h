/* transposed_body.h: blocks of W^T for gemm_body.h, decoded bit for bit as decode_body.h does, NR rows of W at a time: the lanes of a
 * block are rows of W. Codes of 2, 4 and 8 bits are transposed as words, 32 bits of a row each, before they become floats; others after.
 * Weights that are packed for products with few rows (formats/packed.h) already have rows of W as lanes. */
#ifndef QL_TRANSPOSED_BODY_H
#define QL_TRANSPOSED_BODY_H

#include "../formats/packed.h" /* ql_row_group */
#include "gemm_body.h"

enum { LD_ROWS = STEP * SPAN + 16 };

/* bits of a code, and bytes of a row of codes; NF4, FP4: where a row is whole bytes */
static inline int64_t code_bits(const ql_weight *w) {
    return w->format == QL_F32 ? 32 : w->format == QL_AFFINE ? w->bits : w->format == QL_INT8 ? 8 : w->format == QL_F16 || w->format == QL_BF16 ? 16 : 4;
}
static inline int64_t row_bytes(const ql_weight *w) {
    return w->format == QL_AFFINE ? 4 * ql_words_per_row(w->k, w->bits) : w->k * code_bits(w) / 8;
}

/* ---- words ---------------------------------------------------------------------------------------------------- */

/* Columns of W whose words are transposed at once; 0: rows are not whole words, or scales change within those columns */
static int64_t columns_at_once(const ql_weight *w) {
    int64_t bits = code_bits(w), columns = 128 / bits, group = ql_row_group(w);
    int looked_up = w->format == QL_NF4 || w->format == QL_FP4;
    if (w->format == QL_F16 || 32 % bits != 0 || row_bytes(w) * 8 != round_up(w->k * bits, 32)) { return 0; }
    return (group == w->k && !(looked_up && w->group > w->k)) || (group > 0 && group < w->k && group % columns == 0) ? columns : 0;
}

/* scales and zeros of rows [i, i + VL) in the group of column j, zeros as what stands for 0; format is a constant after inlining */
static inline __attribute__((always_inline)) void group_of_rows(float *scales, int32_t *zeros, const ql_weight *w, int64_t i, int64_t j,
                                                                const int format) {
    int64_t group = ql_row_group(w), groups = pieces(w->k, group), at = i * groups + j / group;
    for (int64_t r = 0; r < VL; r++, at += groups) {
        scales[r] = format == QL_NF4 ? ql_block_scale(w, at) : w->scales[at];
        zeros[r] = format == QL_INT8 ? 128 : w->zeros != NULL ? w->zeros[at] : (int32_t)ql_affine_symmetric_zero(w->bits);
    }
}

/* where column s of a panel begins: two of them share its words in pairs */
static inline int64_t place_of(int64_t s) { return s / STEP * NR; }

/* code q of the words of VL rows as floats, where code q is at place q ^ first; format, bits and first are constants after inlining */
static inline __attribute__((always_inline)) vf word_value(vi word, int q, v_table table, vi zero, vf scale, const int format, const int bits,
                                                           const int first) {
    if (bits >= 16) { /* float32, or bfloat16, which is the high half of one */
        return vi_as_vf(bits == 32 ? word : q == 0 ? vi_shl(word, 16) : vi_and(word, vi_set1((int32_t)0xffff0000u)));
    }
    vi code = vi_shr(word, (unsigned)(bits * (q ^ first)));
    vf value = format == QL_NF4 ? v_table_get(table, code) /* its table, or that of FP4 */
                                : vi_to_vf(vi_sub(vi_and(code, vi_set1((1 << bits % 32) - 1)), zero));
    if (format == QL_INT8) { value = v_mul(value, v_set1(QL_INT8_STEP)); }
    return v_mul(value, scale);
}

/* all of them, column q at place_of(q) */
static inline __attribute__((always_inline)) void word_values(float *out, vi word, v_table table, vi zero, vf scale, const int format,
                                                              const int bits, const int first) {
    const int count = 32 / bits;
    if (format == QL_INT8) { word = vi_xor(word, vi_set1((int32_t)0x80808080u)); } /* unsigned, 128 more */
#if GEMM_PAIRS
#pragma GCC unroll 8
    for (int q = 0; q < count; q += 2) {
        v_store_pairs(out + place_of(q), word_value(word, q, table, zero, scale, format, bits, first),
                      word_value(word, q + 1, table, zero, scale, format, bits, first));
    }
#else
#pragma GCC unroll 16
    for (int q = 0; q < count; q++) { v_store(out + place_of(q), word_value(word, q, table, zero, scale, format, bits, first)); }
#endif
}

/* NR rows of W from row j, columns [k, k + steps), `chunk` of them at once */
static inline __attribute__((always_inline)) void transpose_words(float *out, const ql_weight *w, int64_t j, int64_t k, int64_t steps,
                                                                  const int format, const int bits) {
    const int64_t chunk = 128 / bits, row = row_bytes(w), group = ql_row_group(w);
    const int fetches = row % 4096 != 0; /* such rows share a set of the first-level cache */
    const v_table table = v_table_load(w->format == QL_FP4 ? ql_fp4_values : ql_nf4_values);
    for (int v = 0; v < 2; v++, j += VL, out += VL) {
        const char *codes = (const char *)w->codes + j * row;
        for (int64_t s = 0; s < steps;) {
            alignas(64) float scales[VL] = {0};
            alignas(64) int32_t zeros[VL] = {0};
            if (bits < 16) { group_of_rows(scales, zeros, w, j, k + s, format); }
            vf scale = v_load(scales);
            vi zero = vi_load(zeros);
            for (int64_t end = at_most(steps, ((k + s) / group + 1) * group - k); s < end; s += chunk) {
                vf words[4];
                const char *from = codes + (k + s) * bits / 8; /* 16 bytes of each row: a line in four steps, a quarter of the rows in each */
                for (int r = 0; r < VL / 4 && fetches; r++) { v_prefetch(from + (NR + s / chunk % 4 * (VL / 4) + r) * row); } /* the next panel */
                v_transpose4(words, (const float *)(const void *)from, row / 4);
                for (int q = 0; q < 4; q++) {
                    word_values(out + place_of(s + q * (chunk / 4)), vf_as_vi(words[q]), table, zero, scale, format, bits,
                                format == QL_NF4); /* the even element of a byte in its high nibble */
                }
            }
        }
    }
}

static void transpose_codes(float *out, const ql_weight *w, int64_t j, int64_t k, int64_t steps) {
    if (w->format == QL_NF4 || w->format == QL_FP4) {
        transpose_words(out, w, j, k, steps, QL_NF4, 4);
#if !GEMM_PAIRS /* they are not rounded */
    } else if (w->format == QL_F32) {
        transpose_words(out, w, j, k, steps, QL_F32, 32);
#endif
    } else if (w->format == QL_BF16) {
        transpose_words(out, w, j, k, steps, QL_BF16, 16);
    } else if (w->format == QL_INT8) {
        transpose_words(out, w, j, k, steps, QL_INT8, 8);
    } else if (w->bits == 8) {
        transpose_words(out, w, j, k, steps, QL_AFFINE, 8);
    } else if (w->bits == 4) {
        transpose_words(out, w, j, k, steps, QL_AFFINE, 4);
    } else {
        transpose_words(out, w, j, k, steps, QL_AFFINE, 2);
    }
}

/* ---- panels --------------------------------------------------------------------------------------------------- */

/* whether the weight is in panels of 4 or 2 bits, no group of which is padded */
static int is_in_panels(const ql_weight *w, const ql_packed_layout *l) {
    return (l->rows == 32 || (l->rows == 64 && l->words == 1)) && l->columns == w->k && __atomic_load_n(&w->packed, __ATOMIC_ACQUIRE) != NULL;
}

/* The same as transpose_words from packed words; k and steps are whole blocks. Rows beyond n are zero codes with scales of 0. */
static inline __attribute__((always_inline)) void transpose_panel(float *out, const ql_weight *w, const ql_packed_layout *l, int64_t j,
                                                                  int64_t k, int64_t steps, const int format, const int bits) {
    const int64_t step = 32 / bits, rows = bits == 4 ? 32 : 64;
    const v_table table = v_table_load(w->format == QL_FP4 ? ql_fp4_values : ql_nf4_values);
    for (int v = 0; v < 2; v++, j += VL, out += VL) {
        const uint32_t *panel = (const uint32_t *)w->packed + j / rows * l->panel;
        for (int64_t s = 0; s < steps;) {
            int64_t group = (k + s) / l->group, at = group * l->group;
            const uint32_t *p = panel + group * (l->head + l->blocks * rows);
            vf scale = v_load((const float *)(const void *)p + j % rows);
            vi zero = vi_set1((int32_t)ql_affine_symmetric_zero(bits));
            if (l->zeros) { zero = vi_add(zero, vi_load_i16((const int16_t *)(const void *)(p + rows) + j % rows)); }
            p += l->head + (k + s - at) / step * rows + j % rows;
            for (int64_t end = at_most(steps, at + l->group - k); s < end; s += step, p += rows) {
                v_prefetch(p + l->panel); /* the next panel */
                word_values(out + place_of(s), vi_load(p), table, zero, scale, format, bits, 0);
            }
        }
    }
}

/* ---- floats --------------------------------------------------------------------------------------------------- */

/* out[s NR + r] = rows[r LD_ROWS + s] for NR rows; up to 3 steps too many are written */
static void transpose_floats(float *out, const float *rows, int64_t steps) {
    for (int64_t s = 0; s < steps; s += 4) {
        for (int v = 0; v < 2; v++) {
            vf columns[4];
            v_transpose4(columns, rows + v * VL * LD_ROWS + s, LD_ROWS);
            for (int q = 0; q < 4; q++) { v_store(out + (s + q) * NR + v * VL, columns[q]); }
        }
    }
}

/* Columns [k0, k1), of SPAN steps at most, of the panel of rows [j, j + NR) of W, as many as there are. KC and SPAN are multiples of 4, so the steps
 * too many stay in the block and are never used; nor is what lies beyond n. */
static void transpose_span(float *out, const ql_weight *w, int64_t k0, int64_t k1, int64_t j) {
    int64_t count = at_most(NR, w->n - j), steps = k1 - k0, at_once = columns_at_once(w);
    ql_packed_layout l = ql_packed_layout_of(w);
    if (is_in_panels(w, &l) && steps % l.step == 0) {
        if (l.rows == 64) {
            transpose_panel(out, w, &l, j, k0, steps, QL_AFFINE, 2);
        } else if (w->format == QL_AFFINE) {
            transpose_panel(out, w, &l, j, k0, steps, QL_AFFINE, 4);
        } else {
            transpose_panel(out, w, &l, j, k0, steps, QL_NF4, 4);
        }
    } else if (at_once > 0 && count == NR && steps % at_once == 0) {
        transpose_codes(out, w, j, k0, steps);
    } else {
        alignas(64) float rows[NR * LD_ROWS];
        memset(rows, 0, sizeof rows);
        V_NAME(decode_forward)(rows, LD_ROWS, w, j, j + count, k0, k1);
#if GEMM_PAIRS
        alignas(64) float panel[STEP * SPAN * NR];
        transpose_floats(panel, rows, steps);
        v_pairs_of_rows(out, panel, NR, steps);
#else
        transpose_floats(out, rows, steps);
#endif
    }
}

static void pack_transposed(float *panel, const gemm *g, int64_t k0, int64_t k1, int64_t j) {
    const ql_weight *w = g->b;
    transpose_span(panel, w, STEP * k0, at_most(STEP * k1, w->k), j);
}

#endif
