/* fused.cu: the fused slots that are products: norm + q, k, v + rotary embedding; norm + gate, up + SwiGLU; product + residual.
 * One kernel each, after that of the norm where the product ahead has not prepared it; where linear_packed.cu takes no more tokens, cuBLAS, then an
 * elementwise kernel. */
#include "linear.cuh"

#include <type_traits>

/* the normed activations in the stored order of w's columns, for cuBLAS; made anew where the order is another than `last` */
static const bf16 *normed_rows(const ql_activations *x, const ql_weight *w, const ql_weight *last, int64_t t) {
    bf16 *rows = (bf16 *)ql_cuda_scratch(QL_SCRATCH_NORM, (size_t)(t * w->k) * sizeof(bf16));
    if (rows != NULL && (last == NULL || last->perm != w->perm)) { ql_cuda_activations_rows(rows, x, w->perm, t, w->k, w->k, 0); }
    return rows;
}

/* where a product of t tokens leaves what `norm` of its n outputs needs: nowhere where one token is normed on the way, and where there are
 * too many for one launch */
static ql_norm_ahead norm_ahead(const ql_norm *norm, int64_t t, int64_t n) {
    ql_norm_ahead ahead = {};
    if (norm == NULL || norm->memory == NULL || t < 2 || t > ql_cuda_norm_ahead_tokens() || n % NORM_BLOCK != 0) { return ahead; }
    ahead.gain = norm->gain, ahead.halves = (bf16 *)norm->memory, ahead.squares = (float *)(ahead.halves + t * n);
    for (ahead.line = 8; ahead.line < t; ahead.line *= 2) {}
    ahead.ordered = ql_cuda_orders(t);
    return ahead;
}

static ql_activations normed(const float *x, const ql_norm *norm, int64_t t, int64_t k) {
    ql_activations source = {x, NULL, norm->gain, norm->eps, {}, 0};
    if (norm->prepared) { source.made = norm_ahead(norm, t, k); }
    return source;
}

/* linear_packed; where no kernel takes all tokens with a prepared norm, again without it */
static bool normed_products(const ql_product *products, int count, ql_activations *x, const ql_rotation *rotation, int64_t t) {
    if (ql_cuda_linear_packed(products, count, x, rotation, t)) { return true; }
    bool prepared = x->made.halves != NULL;
    x->made.halves = NULL;
    return prepared && ql_cuda_linear_packed(products, count, x, rotation, t);
}

/* ---- q, k, v ------------------------------------------------------------------------------------------------------ */

/* row rows[i] (NULL: i) of out = row i of in, (t, width) */
static __global__ void scatter_rows(bf16 *out, const bf16 *in, const int32_t *rows, int64_t width) {
    ql_cuda_wait_previous();
    const bf16 *from = in + blockIdx.x * width;
    bf16 *to = out + rows[blockIdx.x] * width;
    if (width % 8 == 0) {
        for (int64_t j = 8 * threadIdx.x; j < width; j += 8 * blockDim.x) { *(uint4 *)(to + j) = *(const uint4 *)(from + j); }
        return;
    }
    for (int64_t j = threadIdx.x; j < width; j += blockDim.x) { to[j] = from[j]; }
}

/* the same, (t, heads, d), turned by the angle of the position; Pairs at once: d / 2 is a multiple of it */
template <int Pairs>
static __global__ void rope_rows(bf16 *out, const bf16 *in, const float *cos, const float *sin, const int32_t *positions,
                                 const int32_t *rows, int heads, int d) {
    typedef typename std::conditional<Pairs == 4, uint2, bf16>::type vector;
    ql_cuda_wait_previous();
    int64_t i = blockIdx.x, row = rows != NULL ? rows[i] : i;
    int half = d / 2;
    const bf16 *from = in + i * heads * d;
    bf16 *to = out + row * heads * d;
    const float *c = cos + (int64_t)positions[i] * half, *s = sin + (int64_t)positions[i] * half;
    for (int j = Pairs * threadIdx.x; j < heads * half; j += Pairs * blockDim.x) {
        int angle = j % half, at = j / half * d + angle;
        vector low = *(const vector *)(from + at), high = *(const vector *)(from + at + half);
        bf16 *a = (bf16 *)&low, *b = (bf16 *)&high;
#pragma unroll
        for (int e = 0; e < Pairs; e++) {
            float2 turned = rope_pair(__bfloat162float(a[e]), __bfloat162float(b[e]), c[angle + e], s[angle + e]);
            a[e] = __float2bfloat16_rn(turned.x), b[e] = __float2bfloat16_rn(turned.y);
        }
        *(vector *)(to + at) = low, *(vector *)(to + at + half) = high;
    }
}

