/* activations.cu: activations as the matmul kernels take them: bfloat16, normed where asked, columns in the stored order of
 * the weight. One thread block a token. */
#include "linear.cuh"

enum { PIECE = 8 }; /* values of one 16-byte store */

struct activations_args {
    ql_activations x;
    const int32_t *perm;
    bf16 *out;
    int64_t m, k, line; /* length of a line of out */
    int vectors;        /* four values can be read at once */
    int ordered;        /* each column to its ordered_column; a line is then a multiple of 32 */
};

/* columns j .. j + 7 of a line of out, pairs of them; j a multiple of 8 */
__device__ __forceinline__ void store_piece(const activations_args &a, bf16 *out, int64_t j, uint4 pairs) {
    if (!a.ordered) {
        *(uint4 *)(out + j) = pairs;
        return;
    }
    uint32_t *to = (uint32_t *)(out + (j & ~31) + (j >> 2 & 6)); /* ordered_column of j; that of j + 2 p is 8 p further */
    to[0] = pairs.x, to[4] = pairs.y, to[8] = pairs.z, to[12] = pairs.w;
}

__device__ __forceinline__ float element(const activations_args &a, const float *floats, const bf16 *halves, int64_t j) {
    if (j >= a.k) { return 0.0f; }
    int64_t from = a.perm != NULL ? a.perm[j] : j;
    float v = floats != NULL ? floats[from] : __bfloat162float(halves[from]);
    return a.x.gain != NULL ? v * a.x.gain[from] : v;
}

/* v = columns j .. j + 3 */
__device__ __forceinline__ void elements(float *v, const activations_args &a, const float *floats, const bf16 *halves, int64_t j) {
    if (!a.vectors || a.perm != NULL || j + 4 > a.k) {
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
    if (a.vectors) {
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

static __global__ void prepare_activations(const activations_args a) {
    __shared__ float scratch[WARP];
    ql_cuda_start_next();
    ql_cuda_wait_previous();
    int64_t t = blockIdx.x;
    const float *floats = a.x.floats != NULL ? a.x.floats + t * a.k : NULL;
    const bf16 *halves = a.x.halves != NULL ? a.x.halves + t * a.k : NULL;
    bf16 *out = a.out + t * a.line;
    float inverse = inverse_rms(a, floats, scratch);
    for (int64_t j = PIECE * threadIdx.x; j < a.line; j += PIECE * blockDim.x) {
        float v[PIECE];
        elements(v, a, floats, halves, j), elements(v + 4, a, floats, halves, j + 4);
        if (a.line % PIECE == 0) {
            store_piece(a, out, j, make_uint4(pack_bf16(v[0] * inverse, v[1] * inverse), pack_bf16(v[2] * inverse, v[3] * inverse),
                                              pack_bf16(v[4] * inverse, v[5] * inverse), pack_bf16(v[6] * inverse, v[7] * inverse)));
            continue;
        }
        for (int e = 0; e < PIECE && j + e < a.line; e++) { out[j + e] = __float2bfloat16_rn(v[e] * inverse); }
    }
}

/* the same of normed float32 rows of at most PIECE values a thread: each is read once, the gain before the kernel ahead has ended */
static __global__ void prepare_normed(const activations_args a) {
    __shared__ float scratch[WARP];
    int64_t j = PIECE * threadIdx.x;
    bool there = j < a.k;
    float4 gain[2], x[2] = {};
    ql_cuda_start_next();
#pragma unroll
    for (int i = 0; i < 2; i++) { gain[i] = there ? __ldg((const float4 *)(a.x.gain + j) + i) : make_float4(0, 0, 0, 0); }
    ql_cuda_wait_previous();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (there) { x[i] = *((const float4 *)(a.x.floats + blockIdx.x * a.k + j) + i); }
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; i++) { sum += x[i].x * x[i].x + x[i].y * x[i].y + x[i].z * x[i].z + x[i].w * x[i].w; }
    float inverse = 1.0f / sqrtf(block_sum(sum, scratch) / (float)a.k + a.x.eps);
    uint32_t v[4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        v[2 * i] = pack_bf16(x[i].x * gain[i].x * inverse, x[i].y * gain[i].y * inverse);
        v[2 * i + 1] = pack_bf16(x[i].z * gain[i].z * inverse, x[i].w * gain[i].w * inverse);
    }
    if (there) { store_piece(a, a.out + blockIdx.x * a.line, j, make_uint4(v[0], v[1], v[2], v[3])); }
}

/* a thread turns 32 columns, 4 x 4 pairs of them, round */
static __global__ void order_columns(uint32_t *rows, int64_t count) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    ql_cuda_wait_previous();
    if (i >= count) { return; }
    uint32_t pair[16];
#pragma unroll
    for (int p = 0; p < 16; p++) { pair[p] = rows[16 * i + p]; }
#pragma unroll
    for (int p = 0; p < 16; p++) { rows[16 * i + ordered_column(2 * p) / 2] = pair[p]; }
}

void ql_cuda_order_columns(bf16 *rows, int64_t m, int64_t k) {
    int64_t count = m * k / 32;
    ql_cuda_launch(order_columns, dim3((unsigned)((count + 127) / 128)), dim3(128), 0, true, (uint32_t *)rows, count);
}

void ql_cuda_activations_rows(bf16 *out, const ql_activations *x, const int32_t *perm, int64_t m, int64_t k, int64_t line,
                              int ordered) {
    uintptr_t addresses = (uintptr_t)x->floats | (uintptr_t)x->halves | (uintptr_t)x->gain;
    activations_args a = {*x, perm, out, m, k, line, k % 4 == 0 && addresses % 16 == 0, ordered};
    int64_t threads = ((line + PIECE - 1) / PIECE + WARP - 1) / WARP * WARP;
    bool whole = x->gain != NULL && perm == NULL && a.vectors && k % PIECE == 0 && k == line && threads <= 1024;
    ql_cuda_launch(whole ? prepare_normed : prepare_activations, dim3((unsigned)m), dim3((unsigned)(threads > 1024 ? 1024 : threads)), 0, true, a);
}
