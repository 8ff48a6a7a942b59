/* decode.cu: a stored weight as float32 (bit for bit the CPU's values) or as bfloat16 for cuBLAS. */
#include "linear.cuh"
#include "weight.cuh"

enum { VALUES = 8, THREADS = 128, VECTORS = 4 }; /* values a vector; vectors a thread */

/* 8 codes from stored column j, a multiple of 8, where rows are whole vectors */
template <int format, int bits> __device__ __forceinline__ uint2 load_codes(const ql_weight &w, int64_t i, int64_t j) {
    if constexpr (format == QL_AFFINE && bits == 3) {
        const uint8_t *at = (const uint8_t *)((const uint32_t *)w.codes + i * ql_words_per_row(w.k, 3)) + j / 8 * 3;
        return make_uint2(at[0] | at[1] << 8 | at[2] << 16, 0);
    } else if constexpr (format == QL_AFFINE && bits == 2) {
        return make_uint2(((const uint16_t *)((const uint32_t *)w.codes + i * ql_words_per_row(w.k, 2)))[j / 8], 0);
    } else if constexpr (bits == 4) {
        const uint32_t *row = format == QL_AFFINE ? (const uint32_t *)w.codes + i * ql_words_per_row(w.k, 4) : (const uint32_t *)w.codes + i * (w.k / 8);
        return make_uint2(row[j / 8], 0);
    } else {
        return *(const uint2 *)((const uint8_t *)w.codes + i * w.k + j); /* 8 bits: rows of k bytes */
    }
}

template <int format, int bits> __device__ __forceinline__ float value_of(uint2 q, int e, uint32_t zero, const float *table) {
    if constexpr (format == QL_AFFINE) {
        uint32_t code = bits == 8 ? (e < 4 ? q.x >> (8 * e) : q.y >> (8 * e - 32)) : q.x >> (bits * e);
        return ql_affine_value(code & ((1u << bits) - 1), zero);
    } else if constexpr (format == QL_INT8) {
        return ql_int8_value((int8_t)((e < 4 ? q.x >> (8 * e) : q.y >> (8 * e - 32)) & 255));
    } else {
        return table[q.x >> (8 * (e / 2) + (e % 2 ? 0 : 4)) & 15];
    }
}

__device__ __forceinline__ void store_values(float *out, const float (&v)[VALUES]) {
    ((float4 *)out)[0] = make_float4(v[0], v[1], v[2], v[3]);
    ((float4 *)out)[1] = make_float4(v[4], v[5], v[6], v[7]);
}
__device__ __forceinline__ void store_values(bf16 *out, const float (&v)[VALUES]) {
    *(uint4 *)out = make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
}

template <int format> __device__ __forceinline__ float scale_of(const ql_weight &w, int64_t i, int64_t j, int64_t groups, uint32_t &zero) {
    if constexpr (format == QL_INT8) {
        return w.scales[i];
    } else if constexpr (format == QL_AFFINE) {
        int64_t g = i * groups + (uint32_t)j / (uint32_t)w.group;
        zero = w.zeros != NULL ? w.zeros[g] : ql_affine_symmetric_zero(w.bits);
        return w.scales[g];
    } else {
        return block_scale(w, i * groups + (uint32_t)j / (uint32_t)w.group);
    }
}

/* rows i0 .. i1 and all columns; k a multiple of 8, groups whole vectors, NF4 and FP4: blocks whole rows' parts */
template <typename Out, int format, int bits>
static __global__ void __launch_bounds__(THREADS) decode_vectors(Out *out, int64_t ld, const ql_weight w, int64_t i0, int64_t i1) {
    __shared__ float table[16];
    if ((format == QL_NF4 || format == QL_FP4) && threadIdx.x < 16) { table[threadIdx.x] = (format == QL_NF4 ? nf4_values : fp4_values)[threadIdx.x]; }
    if (format == QL_NF4 || format == QL_FP4) { __syncthreads(); }
    ql_cuda_wait_previous();
    int64_t groups = (w.k + w.group - 1) / w.group;
    for (int64_t i = i0 + blockIdx.y; i < i1; i += gridDim.y) {
        uint2 codes[VECTORS];
        float scale[VECTORS];
        uint32_t zero[VECTORS] = {};
        int64_t first = ((int64_t)blockIdx.x * THREADS * VECTORS + threadIdx.x) * VALUES;
#pragma unroll
        for (int u = 0; u < VECTORS; u++) {
            int64_t j = first + u * THREADS * VALUES;
            if (j < w.k) { codes[u] = load_codes<format, bits>(w, i, j), scale[u] = scale_of<format>(w, i, j, groups, zero[u]); }
        }
#pragma unroll
        for (int u = 0; u < VECTORS; u++) {
            int64_t j = first + u * THREADS * VALUES;
            if (j >= w.k) { break; }
            float v[VALUES];
#pragma unroll
            for (int e = 0; e < VALUES; e++) { v[e] = __fmul_rn(value_of<format, bits>(codes[u], e, zero[u], table), scale[u]); }
            store_values(out + (i - i0) * ld + j, v);
        }
    }
}

