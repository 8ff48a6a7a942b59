/* activations.cu: activations as the matmul kernels take them: bfloat16, normed where asked, columns in the stored order of
 * the weight, in rows (cuBLAS) or in the blocks of units.cuh. One thread block a token. */
#include "linear.cuh"

enum { PIECE = 8 }; /* values of one 16-byte store */

struct activations_args {
    ql_activations x;
    const int32_t *perm;
    void *out;
    int64_t m, k, x_units;
};

__device__ __forceinline__ float element(const activations_args &a, const float *floats, const bf16 *halves, int64_t j) {
    if (j >= a.k) { return 0.0f; }
    int64_t from = a.perm != NULL ? a.perm[j] : j;
    float v = floats != NULL ? floats[from] : __bfloat162float(halves[from]);
    return a.x.gain != NULL ? v * a.x.gain[from] : v;
}

/* v = columns j .. j + 3 */
__device__ __forceinline__ void elements(float *v, const activations_args &a, const float *floats, const bf16 *halves, int64_t j) {
    if (a.perm != NULL || a.k % 4 != 0 || j + 4 > a.k) {
#pragma unroll
        for (int e = 0; e < 4; e++) { v[e] = element(a, floats, halves, j + e); }
        return;
    }
    if (floats != NULL) {
        float4 x = *(const float4 *)(floats + j);
        v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
    } else {
        uint2 x = *(const uint2 *)(halves + j);
        float2 low = unpack_bf16(x.x), high = unpack_bf16(x.y);
        v[0] = low.x, v[1] = low.y, v[2] = high.x, v[3] = high.y;
    }
    if (a.x.gain != NULL) {
        float4 gain = *(const float4 *)(a.x.gain + j);
        v[0] *= gain.x, v[1] *= gain.y, v[2] *= gain.z, v[3] *= gain.w;
    }
}

/* 1 / sqrt(mean(x^2) + eps), 1 without a gain */
__device__ __forceinline__ float inverse_rms(const activations_args &a, const float *floats, float *scratch) {
    if (a.x.gain == NULL) { return 1.0f; }
    float sum = 0.0f;
    if (a.k % 4 == 0) {
        for (int64_t j = 4 * threadIdx.x; j < a.k; j += 4 * blockDim.x) {
            float4 x = *(const float4 *)(floats + j);
            sum += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
        }
    } else {
        for (int64_t j = threadIdx.x; j < a.k; j += blockDim.x) { sum += floats[j] * floats[j]; }
    }
    sum = block_sum(sum, scratch);
    return 1.0f / sqrtf(sum / (float)a.k + a.x.eps);
}

/* Blocks: token t's pieces lie in x_units blocks; `tokens` of a group of blocks: 1 with a single token, else 8 */
template <bool Blocks> static __global__ void prepare_activations(const activations_args a, int tokens) {
    __shared__ float scratch[WARP];
    ql_cuda_start_next();
    ql_cuda_wait_previous();
    int64_t t = blockIdx.x, pieces = Blocks ? a.x_units * 4 : (a.k + PIECE - 1) / PIECE;
    const float *floats = a.x.floats != NULL ? a.x.floats + t * a.k : NULL;
    const bf16 *halves = a.x.halves != NULL ? a.x.halves + t * a.k : NULL;
    bool inside = t < a.m;
    float inverse = inside ? inverse_rms(a, floats, scratch) : 0.0f;
    for (int64_t i = threadIdx.x; i < pieces; i += blockDim.x) {
        int64_t low = Blocks ? i / 4 * 32 + i % 4 * 4 : i * PIECE, high = Blocks ? low + 16 : low + 4;
        float v[PIECE] = {};
        if (inside) { elements(v, a, floats, halves, low), elements(v + 4, a, floats, halves, high); }
        uint4 packed = make_uint4(pack_bf16(v[0] * inverse, v[1] * inverse), pack_bf16(v[2] * inverse, v[3] * inverse),
                                  pack_bf16(v[4] * inverse, v[5] * inverse), pack_bf16(v[6] * inverse, v[7] * inverse));
        if (Blocks) {
            int64_t block = t / tokens * a.x_units + i / 4;
            ((uint4 *)a.out)[(block * tokens + t % tokens) * 4 + i % 4] = packed;
        } else if (a.k % PIECE == 0) {
            ((uint4 *)((bf16 *)a.out + t * a.k))[i] = packed;
        } else {
            for (int e = 0; e < PIECE && low + e < a.k; e++) { ((bf16 *)a.out)[t * a.k + low + e] = __float2bfloat16_rn(v[e] * inverse); }
        }
    }
}

static dim3 threads_for(int64_t pieces) {
    int64_t threads = (pieces + WARP - 1) / WARP * WARP;
    return dim3((unsigned)(threads > 1024 ? 1024 : threads));
}

void ql_cuda_activations_rows(bf16 *out, const ql_activations *x, const int32_t *perm, int64_t m, int64_t k) {
    activations_args a = {*x, perm, out, m, k, 0};
    ql_cuda_launch(prepare_activations<false>, dim3((unsigned)m), threads_for((k + PIECE - 1) / PIECE), 0, true, a, 1);
}

void ql_cuda_activations_blocks(uint8_t *out, const ql_activations *x, const int32_t *perm, int64_t m, int64_t rows, int64_t k,
                                int64_t x_units) {
    activations_args a = {*x, perm, out, m, k, x_units};
    ql_cuda_launch(prepare_activations<true>, dim3((unsigned)rows), threads_for(x_units * 4), 0, true, a, rows == 1 ? 1 : 8);
}
