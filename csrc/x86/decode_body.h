/* decode_body.h: stored codes to float32, bit for bit what formats/weight.h says (a signalling float16 NaN becomes quiet).
 * A row is cut into runs of columns that share a scale; a run is decoded VL elements at a time. */
#include "../core/sizes.h"
#include "../formats/weight.h"
#include "overlay.h"

#include <string.h> /* memcpy */

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

/* how the lanes read a bit stream: lane l has the code at bit step[l] after the first one */
typedef struct {
    int bits;
    vi step, mask;
} stream_lanes;

static stream_lanes stream_lanes_of(int bits) {
    stream_lanes lanes = {bits, vi_set1(0), vi_set1((1 << bits) - 1)};
    for (int b = 0; b < bits; b++) { lanes.step = vi_add(lanes.step, vi_iota()); }
    return lanes;
}

static inline vf affine_value(vi code, stream_lanes lanes, vi zero, vf scale) {
    return v_mul(vi_to_vf(vi_sub(vi_and(code, lanes.mask), zero)), scale);
}

/* `count` codes of a row's bit stream from column j, all of one group. Where whole words hold VL codes, every step reads
 * alike; else lane l reads from bit `offset` + step[l], from one word, or where a code straddles from two. */
static void decode_affine_run(float *out, const uint32_t *row, stream_lanes lanes, int64_t j, int64_t count, vi zero, vf scale) {
    const vi low = vi_set1(31);
    int64_t i = 0, bit = j * lanes.bits, words_a_step = VL * lanes.bits / 32;
    if (32 % lanes.bits == 0 && (bit & 31) == 0 && VL * lanes.bits % 32 == 0) {
        const vi word = vi_shr(lanes.step, 5), shift = vi_and(lanes.step, low);
        for (const uint32_t *words = row + (bit >> 5); i + VL <= count; i += VL, words += words_a_step) {
            vi code = vi_shr_by(vi_permute(vi_load_tail(words, words_a_step), word), shift);
            v_store(out + i, affine_value(code, lanes, zero, scale));
        }
    }
    for (; i < count; i += VL) {
        int64_t left = at_most(VL, count - i);
        bit = (j + i) * lanes.bits;
        int offset = (int)(bit & 31);
        vi words = vi_load_tail(row + (bit >> 5), (offset + left * lanes.bits + 31) >> 5);
        vi position = vi_add(lanes.step, vi_set1(offset)), word = vi_shr(position, 5), shift = vi_and(position, low);
        vi code = vi_shr_by(vi_permute(words, word), shift);
        if (32 % lanes.bits != 0) {
            vi next = vi_permute(words, vi_add(word, vi_set1(1)));
            code = vi_or(code, vi_shl_by(next, vi_sub(vi_set1(32), shift))); /* a shift by 32 gives 0 */
        }
        vf value = affine_value(code, lanes, zero, scale);
        if (left == VL) {
            v_store(out + i, value);
        } else {
            v_store_tail(out + i, value, left);
        }
    }
}

static void decode_affine_row(float *out, const ql_weight *w, stream_lanes lanes, int64_t i, int64_t j0, int64_t j1) {
    const uint32_t *row = (const uint32_t *)w->codes + i * ql_words_per_row(w->k, w->bits);
    int64_t group = j0 / w->group, first = i * ql_groups_per_row(w);
    for (int64_t j = j0; j < j1; group++) {
        int64_t end = at_most((group + 1) * w->group, j1), g = first + group;
        uint32_t zero = w->zeros != NULL ? w->zeros[g] : ql_affine_symmetric_zero(w->bits);
        decode_affine_run(out + (j - j0), row, lanes, j, end - j, vi_set1((int32_t)zero), v_set1(w->scales[g]));
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
    int64_t block = first / w->group;
    for (int64_t flat = first; flat < last; block++) {
        int64_t end = at_most((block + 1) * w->group, last);
        decode_nibble_run(out + (flat - first), w->codes, flat, end - flat, table, values, ql_block_scale(w, block));
        flat = end;
    }
}

void V_NAME(decode_forward)(float *out, int64_t ld, const ql_weight *w, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    int64_t count = j1 - j0;
    stream_lanes lanes = stream_lanes_of(w->format == QL_AFFINE ? w->bits : 0);
    for (int64_t i = i0; i < i1; i++, out += ld) {
        int64_t flat = i * w->k + j0;
        switch (w->format) {
        case QL_F32: memcpy(out, (const float *)w->codes + flat, (size_t)count * sizeof *out); break;
        case QL_F16: decode_f16(out, (const uint16_t *)w->codes + flat, count); break;
        case QL_BF16: decode_bf16(out, (const uint16_t *)w->codes + flat, count); break;
        case QL_INT8: decode_int8(out, (const int8_t *)w->codes + flat, count, w->scales[i]); break;
        case QL_AFFINE: decode_affine_row(out, w, lanes, i, j0, j1); break;
        case QL_NF4: case QL_FP4: decode_nibble_row(out, w, i, j0, j1); break;
        case QL_FORMAT_COUNT: break;
        }
    }
}
