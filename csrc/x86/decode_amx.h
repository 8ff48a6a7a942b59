/* decode_amx.h: stored codes to bf16: the float32 value of formats/weight.h, rounded to nearest even.
 *
 * Codes of 2 to 4 bits become indices of a table of the 16 values of their group, as bf16 with its scale: 32 codes for one
 * vpshufb, one shift and one vpermw. Codes of 8 bits are scaled in float32. What lies otherwise (groups that do not begin
 * at multiples of 32, other widths) is decoded to float32 first. */
#ifndef QL_DECODE_AMX_H
#define QL_DECODE_AMX_H

#include "../formats/weight.h"
#include "overlay.h"
#include "tile_amx.h"

#include <stdalign.h> /* alignas */
#include <string.h>   /* memset */

/* how 32 codes lie in 16 bytes: code j starts in byte pick[2j], bit shift[j]; what is above it in the index is ignored,
 * for the table repeats every 2^bits of its 32 entries */
typedef struct {
    __m512i pick, shift;
    int64_t bytes; /* of 32 codes */
} code_layout;

typedef struct {
    const ql_weight *w;
    enum { BY_FLOAT, BY_TABLE, BY_BYTE, BY_F16, BY_BF16 } way;
    code_layout layout;
    vf values;                     /* of the codes, lane by lane, before scale and zero point */
    int64_t row_bytes, row_groups; /* of the codes of a row, of its scales */
} decoder;

/* bits of a code, bytes of the codes of a row */
static inline int64_t bits_of(const ql_weight *w) { return w->format == QL_NF4 || w->format == QL_FP4 ? 4 : w->bits; }
static inline int64_t row_bytes_of(const ql_weight *w) {
    return w->format == QL_AFFINE ? 4 * ql_words_per_row(w->k, w->bits) : w->k * bits_of(w) / 8;
}

static code_layout code_layout_of(const ql_weight *w) {
    alignas(64) uint8_t pick[64];
    alignas(64) uint16_t shift[SIDE];
    int bits = (int)bits_of(w);
    for (int j = 0; j < SIDE; j++) {
        int bit = w->format == QL_AFFINE ? bits * j : j / 2 * 8 + (j % 2 == 0 ? 4 : 0);
        pick[2 * j] = (uint8_t)(bit / 8);
        pick[2 * j + 1] = (uint8_t)(bit / 8 + 1 < 16 ? bit / 8 + 1 : 0x80); /* 0x80: a zero byte */
        shift[j] = (uint16_t)(bit % 8);
    }
    return (code_layout){_mm512_load_si512(pick), _mm512_load_si512(shift), bits * SIDE / 8};
}

/* every 32 columns from a multiple of 32 on have one scale */
static int has_aligned_groups(const ql_weight *w) {
    if (w->format == QL_NF4 || w->format == QL_FP4) { return w->group % SIDE == 0 && w->k % w->group == 0; }
    return w->group % SIDE == 0 || w->group >= w->k;
}

static decoder decoder_of(const ql_weight *w) {
    decoder d = {.w = w, .way = BY_FLOAT};
    switch (w->format) {
    case QL_F16: d.way = BY_F16; break;
    case QL_BF16: d.way = BY_BF16; break;
    case QL_INT8: d.way = BY_BYTE; break;
    case QL_AFFINE:
        if (has_aligned_groups(w) && w->bits <= 4) { d.way = BY_TABLE; }
        if (has_aligned_groups(w) && w->bits == 8) { d.way = BY_BYTE; }
        break;
    case QL_NF4: case QL_FP4:
        if (has_aligned_groups(w)) { d.way = BY_TABLE; }
        break;
    case QL_F32: case QL_FORMAT_COUNT: break;
    }
    if (d.way == BY_TABLE) {
        d.layout = code_layout_of(w);
        d.row_bytes = row_bytes_of(w);
        d.row_groups = ql_groups_per_row(w);
        int zero = w->zeros == NULL ? (int)ql_affine_symmetric_zero(w->bits) : 0;
        d.values = w->format == QL_NF4   ? v_load(ql_nf4_values)
                   : w->format == QL_FP4 ? v_load(ql_fp4_values)
                                         : vi_to_vf(vi_sub(vi_and(vi_iota(), vi_set1((1 << w->bits) - 1)), vi_set1(zero)));
    }
    return d;
}

