/* transposed_body.h: blocks of W^T for gemm_body.h, decoded bit for bit as decode_body.h does, NR rows of W at a time: the lanes of a
 * block are rows of W. Codes of 2, 4 and 8 bits are transposed as words, 32 bits of a row each, before they become floats; others after.
 * Rows lie far apart, where a processor foresees nothing: those of the next panel are fetched meanwhile. */
#ifndef QL_TRANSPOSED_BODY_H
#define QL_TRANSPOSED_BODY_H

#include "../formats/packed.h" /* ql_row_group */
#include "gemm_body.h"

enum {
    SPAN = 128, /* steps of a panel decoded at once: they stay in the first-level cache, beside the part of b they go to */
    LD_ROWS = SPAN + 16,
    LINE = 64   /* bytes */
};

/* bits of a code, and bytes of a row of codes; NF4, FP4: where a row is whole bytes */
static inline int64_t code_bits(const ql_weight *w) {
    return w->format == QL_F32 ? 32 : w->format == QL_AFFINE ? w->bits : w->format == QL_INT8 ? 8 : w->format == QL_F16 || w->format == QL_BF16 ? 16 : 4;
}
static inline int64_t row_bytes(const ql_weight *w) {
    return w->format == QL_AFFINE ? 4 * ql_words_per_row(w->k, w->bits) : w->k * code_bits(w) / 8;
}

/* asks for columns [k, k + steps) of rows [j, end) of W */
static void fetch_rows(const ql_weight *w, int64_t j, int64_t end, int64_t k, int64_t steps) {
    int64_t row = row_bytes(w), first = k * code_bits(w) / 8, last = (k + steps) * code_bits(w) / 8;
    for (const char *codes = (const char *)w->codes + j * row; j < end; j++, codes += row) {
        for (int64_t byte = first; byte < last; byte += LINE) { v_prefetch(codes + byte); }
    }
}

/* ---- words ---------------------------------------------------------------------------------------------------- */

/* Columns of W whose words are transposed at once; 0: rows are not whole words, or scales change within those columns */
static int64_t columns_at_once(const ql_weight *w) {
    int64_t bits = code_bits(w), columns = 128 / bits, group = ql_row_group(w);
    int narrow = w->format == QL_INT8 || w->format == QL_NF4 || w->format == QL_FP4 ||
                 (w->format == QL_AFFINE && (bits == 2 || bits == 4 || bits == 8));
    return narrow && row_bytes(w) * 8 == round_up(w->k * bits, 32) && (group == w->k || (group > 0 && group % columns == 0)) ? columns : 0;
}

/* scales and zeros of rows [i, i + VL) in the group of column j, zeros as what stands for 0 */
static void group_of_rows(float *scales, int32_t *zeros, const ql_weight *w, int64_t i, int64_t j) {
    int64_t groups = w->format == QL_AFFINE ? ql_groups_per_row(w) : 1;
    for (int64_t r = 0; r < VL; r++) {
        int64_t at = (i + r) * groups + j / w->group;
        switch (w->format) {
        case QL_AFFINE: scales[r] = w->scales[at], zeros[r] = w->zeros != NULL ? w->zeros[at] : (int32_t)ql_affine_symmetric_zero(w->bits); break;
        case QL_INT8: scales[r] = w->scales[i + r], zeros[r] = 128; break;
        default: scales[r] = ql_block_scale(w, ((i + r) * w->k + j) / w->group), zeros[r] = 0; break;
        }
    }
}

/* out[q NR + lane] = code q of the word of that lane, as a float; format and bits are constants after inlining */
static inline __attribute__((always_inline)) void word_values(float *out, vi word, v_table table, vi zero, vf scale, const int format,
                                                              const int bits) {
    if (format == QL_INT8) { word = vi_xor(word, vi_set1((int32_t)0x80808080u)); } /* unsigned, 128 more */
#pragma GCC unroll 16
    for (int q = 0; q < 32 / bits; q++) {
        vf value;
        if (format == QL_NF4) { /* its table, or that of FP4; the even element in the high nibble */
            value = v_table_get(table, vi_shr(word, 4u * (unsigned)(q ^ 1)));
        } else {
            vi code = vi_and(vi_shr(word, (unsigned)(bits * q)), vi_set1((1 << bits) - 1));
            value = vi_to_vf(vi_sub(code, zero));
        }
        if (format == QL_INT8) { value = v_mul(value, v_set1(QL_INT8_STEP)); }
        v_store(out + q * NR, v_mul(value, scale));
    }
}