__device__ __forceinline__ void store_value(float *out, float v) { *out = v; }
__device__ __forceinline__ void store_value(bf16 *out, float v) { *out = __float2bfloat16_rn(v); }

/* any format, any range */
template <typename Out>
static __global__ void decode_elements(Out *out, int64_t ld, const ql_weight w, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    ql_cuda_wait_previous();
    for (int64_t i = i0 + blockIdx.y; i < i1; i += gridDim.y) {
        for (int64_t j = j0 + (int64_t)blockIdx.x * blockDim.x + threadIdx.x; j < j1; j += (int64_t)gridDim.x * blockDim.x) {
            store_value(out + (i - i0) * ld + (j - j0), weight_value(w, i, j));
        }
    }
}

template <typename Out, int format, int bits> static void launch_vectors(Out *out, int64_t ld, const ql_weight *w, int64_t i0, int64_t i1) {
    int64_t columns = THREADS * VECTORS * VALUES, rows = i1 - i0 < 65535 ? i1 - i0 : 65535;
    dim3 grid((unsigned)((w->k + columns - 1) / columns), (unsigned)rows);
    ql_cuda_launch(decode_vectors<Out, format, bits>, grid, dim3(THREADS), 0, true, out, ld, *w, i0, i1);
}

/* true where rows are whole vectors, and a vector has one scale */
static bool has_vectors(const ql_weight *w) {
    if (w->k % VALUES != 0 || w->k > INT32_MAX || w->group > INT32_MAX) { return false; }
    switch (w->format) {
    case QL_INT8: return true;
    case QL_AFFINE: return (w->bits == 2 || w->bits == 3 || w->bits == 4 || w->bits == 8) && (w->group % VALUES == 0 || w->group >= w->k);
    case QL_NF4: case QL_FP4: return w->group % VALUES == 0 && w->k % w->group == 0;
    default: return false;
    }
}

template <typename Out> static void decode_rows(Out *out, int64_t ld, const ql_weight *w, int64_t i0, int64_t i1) {
    switch (w->format) {
    case QL_INT8: return launch_vectors<Out, QL_INT8, 8>(out, ld, w, i0, i1);
    case QL_NF4: return launch_vectors<Out, QL_NF4, 4>(out, ld, w, i0, i1);
    case QL_FP4: return launch_vectors<Out, QL_FP4, 4>(out, ld, w, i0, i1);
    default: break;
    }
    switch (w->bits) {
    case 2: return launch_vectors<Out, QL_AFFINE, 2>(out, ld, w, i0, i1);
    case 3: return launch_vectors<Out, QL_AFFINE, 3>(out, ld, w, i0, i1);
    case 4: return launch_vectors<Out, QL_AFFINE, 4>(out, ld, w, i0, i1);
    default: return launch_vectors<Out, QL_AFFINE, 8>(out, ld, w, i0, i1);
    }
}

template <typename Out>
static void decode(Out *out, int64_t ld, const ql_weight *w, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    if (i1 <= i0 || j1 <= j0) { return; }
    bool aligned = (uintptr_t)out % 16 == 0 && ld * sizeof(Out) % 16 == 0;
    if (j0 == 0 && j1 == w->k && aligned && has_vectors(w)) { return decode_rows(out, ld, w, i0, i1); }
    int64_t blocks = (j1 - j0 + 255) / 256, rows = i1 - i0 < 65535 ? i1 - i0 : 65535;
    dim3 grid((unsigned)(blocks < 1024 ? blocks : 1024), (unsigned)rows);
    ql_cuda_launch(decode_elements<Out>, grid, dim3(256), 0, true, out, ld, *w, i0, i1, j0, j1);
}

extern "C" void ql_decode_forward_cuda(float *out, int64_t ld, const ql_weight *w, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    decode(out, ld, w, i0, i1, j0, j1);
}

void ql_cuda_dequantize(bf16 *out, const ql_weight *w, int64_t i0, int64_t i1) { decode(out, w->k, w, i0, i1, 0, w->k); }