/* the values of group g (NF4, FP4: of the flat tensor), twice */
static inline __m512i group_table(const decoder *d, int64_t g) {
    const ql_weight *w = d->w;
    vf values = d->values;
    if (w->zeros != NULL) { values = v_sub(values, v_set1((float)w->zeros[g])); }
    values = v_mul(values, v_set1(w->scales != NULL ? w->scales[g] : ql_block_scale(w, g)));
    return to_bf16(values, values);
}

static inline __mmask32 first_words(int64_t count) { return (__mmask32)((1ull << at_most(count, SIDE)) - 1); }

/* the values of 32 codes */
static inline __m512i look_up(__m128i codes, __m512i pick, __m512i shift, __m512i table) {
    __m512i index = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(codes), pick);
    return _mm512_permutexvar_epi16(_mm512_srlv_epi16(index, shift), table);
}

/* Rows [i, i + count) of W, columns [j0, j1), j0 a multiple of 32: row r to out + r ld, each 32 columns of it `step` elements
 * apart. Beyond j1 follow zeros up to a multiple of 32. */
static void decode_by_table(uint16_t *out, int64_t ld, int64_t step, const decoder *d, int64_t i, int64_t count, int64_t j0,
                            int64_t j1) {
    const int64_t row_bytes = d->row_bytes, bytes = d->layout.bytes, width = d->w->group;
    const __m512i pick = d->layout.pick, shift = d->layout.shift;
    const int64_t first = j0 / width, first_end = at_most((first + 1) * width, j1);
    for (int64_t r = 0; r < count; r++) {
        const uint8_t *row = (const uint8_t *)d->w->codes + (i + r) * row_bytes;
        uint16_t *to = out + r * ld;
        int64_t offset = j0 / SIDE * bytes, group = (i + r) * d->row_groups + first;
        for (int64_t j = j0, end = first_end; j < j1; end = at_most(end + width, j1), group++) {
            __m512i table = group_table(d, group);
            for (; j + SIDE <= end && offset + 16 <= row_bytes; j += SIDE, to += step, offset += bytes) {
                __m128i codes = _mm_loadu_si128((const __m128i *)(const void *)(row + offset));
                _mm512_storeu_si512(to, look_up(codes, pick, shift, table));
            }
            for (; j < end; j += SIDE, to += step, offset += bytes) { /* the end of a row */
                __m128i codes = _mm_maskz_loadu_epi8((__mmask16)((1u << at_most(row_bytes - offset, 16)) - 1), row + offset);
                _mm512_storeu_si512(to, _mm512_maskz_mov_epi16(first_words(end - j), look_up(codes, pick, shift, table)));
            }
        }
    }
}

/* how a group of 8-bit codes is scaled: (code ^ flip) - offset, then times step (int8 has it), then times scale */
typedef struct {
    __m256i flip;
    vi offset;
    vf step, scale;
    int has_step;
} byte_scale;

static inline byte_scale byte_scale_of(const ql_weight *w, int64_t g) {
    int is_int8 = w->format == QL_INT8;
    int32_t zero = w->zeros != NULL ? w->zeros[g] : (int32_t)ql_affine_symmetric_zero(8);
    return (byte_scale){_mm256_set1_epi8((char)(is_int8 ? -128 : 0)), vi_set1(is_int8 ? 128 : zero), v_set1(QL_INT8_STEP),
                        v_set1(w->scales[g]), is_int8};
}

static inline vf scale_half(__m128i bytes, const byte_scale *s) {
    vf value = vi_to_vf(vi_sub(_mm512_cvtepu8_epi32(bytes), s->offset));
    return v_mul(s->has_step ? v_mul(value, s->step) : value, s->scale);
}

