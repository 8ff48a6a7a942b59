/* linear_epilogue.cuh: what becomes of the sums of a tile: adapters, the norm, the residual stream, rotary embedding and SwiGLU. */
#ifndef QL_CUDA_LINEAR_EPILOGUE_CUH
#define QL_CUDA_LINEAR_EPILOGUE_CUH

#include "linear_parts.cuh"

/* what the norm multiplies the sums of a token by: the same for all, or floats in shared memory */
struct small_norms {
    float one;
    uint32_t each; /* 0: none */
};

/* what a lane needs for the outputs of tokens `token` and `token` + 1, in all tiles of a part */
struct small_lines {
    void *at[2]; /* the line of each token; NULL: no such token */
    float norm[2];
    int angle[2]; /* SMALL_ROPE: where the angles of its position begin */
    int token;
};

__device__ __forceinline__ small_lines small_lines_of(const small_args &a, const small_part &p, int token, small_norms norms) {
    small_lines lines = {};
    int size = p.output == SMALL_FLOAT || p.output == SMALL_FLOAT_ADD ? 4 : 2;
    lines.token = token;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (token + i >= a.m) { continue; }
        lines.norm[i] = norms.each != 0 ? load_shared<float>(norms.each + 4 * (token + i)) : norms.one;
        lines.at[i] = (char *)p.out + (int64_t)(p.rows != NULL ? p.rows[token + i] : token + i) * p.n * size;
        if (p.output == SMALL_ROPE) { lines.angle[i] = a.positions[token + i] * (a.d / 2); }
    }
    return lines;
}

/* what it needs for rows g and lower g of a tile; fetched ahead of the sums */
struct small_target {
    int row, row_lower;
    float factor, factor_lower, gain, gain_lower; /* gain: of the norm that comes next */
    float old[4]; /* what is added: (token, row), (token, row_lower), (token + 1, ...) */
    float2 angle[2];
};

__device__ __forceinline__ small_target small_aim(const small_args &a, const small_tile &tile, int g, const small_lines &lines) {
    const small_part &p = a.part[tile.part];
    small_target to = {};
    to.row = tile.unit * UNIT_ROWS + g, to.row_lower = to.row + p.lower_rows;
    to.factor = __ldg(p.factor), to.factor_lower = __ldg(p.factor_lower);
    if (a.next.halves != NULL) { to.gain = __ldg(a.next.gain + to.row), to.gain_lower = __ldg(a.next.gain + to.row_lower); }
    if (p.output == SMALL_FLOAT_ADD) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float *old = (const float *)lines.at[i];
            to.old[2 * i] = old != NULL && to.row < p.n ? old[to.row] : 0.0f;
            to.old[2 * i + 1] = old != NULL && to.row_lower < p.n ? old[to.row_lower] : 0.0f;
        }
    }
    if (p.output == SMALL_ROPE) {
        int turn = to.row % a.d;
#pragma unroll
        for (int i = 0; i < 2; i++) { to.angle[i] = make_float2(a.cos[lines.angle[i] + turn], a.sin[lines.angle[i] + turn]); }
    }
    return to;
}

/* A fragment is what the warps of a block hand over of 16 rows and 8 tokens: 16 bytes a lane as the mma leaves it; of a single
 * token 16 floats, rows 0 .. 15. */
template <bool Single> __host__ __device__ constexpr int fragment_bytes() { return Single ? 64 : CHUNK; }

template <bool Single> __device__ __forceinline__ void put_fragment(uint32_t to, int lane, const float (&c)[4]) {
    if (!Single) {
        store_shared(to + lane * 16, make_float4(c[0], c[1], c[2], c[3]));
    } else if (lane % 4 == 0) {
        store_shared(to + lane, c[0]);
        store_shared(to + 32 + lane, c[2]);
    }
}
/* adds `count` fragments that stand `stride` bytes apart, in order; a single token: of row lane % 16, in x */
template <bool Single> __device__ __forceinline__ float4 add_fragments(uint32_t from, int lane, int count, uint32_t stride) {
    if constexpr (Single) {
        float sum = 0.0f;
#pragma unroll 8
        for (int i = lane / 16; i < count; i += 2) { sum += load_shared<float>(from + i * stride + lane % 16 * 4); }
        return make_float4(sum + __shfl_xor_sync(QL_FULL_WARP, sum, 16), 0.0f, 0.0f, 0.0f);
    } else {
        float4 c = load_shared<float4>(from + lane * 16);
#pragma unroll 8
        for (int i = 1; i < count; i++) {
            float4 more = load_shared<float4>(from + i * stride + lane * 16);
            c.x += more.x, c.y += more.y, c.z += more.z, c.w += more.w;
        }
        return c;
    }
}
/* what adapters add to a fragment, all of a warp at once */
template <bool Single> __device__ __forceinline__ void add_terms(small_target &to, const small_args &a, const small_tile &tile, int lane, int nt) {
    const small_part &p = a.part[tile.part];
    int row = tile.unit * UNIT_ROWS + lane / 4, lower = row + p.lower_rows, token = 8 * nt + lane / 4, apart = p.output == SMALL_SWIGLU;
    float c[4] = {};
#pragma unroll 1
    for (int half = 0; half <= apart; half++) {
        const ql_low_rank_term &term = p.term[half];
        const float *b[] = {half == 0 && row < p.n ? term.b + row * term.r : NULL, half == apart && lower < p.n ? term.b + lower * term.r : NULL};
        low_rank_fragment(c, b, token < a.m ? term.u + token * term.line : NULL, term.r, lane);
    }
    if (Single) { /* token 0 is in every fourth lane, rows in order; it goes to the first eight */
        to.old[0] += __shfl_sync(QL_FULL_WARP, c[0], lane % 8 * 4), to.old[1] += __shfl_sync(QL_FULL_WARP, c[2], lane % 8 * 4);
    } else {
        to.old[0] += c[0], to.old[1] += c[2], to.old[2] += c[1], to.old[3] += c[3];
    }
}

