/* decode_body.h: stored codes to float32, bit for bit what formats/weight.h says (a signalling float16 NaN becomes quiet).
 * A row is cut into runs of columns that share a scale; a run is decoded VL elements at a time. */
#include "../formats/weight.h"
#include "overlay.h"

#include <string.h> /* memcpy */

static int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }

static void decode_f16(float *out, const uint16_t *codes, int64_t count) {
    int64_t i = 0;
    for (; i + VL <= count; i += VL) { v_store(out + i, v_load_f16(codes + i)); }
    for (; i < count; i++) { out[i] = ql_f16_value(codes, i); }
}

static void decode_bf16(float *out, const uint16_t *codes, int64_t count) {
    int64_t i = 0;
    for (; i + VL <= count; i += VL) { v_store(out + i, v_load_bf16(codes + i)); }
    for (; i < count; i++) { out[i] = ql_bf16_value(codes, i); }
}

static void decode_int8(float *out, const int8_t *codes, int64_t count, float scale) {
    int64_t i = 0;
    for (; i + VL <= count; i += VL) {
        v_store(out + i, v_mul(v_mul(vi_to_vf(vi_load_i8(codes + i)), v_set1(QL_INT8_STEP)), v_set1(scale)));
    }
    for (; i < count; i++) { out[i] = ql_int8_value(codes[i]) * scale; }
}

/* `count` codes of a row's bit stream from column j, all of one group. The lane of code l reads bits [l bits, l bits + bits)
 * after bit `offset` of the first word: from one word, or where they straddle from two. */
static void decode_affine_run(float *out, const uint32_t *row, int bits, int64_t j, int64_t count, uint32_t zero, float scale) {
    const vi mask = vi_set1((1 << bits) - 1), zeros = vi_set1((int32_t)zero), lane = vi_iota();
    vi step = vi_set1(0);
    for (int b = 0; b < bits; b++) { step = vi_add(step, lane); } /* lane * bits */
    for (int64_t i = 0; i < count; i += VL) {
        int64_t lanes = at_most(VL, count - i), bit = (j + i) * bits;
        int offset = (int)(bit & 31);
        vi words = vi_load_tail(row + (bit >> 5), (offset + lanes * bits + 31) >> 5);
        vi position = vi_add(step, vi_set1(offset)), word = vi_shr(position, 5), shift = vi_and(position, vi_set1(31));
        vi code = vi_shr_by(vi_permute(words, word), shift);
        if (32 % bits != 0) {
            vi next = vi_permute(words, vi_add(word, vi_set1(1)));
            code = vi_or(code, vi_shl_by(next, vi_sub(vi_set1(32), shift))); /* a shift by 32 gives 0 */
        }
        vf value = v_mul(vi_to_vf(vi_sub(vi_and(code, mask), zeros)), v_set1(scale));
        if (lanes == VL) {
            v_store(out + i, value);
        } else {
            v_store_tail(out + i, value, lanes);
        }
    }
}

static void decode_affine_row(float *out, const ql_weight *w, int64_t i, int64_t j0, int64_t j1) {
    const uint32_t *row = (const uint32_t *)w->codes + i * ql_words_per_row(w->k, w->bits);
    int64_t groups = ql_groups_per_row(w);
    for (int64_t j = j0; j < j1;) {
        int64_t group = j / w->group, end = at_most((group + 1) * w->group, j1), g = i * groups + group;
        uint32_t zero = w->zeros != NULL ? w->zeros[g] : ql_affine_symmetric_zero(w->bits);
        decode_affine_run(out + (j - j0), row, w->bits, j, end - j, zero, w->scales[g]);
        j = end;
    }
}

/* `count` elements of the flat tensor from element `flat`, all of one block */
static void decode_nibble_run(float *out, const uint8_t *codes, int64_t flat, int64_t count, v_table table, const float *values,
                              float scale) {
    if ((flat & 1) && count > 0) {
        *out++ = values[ql_nibble(codes, flat)] * scale;
        flat++, count--;
    }
    const uint8_t *bytes = codes + flat / 2;
    int64_t i = 0;
    for (; i + VL <= count; i += VL) {
        v_store(out + i, v_mul(v_table_get(table, vi_load_nibbles(bytes + i / 2)), v_set1(scale)));
    }
    if (i < count) {
        uint8_t last[VL / 2] = {0};
        memcpy(last, bytes + i / 2, (size_t)(count - i + 1) / 2);
        v_store_tail(out + i, v_mul(v_table_get(table, vi_load_nibbles(last)), v_set1(scale)), count - i);
    }
}

static void decode_nibble_row(float *out, const ql_weight *w, int64_t i, int64_t j0, int64_t j1) {
    const float *values = w->format == QL_NF4 ? ql_nf4_values : ql_fp4_values;
    v_table table = v_table_load(values);
    int64_t first = i * w->k + j0, last = i * w->k + j1;
    for (int64_t flat = first; flat < last;) {
        int64_t block = flat / w->group, end = at_most((block + 1) * w->group, last);
        decode_nibble_run(out + (flat - first), w->codes, flat, end - flat, table, values, ql_block_scale(w, block));
        flat = end;
    }
}

void V_NAME(decode_forward)(float *out, int64_t ld, const ql_weight *w, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    int64_t count = j1 - j0;
    for (int64_t i = i0; i < i1; i++, out += ld) {
        int64_t flat = i * w->k + j0;
        switch (w->format) {
        case QL_F32: memcpy(out, (const float *)w->codes + flat, (size_t)count * sizeof *out); break;
        case QL_F16: decode_f16(out, (const uint16_t *)w->codes + flat, count); break;
        case QL_BF16: decode_bf16(out, (const uint16_t *)w->codes + flat, count); break;
        case QL_INT8: decode_int8(out, (const int8_t *)w->codes + flat, count, w->scales[i]); break;
        case QL_AFFINE: decode_affine_row(out, w, i, j0, j1); break;
        case QL_NF4: case QL_FP4: decode_nibble_row(out, w, i, j0, j1); break;
        case QL_FORMAT_COUNT: break;
        }
    }
}