static inline __m512i scale_bytes(__m256i codes, const byte_scale *s) {
    codes = _mm256_xor_si256(codes, s->flip);
    return to_bf16(scale_half(_mm256_castsi256_si128(codes), s), scale_half(_mm256_extracti128_si256(codes, 1), s));
}

static void decode_by_byte(uint16_t *out, int64_t step, const decoder *d, int64_t i, int64_t j0, int64_t j1) {
    const ql_weight *w = d->w;
    int is_int8 = w->format == QL_INT8;
    int64_t row_bytes = row_bytes_of(w), width = is_int8 ? w->k : w->group;
    int64_t group = j0 / width, first_group = is_int8 ? i : i * ql_groups_per_row(w);
    const uint8_t *row = (const uint8_t *)w->codes + i * row_bytes;
    for (int64_t j = j0; j < j1; group++) {
        int64_t end = at_most((group + 1) * width, j1);
        byte_scale s = byte_scale_of(w, first_group + group);
        for (; j + SIDE <= end; j += SIDE, out += step) {
            _mm512_storeu_si512(out, scale_bytes(_mm256_loadu_si256((const __m256i *)(const void *)(row + j)), &s));
        }
        if (j < end) {
            __mmask32 lanes = first_words(end - j);
            __m512i values = scale_bytes(_mm256_maskz_loadu_epi8(lanes, row + j), &s);
            _mm512_storeu_si512(out, _mm512_maskz_mov_epi16(lanes, values));
            j = end;
        }
    }
}

static void decode_half(uint16_t *out, int64_t step, const decoder *d, int64_t i, int64_t j0, int64_t j1) {
    const uint16_t *row = (const uint16_t *)d->w->codes + i * d->w->k;
    int64_t j = j0;
    for (; d->way == BY_BF16 && j + SIDE <= j1; j += SIDE, out += step) { _mm512_storeu_si512(out, _mm512_loadu_si512(row + j)); }
    for (; j < j1; j += SIDE, out += step) {
        __m512i halves = _mm512_maskz_loadu_epi16(first_words(j1 - j), row + j);
        if (d->way == BY_F16) {
            halves = to_bf16(_mm512_cvtph_ps(_mm512_castsi512_si256(halves)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1)));
        }
        _mm512_storeu_si512(out, halves);
    }
}

static void decode_by_float(uint16_t *out, int64_t step, const ql_weight *w, int64_t i, int64_t j0, int64_t j1) {
    alignas(64) float values[SHORT_K];
    int64_t count = j1 - j0;
    ql_decode_forward_avx512(values, SHORT_K, w, i, i + 1, j0, j1);
    memset(values + count, 0, (size_t)(round_up(count, SIDE) - count) * sizeof *values);
    for (int64_t j = 0; j < count; j += SIDE, out += step) {
        _mm512_storeu_si512(out, to_bf16(v_load(values + j), v_load(values + j + VL)));
    }
}

/* The same for any way of storing W, at most SHORT_K columns. */
static void decode_rows(uint16_t *out, int64_t ld, int64_t step, const decoder *d, int64_t i, int64_t count, int64_t j0, int64_t j1) {
    if (d->way == BY_TABLE) {
        decode_by_table(out, ld, step, d, i, count, j0, j1);
        return;
    }
    for (int64_t r = 0; r < count; r++, out += ld) {
        switch (d->way) {
        case BY_FLOAT: decode_by_float(out, step, d->w, i + r, j0, j1); break;
        case BY_BYTE: decode_by_byte(out, step, d, i + r, j0, j1); break;
        case BY_F16: case BY_BF16: decode_half(out, step, d, i + r, j0, j1); break;
        case BY_TABLE: break;
        }
    }
}

/* asks for the codes of rows [i0, i1), columns [j0, j1): short pieces of rows are not foreseen by the processor */
static void fetch_codes(const ql_weight *w, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    for (int64_t i = i0; i < i1; i++) {
        const char *row = (const char *)w->codes + i * row_bytes_of(w);
        for (int64_t byte = j0 * bits_of(w) / 8; byte < j1 * bits_of(w) / 8; byte += 64) { _mm_prefetch(row + byte, _MM_HINT_T1); }
    }
}

#endif