/* where a fragment of a tile goes: fragment nt of a part, 8 tokens */
template <bool Single> __device__ __forceinline__ small_lines fragment_lines(const small_args &a, const small_part &p, int lane, int nt, small_norms norms) {
    return small_lines_of(a, p, Single ? (lane < 8 ? 0 : a.m) : 8 * nt + 2 * (lane % 4), norms);
}
template <bool Single>
__device__ __forceinline__ small_target aim_fragment(const small_args &a, const small_tile &tile, const small_lines &lines, int lane, int nt) {
    small_target to = small_aim(a, tile, Single ? lane % 8 : lane / 4, lines);
    if (a.adapted && 8 * nt < a.m) { add_terms<Single>(to, a, tile, lane, nt); }
    return to;
}
/* v: sums of a lane's tokens, of row and row_lower; what the next norm needs is left beside them */
template <int Tokens>
__device__ __forceinline__ void store_values(const small_args &a, const small_tile &tile, const small_lines &lines, const small_target &to, float (&v)[Tokens][2]) {
    const small_part &p = a.part[tile.part];
    bool upper = to.row < p.n, lower = to.row_lower < p.n;
#pragma unroll
    for (int i = 0; i < Tokens; i++) {
        v[i][0] = to.old[2 * i] + v[i][0] * (to.factor * lines.norm[i]), v[i][1] = to.old[2 * i + 1] + v[i][1] * (to.factor_lower * lines.norm[i]);
    }
    if (p.output == SMALL_FLOAT || p.output == SMALL_FLOAT_ADD) {
#pragma unroll
        for (int i = 0; i < Tokens; i++) {
            float *out = (float *)lines.at[i];
            if (out != NULL && upper) { out[to.row] = v[i][0]; }
            if (out != NULL && lower) { out[to.row_lower] = v[i][1]; }
        }
        if (Tokens == 1 || a.next.halves == NULL) { return; } /* a single token is normed on the way */
        bf16 *next = a.next.halves + (int64_t)lines.token * p.n;
        int column = to.row, column_lower = to.row_lower;
        float squares[2] = {};
        if (a.next.ordered) { column = ordered_column(column), column_lower = ordered_column(column_lower); }
#pragma unroll
        for (int i = 0; i < Tokens; i++) {
            if (lines.at[i] == NULL) { continue; }
            next[i * p.n + column] = __float2bfloat16_rn(v[i][0] * to.gain), next[i * p.n + column_lower] = __float2bfloat16_rn(v[i][1] * to.gain_lower);
            squares[i] = v[i][0] * v[i][0] + v[i][1] * v[i][1];
        }
        if (lines.token / 8 * 8 < a.next.line) { put_squares(a.next, tile.unit / 2, lines.token, squares[0], squares[1], threadIdx.x % WARP); }
        return;
    }
    if (p.output == SMALL_SWIGLU) {
        int column = p.ordered ? ordered_column(to.row) : to.row;
#pragma unroll
        for (int i = 0; i < Tokens; i++) {
            if (lines.at[i] != NULL && upper) { ((bf16 *)lines.at[i])[column] = __float2bfloat16_rn(silu_fast(v[i][0]) * v[i][1]); }
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < Tokens; i++) {
        bf16 *out = (bf16 *)lines.at[i];
        if (p.output == SMALL_ROPE) {
            float2 turned = rope_pair(v[i][0], v[i][1], to.angle[i].x, to.angle[i].y);
            v[i][0] = turned.x, v[i][1] = turned.y;
        }
        if (out != NULL && upper) { out[to.row] = __float2bfloat16_rn(v[i][0]); }
        if (out != NULL && lower) { out[to.row_lower] = __float2bfloat16_rn(v[i][1]); }
    }
}
template <bool Single>
__device__ __forceinline__ void store_fragment(const small_args &a, const small_tile &tile, const small_lines &lines, const small_target &to, float4 c) {
    if constexpr (Single) {
        float v[1][2] = {{c.x, __shfl_down_sync(QL_FULL_WARP, c.x, 8)}};
        store_values(a, tile, lines, to, v);
    } else {
        float v[2][2] = {{c.x, c.z}, {c.y, c.w}};
        store_values(a, tile, lines, to, v);
    }
}

#endif
