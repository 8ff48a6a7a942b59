/* quantize.cu: absmax quantization, bit for bit as csrc/ops/quantize.c: NF4 and FP4 by blocks of the flat tensor, INT8 by rows.
 * Divisions, products and comparisons are those of the CPU, rounded one by one. */
#include "cuda.h"
#include "device.cuh"
#include "weight.cuh"

enum { THREADS = 256, VALUES = 8 };
static const float smallest_absmax = 1e-38f;

/* how many of the 15 ascending thresholds lie below unit, by four comparisons */
template <bool Fp4> __device__ __forceinline__ uint32_t rank_of(float unit) {
    constexpr float nf4[15] = QL_NF4_THRESHOLDS, fp4[15] = QL_FP4_THRESHOLDS;
    auto t = [&](int i) { return Fp4 ? fp4[i] : nf4[i]; };
    bool a = unit > t(7);
    bool b = unit > (a ? t(11) : t(3));
    bool c = unit > (a ? (b ? t(13) : t(9)) : (b ? t(5) : t(1)));
    float last = a ? (b ? (c ? t(14) : t(12)) : (c ? t(10) : t(8))) : (b ? (c ? t(6) : t(4)) : (c ? t(2) : t(0)));
    return 8 * a + 4 * b + 2 * c + (unit > last);
}

template <bool Fp4> __device__ __forceinline__ uint32_t code_of(float unit) {
    uint32_t rank = rank_of<Fp4>(unit);
    if (!Fp4) { return rank; }
    return (rank < 8 ? 0x9efcdabu : 0x32547618u) >> (4 * (rank & 7)) & 15; /* QL_FP4_ORDER, a nibble each */
}

/* ---- 4 bits --------------------------------------------------------------------------------------------------------- */

/* Whole blocks of 8 .. 256 values, a power of two: `group / 8` lanes a block. */
template <bool Fp4> static __global__ void __launch_bounds__(THREADS) quantize_narrow(uint32_t *codes, float *scales, const float4 *x, int64_t blocks, int lanes) {
    int64_t vector = (int64_t)blockIdx.x * THREADS + threadIdx.x, block = vector / lanes;
    ql_cuda_wait_previous();
    float v[VALUES] = {};
    if (block < blocks) {
        float4 a = x[2 * vector], b = x[2 * vector + 1];
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    }
    float absmax = 0.0f;
#pragma unroll
    for (int e = 0; e < VALUES; e++) { absmax = fmaxf(absmax, fabsf(v[e])); }
    for (int i = lanes / 2; i > 0; i /= 2) { absmax = fmaxf(absmax, __shfl_xor_sync(QL_FULL_WARP, absmax, i)); }
    if (block >= blocks) { return; }
    float inverse = __fdiv_rn(1.0f, fmaxf(absmax, smallest_absmax));
    uint32_t word = 0;
#pragma unroll
    for (int e = 0; e < VALUES; e++) { word |= code_of<Fp4>(__fmul_rn(v[e], inverse)) << (8 * (e / 2) + (e % 2 ? 0 : 4)); }
    codes[vector] = word;
    if (vector % lanes == 0) { scales[block] = absmax; }
}

/* Any block size: a thread block for blocks first .. of the tensor, pairs of blocks, so that no byte is shared. */
template <bool Fp4>
static __global__ void __launch_bounds__(THREADS) quantize_any(uint8_t *codes, float *scales, const float *x, int64_t count, int64_t group, int64_t first) {
    __shared__ float scratch[WARP];
    __shared__ float factors[2];
    ql_cuda_wait_previous();
    int64_t blocks = (count + group - 1) / group, pair = first + 2 * (int64_t)blockIdx.x;
    for (int i = 0; i < 2 && pair + i < blocks; i++) {
        int64_t from = (pair + i) * group, size = count - from < group ? count - from : group;
        float absmax = 0.0f;
        for (int64_t e = threadIdx.x; e < size; e += THREADS) { absmax = fmaxf(absmax, fabsf(x[from + e])); }
        absmax = block_max(absmax, scratch);
        if (threadIdx.x == 0) {
            factors[i] = fmaxf(absmax, smallest_absmax);
            scales[pair + i] = size < group ? factors[i] : absmax;
        }
        __syncthreads();
    }
    int64_t from = pair * group, end = from + 2 * group < count ? from + 2 * group : count;
    for (int64_t e = from + 2 * (int64_t)threadIdx.x; e < end; e += 2 * THREADS) {
        uint32_t byte = 0;
        for (int i = 0; i < 2; i++) { /* the element after an odd number of them is zero */
            float value = e + i < count ? x[e + i] : 0.0f, divisor = factors[e + i < end ? (e + i - from) / group : 0];
            bool partial = (pair + 1) * group + (e + i - from) / group * group > count;
            float unit = e + i >= count ? 0.0f : partial ? __fdiv_rn(value, divisor) : __fmul_rn(value, __fdiv_rn(1.0f, divisor));
            byte |= code_of<Fp4>(unit) << (i == 0 ? 4 : 0);
        }
        codes[e / 2] = (uint8_t)byte;
    }
}