/* NR rows of W from row j, columns [k, k + steps), `chunk` of them at once */
static inline __attribute__((always_inline)) void transpose_words(float *out, const ql_weight *w, int64_t j, int64_t k, int64_t steps,
                                                                  const int format, const int bits) {
    const int64_t chunk = 128 / bits, row = row_bytes(w), group = ql_row_group(w);
    const v_table table = v_table_load(w->format == QL_FP4 ? ql_fp4_values : ql_nf4_values);
    for (int v = 0; v < 2; v++, j += VL, out += VL) {
        const char *codes = (const char *)w->codes + j * row;
        for (int64_t s = 0; s < steps;) {
            alignas(64) float scales[VL];
            alignas(64) int32_t zeros[VL];
            group_of_rows(scales, zeros, w, j, k + s);
            vf scale = v_load(scales);
            vi zero = vi_load(zeros);
            for (int64_t end = at_most(steps, ((k + s) / group + 1) * group - k); s < end; s += chunk) {
                vf words[4];
                v_transpose4(words, (const float *)(const void *)(codes + (k + s) * bits / 8), row / 4);
                for (int q = 0; q < 4; q++) {
                    word_values(out + (s + q * (chunk / 4)) * NR, vf_as_vi(words[q]), table, zero, scale, format, bits);
                }
            }
        }
    }
}

static void transpose_codes(float *out, const ql_weight *w, int64_t j, int64_t k, int64_t steps) {
    if (w->format == QL_NF4 || w->format == QL_FP4) {
        transpose_words(out, w, j, k, steps, QL_NF4, 4);
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

/* ---- floats --------------------------------------------------------------------------------------------------- */

/* out[s NR + r] = rows[r ld + s] for `vectors` VL rows; up to 3 steps too many are written */
static inline __attribute__((always_inline)) void transpose(float *out, const float *rows, int64_t ld, int64_t steps, const int vectors) {
    for (int64_t s = 0; s < steps; s += 4) {
        for (int v = 0; v < vectors; v++) {
            vf columns[4];
            v_transpose4(columns, rows + v * VL * ld + s, ld);
            for (int q = 0; q < 4; q++) { v_store(out + (s + q) * NR + v * VL, columns[q]); }
        }
    }
}

/* b = W^T, NR rows of W at a time; KC and SPAN are multiples of 4, so the steps too many stay in the block and are never used */
static void pack_transposed(float *block, const gemm *g, int64_t k0, int64_t k1, int64_t j0, int64_t j1) {
    const ql_weight *w = g->b;
    const int64_t at_once = columns_at_once(w);
    alignas(64) float rows[NR * LD_ROWS] = {0}; /* what lies beyond n or k is never used */
    for (int64_t j = j0; j < j1; j += NR) {
        int64_t count = at_most(NR, j1 - j);
        int in_place = w->format == QL_F32 && count == NR && (k1 - k0) % 4 == 0;
        for (int64_t k = k0; k < k1; k += SPAN) {
            int64_t steps = at_most(SPAN, k1 - k);
            float *out = block_at(block, k - k0, j - j0);
            if (j + NR < j1) {
                fetch_rows(w, j + NR, at_most(j + 2 * NR, j1), k, steps);
            } else if (k + KC < w->k) { /* the next block's first panel */
                fetch_rows(w, j0, at_most(j0 + NR, j1), k + KC, at_most(SPAN, w->k - k - KC));
            }
            if (at_once > 0 && count == NR && steps % at_once == 0) {
                transpose_codes(out, w, j, k, steps);
            } else if (in_place) { /* VL rows at a time: where k is a power of two, they share a set of the first-level cache */
                const float *source = (const float *)w->codes + j * w->k + k;
                transpose(out, source, w->k, steps, 1);
                transpose(out + VL, source + VL * w->k, w->k, steps, 1);
            } else {
                V_NAME(decode_forward)(rows, LD_ROWS, w, j, j + count, k, k + steps);
                transpose(out, rows, LD_ROWS, steps, 2);
            }
        }
    }
}

#endif
