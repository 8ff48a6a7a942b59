/* fused.cu: the fused slots that are products: norm + q, k, v + rotary embedding; norm + gate, up + SwiGLU; product + residual.
 * Few tokens: one kernel each after the norm. Many: cuBLAS, then an elementwise kernel. */
#include "linear.cuh"

/* the normed activations in the stored order of w's columns, for cuBLAS; made anew where the order is another than `last` */
static const bf16 *normed_rows(const ql_activations *x, const ql_weight *w, const ql_weight *last, int64_t t) {
    bf16 *rows = (bf16 *)ql_cuda_scratch(QL_SCRATCH_NORM, (size_t)(t * w->k) * sizeof(bf16));
    if (rows != NULL && (last == NULL || last->perm != w->perm)) { ql_cuda_activations_rows(rows, x, w->perm, t, w->k, w->k); }
    return rows;
}

/* ---- q, k, v ------------------------------------------------------------------------------------------------------ */

/* row rows[i] (NULL: i) of out = row i of in, (t, heads, d), turned by the angle of its position where cos is not NULL.
 * Without rows, out may be in. A thread turns two neighbours at a time where half a head has an even size. */
static __global__ void rope_rows(bf16 *out, const bf16 *in, const float *cos, const float *sin, const int32_t *positions,
                                 const int32_t *rows, int64_t heads, int64_t d) {
    ql_cuda_wait_previous();
    int64_t i = blockIdx.x, width = heads * d, half = d / 2, row = rows != NULL ? rows[i] : i;
    const bf16 *from = in + i * width;
    bf16 *to = out + row * width;
    if (cos == NULL) {
        for (int64_t j = threadIdx.x; j < width; j += blockDim.x) { to[j] = from[j]; }
        return;
    }
    int64_t angles = (int64_t)positions[i] * half, pairs = half % 2 == 0 ? heads * half / 2 : 0;
    for (int64_t pair = threadIdx.x; pair < pairs; pair += blockDim.x) {
        int64_t j = 2 * pair, at = j / half * d + j % half;
        float2 low = unpack_bf16(*(const uint32_t *)(from + at)), high = unpack_bf16(*(const uint32_t *)(from + at + half));
        float2 c = *(const float2 *)(cos + angles + j % half), s = *(const float2 *)(sin + angles + j % half);
        float2 first = rope_pair(low.x, high.x, c.x, s.x), second = rope_pair(low.y, high.y, c.y, s.y);
        *(uint32_t *)(to + at) = pack_bf16(first.x, second.x), *(uint32_t *)(to + at + half) = pack_bf16(first.y, second.y);
    }
    for (int64_t j = 2 * pairs + threadIdx.x; j < heads * half; j += blockDim.x) {
        int64_t at = j / half * d + j % half;
        float2 turned = rope_pair(__bfloat162float(from[at]), __bfloat162float(from[at + half]), cos[angles + j % half], sin[angles + j % half]);
        to[at] = __float2bfloat16_rn(turned.x), to[at + half] = __float2bfloat16_rn(turned.y);
    }
}

static void rope_after_product(bf16 *out, const ql_activations *x, const ql_weight *w, const ql_weight *last, const ql_rotation *rotation,
                               const int32_t *rows, int64_t t) {
    const bf16 *h = normed_rows(x, w, last, t);
    bf16 *product = rows == NULL ? out : (bf16 *)ql_cuda_scratch(QL_SCRATCH_FUSED, (size_t)(t * w->n) * sizeof(bf16));
    if (h == NULL || product == NULL) { return; }
    ql_cuda_linear_large(product, CUDA_R_16BF, h, w, t, 0);
    if (rows == NULL && rotation->cos == NULL) { return; } /* it is where it belongs */
    ql_cuda_launch(rope_rows, dim3((unsigned)t), dim3(256), 0, true, out, product, rotation->cos, rotation->sin, rotation->positions, rows,
                   w->n / rotation->d, rotation->d);
}

extern "C" void ql_qkv_forward_cuda(void *q, void *k, void *v, const float *x, const float *gain, const ql_weight *wq, const ql_weight *wk,
                                    const ql_weight *wv, const float *cos, const float *sin, const int32_t *positions,
                                    const int32_t *rows, int64_t t, int64_t hq, int64_t hkv, int64_t d, float eps) {
    (void)hq, (void)hkv; /* they follow from the weights and d */
    ql_activations source = {x, NULL, gain, eps};
    ql_rotation rotation = {cos, sin, positions, d}, none = {NULL, NULL, NULL, d};
    ql_product products[] = {{wq, q, NULL, QL_OUT_ROPE}, {wk, k, rows, QL_OUT_ROPE}, {wv, v, rows, QL_OUT_BF16}};
    if (t == 0 || ql_cuda_linear_small(products, 3, &source, &rotation, t)) { return; }
    rope_after_product((bf16 *)q, &source, wq, NULL, &rotation, NULL, t);
    rope_after_product((bf16 *)k, &source, wk, wq, &rotation, rows, t);
    rope_after_product((bf16 *)v, &source, wv, wk, &none, rows, t);
}