template <bool Fp4> static void quantize_4bit(uint8_t *codes, float *scales, const float *x, int64_t count, int64_t group) {
    int64_t narrow = 0; /* whole blocks that the vector kernel takes */
    bool aligned = (uintptr_t)x % 16 == 0 && (uintptr_t)codes % 4 == 0;
    if (aligned && group >= 8 && group <= WARP * VALUES && (group & (group - 1)) == 0) { narrow = count / group; }
    if (narrow > 0) {
        int lanes = (int)(group / VALUES);
        int64_t vectors = narrow * lanes;
        ql_cuda_launch(quantize_narrow<Fp4>, dim3((unsigned)((vectors + THREADS - 1) / THREADS)), dim3(THREADS), 0, true, (uint32_t *)codes, scales,
                       (const float4 *)x, narrow, lanes);
    }
    int64_t rest = (count + group - 1) / group - narrow;
    if (rest > 0) {
        ql_cuda_launch(quantize_any<Fp4>, dim3((unsigned)((rest + 1) / 2)), dim3(THREADS), 0, true, codes, scales, x, count, group, narrow);
    }
}

/* ---- int8 ------------------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ int8_t int8_of(float x, float factor) { return isinf(factor) ? 0 : (int8_t)__float2int_rn(__fmul_rn(x, factor)); }

/* a thread block a row */
static __global__ void __launch_bounds__(THREADS) quantize_rows(int8_t *codes, float *scales, const float *x, int64_t k) {
    __shared__ float scratch[WARP];
    ql_cuda_wait_previous();
    const float *row = x + (int64_t)blockIdx.x * k;
    int8_t *out = codes + (int64_t)blockIdx.x * k;
    float absmax = 0.0f;
    bool vectors = k % 4 == 0 && (uintptr_t)x % 16 == 0 && (uintptr_t)codes % 4 == 0;
    if (vectors) {
        for (int64_t j = 4 * threadIdx.x; j < k; j += 4 * THREADS) {
            float4 v = *(const float4 *)(row + j);
            absmax = fmaxf(absmax, fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))));
        }
    } else {
        for (int64_t j = threadIdx.x; j < k; j += THREADS) { absmax = fmaxf(absmax, fabsf(row[j])); }
    }
    absmax = block_max(absmax, scratch);
    float factor = __fmul_rn(__fdiv_rn(1.0f, absmax), 127.0f);
    if (threadIdx.x == 0) { scales[blockIdx.x] = absmax; }
    if (vectors) {
        for (int64_t j = 4 * threadIdx.x; j < k; j += 4 * THREADS) {
            float4 v = *(const float4 *)(row + j);
            *(char4 *)(out + j) = make_char4(int8_of(v.x, factor), int8_of(v.y, factor), int8_of(v.z, factor), int8_of(v.w, factor));
        }
    } else {
        for (int64_t j = threadIdx.x; j < k; j += THREADS) { out[j] = int8_of(row[j], factor); }
    }
}

extern "C" void ql_quantize_forward_cuda(void *codes, float *scales, const float *x, ql_format format, int64_t count, int64_t group) {
    if (count == 0) { return; }
    switch (format) {
    case QL_NF4: return quantize_4bit<false>((uint8_t *)codes, scales, x, count, group);
    case QL_FP4: return quantize_4bit<true>((uint8_t *)codes, scales, x, count, group);
    default: ql_cuda_launch(quantize_rows, dim3((unsigned)(count / group)), dim3(THREADS), 0, true, (int8_t *)codes, scales, x, group);
    }
}
