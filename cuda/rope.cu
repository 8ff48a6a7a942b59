/* rope.cu: rotary position embedding, half-split layout, in place: a thread turns `width` neighbouring pairs of a head. */
#include "cuda.h"
#include "device.cuh"

/* grid (t, parts of a token) */
template <int width>
static __global__ void rope_kernel(float *x, const float *cosines, const float *sines, const int32_t *positions, int heads,
                                   int half) {
    int index = (int)(blockIdx.y * blockDim.x + threadIdx.x), per_head = half / width;
    ql_cuda_wait_previous();
    ql_cuda_start_next();
    if (index >= heads * per_head) { return; }
    int head = index / per_head, i = index % per_head * width;
    float *low = x + ((int64_t)blockIdx.x * heads + head) * 2 * half + i, *high = low + half;
    int64_t angle = (int64_t)positions[blockIdx.x] * half + i;
    float a[width], b[width], c[width], s[width];
    if (width == 4) {
        *(float4 *)a = *(const float4 *)low, *(float4 *)b = *(const float4 *)high;
        *(float4 *)c = *(const float4 *)(cosines + angle), *(float4 *)s = *(const float4 *)(sines + angle);
    } else {
        a[0] = *low, b[0] = *high, c[0] = cosines[angle], s[0] = sines[angle];
    }
#pragma unroll
    for (int j = 0; j < width; j++) {
        float2 turned = rope_pair(a[j], b[j], c[j], s[j]);
        a[j] = turned.x, b[j] = turned.y;
    }
    if (width == 4) {
        *(float4 *)low = *(float4 *)a, *(float4 *)high = *(float4 *)b;
    } else {
        *low = a[0], *high = b[0];
    }
}

template <int width>
static void launch(float *x, const float *cosines, const float *sines, const int32_t *positions, int64_t t, int64_t heads,
                   int64_t half) {
    int64_t count = heads * (half / width), threads = count < 256 ? (count + WARP - 1) / WARP * WARP : 256;
    dim3 grid((unsigned)t, (unsigned)((count + threads - 1) / threads));
    ql_cuda_launch(rope_kernel<width>, grid, dim3((unsigned)threads), 0, true, x, cosines, sines, positions, heads, half);
}

extern "C" void ql_rope_forward_cuda(float *x, const float *cosines, const float *sines, const int32_t *positions, int64_t t,
                                     int64_t heads, int64_t d) {
    if (t == 0 || heads == 0 || d < 2) { return; }
    bool aligned = d % 8 == 0 && ((uintptr_t)x | (uintptr_t)cosines | (uintptr_t)sines) % 16 == 0;
    (aligned ? launch<4> : launch<1>)(x, cosines, sines, positions, t, heads, d / 2);
}
