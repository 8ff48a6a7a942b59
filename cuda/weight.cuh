/* weight.cuh: ql_weight_value (csrc/formats/weight.h) on the device: one element of a stored weight of any format. */
#ifndef QL_CUDA_WEIGHT_CUH
#define QL_CUDA_WEIGHT_CUH

#include "../csrc/formats/weight.h"

static __device__ __constant__ const float nf4_values[16] = QL_NF4_VALUES;
static __device__ __constant__ const float fp4_values[16] = QL_FP4_VALUES;

static __device__ __forceinline__ float block_scale(const ql_weight &w, int64_t block) {
    if (w.scale_codes == NULL) { return w.scales[block]; }
    return __fadd_rn(__fmul_rn(w.scale_map[w.scale_codes[block]], w.scale_absmax[block / QL_SCALE_BLOCK]), w.scale_offset);
}

/* stored element (i, j), rounded as on the CPU */
static __device__ __forceinline__ float weight_value(const ql_weight &w, int64_t i, int64_t j) {
    int64_t flat = i * w.k + j;
    switch (w.format) {
    case QL_F32: return ql_f32_value(w.codes, flat);
    case QL_F16: return ql_f16_value(w.codes, flat);
    case QL_BF16: return ql_bf16_value(w.codes, flat);
    case QL_INT8: return ql_int8_value(((const int8_t *)w.codes)[flat]) * w.scales[i];
    case QL_AFFINE: {
        const uint32_t *row = (const uint32_t *)w.codes + i * ql_words_per_row(w.k, w.bits);
        int64_t g = i * ((w.k + w.group - 1) / w.group) + j / w.group;
        uint32_t zero = w.zeros != NULL ? w.zeros[g] : ql_affine_symmetric_zero(w.bits);
        return ql_affine_value(ql_code_get(row, j, w.bits), zero) * w.scales[g];
    }
    case QL_NF4:
    case QL_FP4: {
        uint8_t byte = ((const uint8_t *)w.codes)[flat >> 1], code = flat & 1 ? byte & 15 : byte >> 4;
        return (w.format == QL_NF4 ? nf4_values : fp4_values)[code] * block_scale(w, flat / w.group);
    }
    default: return 0.0f;
    }
}

#endif