/* The product p of the normed x. An adapter's term goes first: the weight's sum then begins with it, and is rounded once. */
static void product_rows(const ql_product *p, const ql_activations *x, const ql_weight *last, const ql_rotation *rotation, int64_t t) {
    const ql_weight *w = p->w;
    const int32_t *rows = p->rows;
    const bf16 *h = normed_rows(x, w, last, t);
    bf16 *out = (bf16 *)p->out;
    bf16 *product = rows == NULL ? out : (bf16 *)ql_cuda_scratch(QL_SCRATCH_FUSED, (size_t)(t * w->n) * sizeof(bf16));
    if (h == NULL || product == NULL) { return; }
    bool adapted = p->term.r > 0;
    if (adapted) { ql_cuda_set_term(product, &p->term, t, w->n); }
    ql_cuda_linear_large(product, CUDA_R_16BF, h, w, t, adapted);
    if (p->output == QL_OUT_ROPE) {
        int d = (int)rotation->d, heads = (int)(w->n / d);
        bool vectors = d % 8 == 0 && (uintptr_t)out % 8 == 0;
        ql_cuda_launch(vectors ? rope_rows<4> : rope_rows<1>, dim3((unsigned)t), dim3(256), 0, true, out, product, rotation->cos, rotation->sin,
                       rotation->positions, rows, heads, d);
    } else if (rows != NULL) {
        ql_cuda_launch(scatter_rows, dim3((unsigned)t), dim3(256), 0, true, out, product, rows, w->n);
    }
}

extern "C" void ql_qkv_forward_cuda(void *q, void *k, void *v, const float *x, const ql_norm *norm, const ql_weight *wq, const ql_weight *wk,
                                    const ql_weight *wv, const ql_low_rank *l, const float *cos, const float *sin,
                                    const int32_t *positions, const int32_t *rows, int64_t t, int64_t hq, int64_t hkv, int64_t d) {
    (void)hq, (void)hkv; /* they follow from the weights and d */
    ql_activations source = normed(x, norm, t, wq->k);
    ql_rotation rotation = {cos, sin, positions, d};
    ql_low_rank_term term[3];
    if (t == 0 || !ql_cuda_low_rank_terms(term, &source, l, 3, t, wq->k)) { return; }
    ql_product products[] = {
        {wq, q, NULL, QL_OUT_ROPE, 0, term[0], {}}, {wk, k, rows, QL_OUT_ROPE, 0, term[1], {}}, {wv, v, rows, QL_OUT_BF16, 0, term[2], {}}};
    if (normed_products(products, 3, &source, &rotation, t)) { return; }
    for (int i = 0; i < 3; i++) { product_rows(&products[i], &source, i > 0 ? products[i - 1].w : NULL, &rotation, t); }
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

extern "C" void ql_gate_up_forward_cuda(void *a, const float *x, const ql_norm *norm, const ql_weight *gate, const ql_weight *up,
                                        const ql_low_rank *l, int64_t t, int ordered) {
    ql_activations source = normed(x, norm, t, gate->k);
    ql_low_rank_term term[2];
    if (t == 0 || !ql_cuda_low_rank_terms(term, &source, l, 2, t, gate->k)) { return; }
    ql_product products[] = {{gate, a, NULL, QL_OUT_SWIGLU, ordered, term[0], {}}, {up, NULL, NULL, QL_OUT_SWIGLU, 0, term[1], {}}};
    if (normed_products(products, 2, &source, NULL, t)) { return; }
    bf16 *ups = (bf16 *)ql_cuda_scratch(QL_SCRATCH_FUSED, (size_t)(t * up->n) * sizeof(bf16));
    if (ups == NULL) { return; }
    ql_product apart[] = {{gate, a, NULL, QL_OUT_BF16, 0, term[0], {}}, {up, ups, NULL, QL_OUT_BF16, 0, term[1], {}}}; /* weights that are not alike */
    if (!ql_cuda_linear_packed(apart, 2, &source, NULL, t)) {
        for (int i = 0; i < 2; i++) { product_rows(&apart[i], &source, i > 0 ? gate : NULL, NULL, t); }
    }
    swiglu_in_place((bf16 *)a, ups, t * gate->n);
    if (ordered) { ql_cuda_order_columns((bf16 *)a, t, gate->n); }
}

/* ---- residual --------------------------------------------------------------------------------------------------------- */

extern "C" void ql_linear_residual_forward_cuda(float *x, const void *a, const ql_weight *w, const ql_low_rank *l, ql_norm *next, int64_t t,
                                                int ordered) {
    ql_activations source = {NULL, (const bf16 *)a, NULL, 0.0f, {}, ordered};
    ql_low_rank_term term;
    if (next != NULL) { next->prepared = 0; }
    if (t == 0 || !ql_cuda_low_rank_terms(&term, &source, l, 1, t, w->k)) { return; }
    ql_product product = {w, x, NULL, QL_OUT_FLOAT_ADD, 0, term, norm_ahead(next, t, w->n)};
    if (ql_cuda_linear_packed(&product, 1, &source, NULL, t)) {
        if (product.next.halves != NULL) { next->prepared = 1; }
        return;
    }
    product.next.halves = NULL;
    if (ql_cuda_linear_packed(&product, 1, &source, NULL, t)) { return; }
    const bf16 *rows = (const bf16 *)a;
    if (w->perm != NULL) {
        bf16 *stored = (bf16 *)ql_cuda_scratch(QL_SCRATCH_ACTIVATION, (size_t)(t * w->k) * sizeof(bf16));
        if (stored == NULL) { return; }
        ql_cuda_activations_rows(stored, &source, w->perm, t, w->k, w->k, 0);
        rows = stored;
    }
    ql_cuda_linear_large(x, CUDA_R_32F, rows, w, t, 1);
    if (term.r > 0) { ql_cuda_add_term(x, &term, t, w->n); }
}
