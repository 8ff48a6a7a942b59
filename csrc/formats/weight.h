/* weight.h: the specification of a stored weight: which code, which scale, which zero, which value. */
#ifndef QL_FORMAT_WEIGHT_H
#define QL_FORMAT_WEIGHT_H

#include "../quantlab.h"
#include "affine.h"
#include "float.h"
#include "fp4.h"
#include "int8.h"
#include "nf4.h"

enum { QL_SCALE_BLOCK = 256 }; /* block scales that share one nested scale in double quantization */

/* scale of block `block`, plain or double-quantized */
static inline float ql_block_scale(const ql_weight *w, int64_t block) {
    if (w->scale_codes == NULL) { return w->scales[block]; }
    return w->scale_map[w->scale_codes[block]] * w->scale_absmax[block / QL_SCALE_BLOCK] + w->scale_offset;
}

static inline int64_t ql_groups_per_row(const ql_weight *w) { return (w->k + w->group - 1) / w->group; }

/* bytes of each array of a weight; 0 where it has none */
typedef struct {
    size_t codes, scales, zeros, perm, scale_codes, scale_absmax, scale_map;
} ql_weight_bytes;

static inline ql_weight_bytes ql_bytes_of_weight(const ql_weight *w) {
    ql_weight_bytes bytes = {0, 0, 0, 0, 0, 0, 0};
    size_t count = (size_t)w->n * (size_t)w->k, blocks = 0;
    switch (w->format) {
    case QL_F32: bytes.codes = 4 * count; break;
    case QL_F16: case QL_BF16: bytes.codes = 2 * count; break;
    case QL_INT8: bytes.codes = count, blocks = (size_t)w->n; break;
    case QL_AFFINE:
        bytes.codes = 4 * (size_t)(w->n * ql_words_per_row(w->k, w->bits));
        blocks = (size_t)(w->n * ql_groups_per_row(w));
        break;
    case QL_NF4: case QL_FP4: bytes.codes = (count + 1) / 2, blocks = (count + (size_t)w->group - 1) / (size_t)w->group; break;
    case QL_FORMAT_COUNT: break;
    }
    bytes.scales = w->scales != NULL ? 4 * blocks : 0;
    bytes.zeros = w->zeros != NULL ? blocks : 0;
    bytes.perm = w->perm != NULL ? 4 * (size_t)w->k : 0;
    bytes.scale_codes = w->scale_codes != NULL ? blocks : 0;
    bytes.scale_absmax = w->scale_absmax != NULL ? 4 * ((blocks + QL_SCALE_BLOCK - 1) / QL_SCALE_BLOCK) : 0;
    bytes.scale_map = w->scale_map != NULL ? 256 * 4 : 0;
    return bytes;
}

static inline uint8_t ql_nibble(const void *codes, int64_t flat) {
    uint8_t byte = ((const uint8_t *)codes)[flat >> 1];
    return flat & 1 ? byte & 15 : byte >> 4;
}

/* value of stored element (i, j): stored column j is column perm[j] of W */
static inline float ql_weight_value(const ql_weight *w, int64_t i, int64_t j) {
    int64_t flat = i * w->k + j;
    switch (w->format) {
    case QL_F32: return ql_f32_value(w->codes, flat);
    case QL_F16: return ql_f16_value(w->codes, flat);
    case QL_BF16: return ql_bf16_value(w->codes, flat);
    case QL_INT8: return ql_int8_value(((const int8_t *)w->codes)[flat]) * w->scales[i];
    case QL_AFFINE: {
        const uint32_t *row = (const uint32_t *)w->codes + i * ql_words_per_row(w->k, w->bits);
        int64_t g = i * ql_groups_per_row(w) + j / w->group;
        uint32_t zero = w->zeros != NULL ? w->zeros[g] : ql_affine_symmetric_zero(w->bits);
        return ql_affine_value(ql_code_get(row, j, w->bits), zero) * w->scales[g];
    }
    case QL_NF4: return ql_nf4_values[ql_nibble(w->codes, flat)] * ql_block_scale(w, flat / w->group);
    case QL_FP4: return ql_fp4_values[ql_nibble(w->codes, flat)] * ql_block_scale(w, flat / w->group);
    case QL_FORMAT_COUNT: break;
    }
    return 0.0f;
}

#endif