/* ---- gate, up ------------------------------------------------------------------------------------------------------- */

/* gate = swiglu(gate, up), 8 values a thread */
static __global__ void swiglu_vectors(uint4 *gate, const uint4 *up, int64_t vectors) {
    ql_cuda_wait_previous();
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= vectors) { return; }
    uint4 g = gate[i], u = up[i];
    uint32_t *gs = &g.x, *us = &u.x;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        float2 a = unpack_bf16(gs[e]), b = unpack_bf16(us[e]);
        gs[e] = pack_bf16(silu(a.x) * b.x, silu(a.y) * b.y);
    }
    gate[i] = g;
}

static __global__ void swiglu_values(bf16 *gate, const bf16 *up, int64_t first, int64_t count) {
    ql_cuda_wait_previous();
    int64_t i = first + (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) { gate[i] = __float2bfloat16_rn(silu(__bfloat162float(gate[i])) * __bfloat162float(up[i])); }
}

static void swiglu_in_place(bf16 *gate, const bf16 *up, int64_t count) {
    int64_t vectors = (uintptr_t)gate % 16 == 0 ? count / 8 : 0, rest = count - 8 * vectors;
    ql_cuda_launch(swiglu_vectors, dim3((unsigned)((vectors + 255) / 256)), dim3(256), 0, true, (uint4 *)gate, (const uint4 *)up, vectors);
    ql_cuda_launch(swiglu_values, dim3((unsigned)((rest + 255) / 256)), dim3(256), 0, true, gate, up, 8 * vectors, count);
}

extern "C" void ql_gate_up_forward_cuda(void *a, const float *x, const float *gain, const ql_weight *gate, const ql_weight *up, int64_t t,
                                        float eps) {
    ql_activations source = {x, NULL, gain, eps};
    ql_product products[] = {{gate, a, NULL, QL_OUT_SWIGLU}, {up, NULL, NULL, QL_OUT_SWIGLU}};
    if (t == 0 || ql_cuda_linear_small(products, 2, &source, NULL, t)) { return; }
    bf16 *ups = (bf16 *)ql_cuda_scratch(QL_SCRATCH_FUSED, (size_t)(t * up->n) * sizeof(bf16));
    if (ups == NULL) { return; }
    ql_product apart[] = {{gate, a, NULL, QL_OUT_BF16}, {up, ups, NULL, QL_OUT_BF16}}; /* weights that are not alike */
    if (ql_cuda_linear_small(apart, 2, &source, NULL, t)) { return swiglu_in_place((bf16 *)a, ups, t * gate->n); }
    const bf16 *h = normed_rows(&source, gate, NULL, t);
    if (h == NULL) { return; }
    ql_cuda_linear_large(a, CUDA_R_16BF, h, gate, t, 0);
    if ((h = normed_rows(&source, up, gate, t)) == NULL) { return; }
    ql_cuda_linear_large(ups, CUDA_R_16BF, h, up, t, 0);
    swiglu_in_place((bf16 *)a, ups, t * gate->n);
}

/* ---- residual --------------------------------------------------------------------------------------------------------- */

extern "C" void ql_linear_residual_forward_cuda(float *x, const void *a, const ql_weight *w, int64_t t) {
    ql_activations source = {NULL, (const bf16 *)a, NULL, 0.0f};
    ql_product product = {w, x, NULL, QL_OUT_FLOAT_ADD};
    if (t == 0 || ql_cuda_linear_small(&product, 1, &source, NULL, t)) { return; }
    const bf16 *rows = (const bf16 *)a;
    if (w->perm != NULL) {
        bf16 *stored = (bf16 *)ql_cuda_scratch(QL_SCRATCH_ACTIVATION, (size_t)(t * w->k) * sizeof(bf16));
        if (stored == NULL) { return; }
        ql_cuda_activations_rows(stored, &source, w->perm, t, w->k, w->k);
        rows = stored;
    }
    ql_cuda_linear_large(x, CUDA_R_32F, rows, w, t, 1);
}
