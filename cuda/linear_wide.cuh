/* linear_wide.cuh: y = x W^T for many tokens by the warpgroup instructions of sm_90a, W decoded on the way. As in linear_group.cuh the packed
 * weight (units.cuh) is the A operand, decoded into registers, and the tensor cores read the activations from shared memory. But these stream
 * through it with the weights, so that K and the number of tokens are free; and values are scaled, and rounded to bfloat16, before they are
 * multiplied, as where cuBLAS multiplies a decoded weight: so sums stay where they are and the tensor cores need not wait for anything.
 *
 * An item is 128 outputs (eight tiles, one a warp) of 8 Tokens8 tokens. As many as there are for all blocks they take alone; of the others the blocks
 * of a cluster split K. One warp of a block brings the
 * activations, 64 columns a stage, by tensor copies, which swizzle them, one the weights, by bulk copies. What becomes
 * of the sums: linear_wide_store.cuh.
 *
 *   shared: barriers | table | stages of activations (tokens, 64) bf16 | fragments that are added here, of each block | lines of
 *           outputs | stages of weights: records (tile, half, unit) */
#ifndef QL_CUDA_LINEAR_WIDE_CUH
#define QL_CUDA_LINEAR_WIDE_CUH

#include "linear_wide_store.cuh"
#include "tensor_map.h"
#include "wgmma.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* ---- what is brought ---------------------------------------------------------------------------------------------- */

/* weights, by a warp: a lane a tile's half */
template <typename Codes> __device__ __forceinline__ void wide_fetch_weights(const small_args &a, wide_place p) {
    constexpr int together = wide_together<Codes>(), lanes = 2 * WIDE_TILES;
    wide_ring ring = {0, 1}; /* all stages are free at first */
    uint32_t line = together * a.record;
    for (int turn = 0; wide_take(a, p, turn); turn++) {
        small_tile tile = wide_tile(a, p, p.lane % lanes / 2);
        const uint8_t *from = (p.lane % 2 ? tile.lower : tile.upper) + (int64_t)p.k.first * a.record;
        for (int unit = p.k.first; unit < p.k.end; unit += together) {
            uint32_t full = p.base + p.l.weights_full + 8 * ring.stage, bytes = min(together, p.k.end - unit) * a.record;
            barrier_wait(p.base + p.l.weights_free + 8 * ring.stage, ring.phase);
            if (p.lane == 0) { barrier_arrive_expect(full, lanes * bytes); }
            __syncwarp();
            if (p.lane < lanes) { copy_bulk(p.base + p.l.weights + (ring.stage * lanes + p.lane) * line, from, bytes, full); }
            from += bytes;
            wide_advance(ring, a.stages);
        }
    }
}

/* activations, by one lane */
template <typename Codes, int Tokens8> __device__ __forceinline__ void wide_fetch_x(const small_args &a, wide_place p, const ql_tensor_map *map) {
    constexpr uint32_t bytes = 8 * Tokens8 * WIDE_COLUMNS * 2;
    wide_ring ring = {0, 1};
    for (int turn = 0; wide_take(a, p, turn); turn++) {
        int token = p.item % p.across * (8 * Tokens8);
        for (int column = p.k.first * Codes::columns; column < p.k.end * Codes::columns; column += WIDE_COLUMNS) {
            uint32_t full = p.base + p.l.x_full + 8 * ring.stage;
            barrier_wait(p.base + p.l.x_free + 8 * ring.stage, ring.phase);
            barrier_arrive_expect(full, bytes);
            copy_tensor(p.base + p.l.x + ring.stage * bytes, map, column, token, full);
            wide_advance(ring, wide_x_stages<Codes, Tokens8>());
        }
    }
}

/* ---- one unit of the tiles ---------------------------------------------------------------------------------------- */

/* a unit of a warp's tile: the words, and of the rows' first part the scale as it is stored and, in the high half, what is taken from its values */
template <typename Codes> struct wide_words {
    uint32_t upper[Codes::words], lower[Codes::words], part[2], from; /* from: record of the upper half */
};

/* scales and zero points of part `part` */
template <typename Codes> __device__ __forceinline__ void wide_load_part(wide_words<Codes> &w, const small_args &a, int part, int lane) {
    uint32_t at = w.from + Codes::bytes + lane / 4 * 2 + part * 16, lower = wide_together<Codes>() * a.record;
#pragma unroll
    for (int half = 0; half < 2; half++, at += lower) {
        uint32_t zero = a.zeros ? load_shared<uint16_t>(at + a.parts * 16) : Codes::symmetric & 0xffff;
        w.part[half] = load_shared<uint16_t>(at) | zero << 16;
    }
}
template <typename Codes> __device__ __forceinline__ void wide_load(wide_words<Codes> &w, const small_args &a, uint32_t from, int lane) {
    w.from = from;
    load_words<Codes>(w.upper, from, lane);
    load_words<Codes>(w.lower, from + wide_together<Codes>() * a.record, lane);
    wide_load_part<Codes>(w, a, 0, lane);
}

/* a row's scale in both halves, as what bfloat16 has of it and the rest, and what is taken from its values */
struct wide_scale {
    uint32_t high, low, offset;
};
__device__ __forceinline__ wide_scale wide_scale_of(uint32_t part) {
    float scale = half_bits_to_float(part & 0xffff), high = __bfloat162float(__float2bfloat16_rn(scale));
    return {pack_bf16(high, high), pack_bf16(scale - high, scale - high), __byte_perm(part, 0, 0x3232)};
}
/* value scale, rounded once but for what is lost of the product with `low` */
__device__ __forceinline__ uint32_t wide_scaled(uint32_t value, const wide_scale &s) {
    return fma_bf16x2(value, s.high, fma_bf16x2(value, s.low, 0x80008000u));
}

/* What a warpgroup holds of an item. The products of a stage run while the next values are decoded. */
template <int Tokens8> struct wide_state {
    float sums[4 * Tokens8];
    uint32_t fragment[2][WIDE_BATCH][4];
    wide_ring x;   /* the stage that comes next */
    uint32_t held; /* barrier of the stage that is being multiplied; 0: none */
};

/* the unit w times the next stages of activations; next(w) loads the one that follows, once w is decoded */
template <typename Codes, int Tokens8, typename Next>
__device__ __forceinline__ void wide_unit(wide_state<Tokens8> &s, wide_words<Codes> &w, const small_args &a, const wide_place &p, uint32_t table, Next next) {
    constexpr int steps = Codes::columns / STEP;
    wide_scale upper = {}, lower = {};
#pragma unroll
    for (int first = 0; first < steps; first += WIDE_BATCH) {
        uint32_t (&fragment)[WIDE_BATCH][4] = s.fragment[first / WIDE_BATCH % 2];
#pragma unroll
        for (int step = first; step < first + WIDE_BATCH; step++) {
            if (step == 0 || (step % 2 == 0 && (step & ((1 << p.part) - 1)) == 0)) {
                if (step > 0) { wide_load_part<Codes>(w, a, step >> p.part, p.lane); }
                upper = wide_scale_of(w.part[0]), lower = wide_scale_of(w.part[1]);
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                fragment[step - first][2 * half] = wide_scaled(Codes::pair(w.upper, step, half, upper.offset, table), upper);
                fragment[step - first][2 * half + 1] = wide_scaled(Codes::pair(w.lower, step, half, lower.offset, table), lower);
            }
        }
        if (first + WIDE_BATCH == steps) { next(w); }
        uint32_t x = (uint32_t)descriptor(p.base + p.l.x + s.x.stage * (8 * Tokens8 * WIDE_COLUMNS * 2), 16);
        barrier_wait(p.base + p.l.x_full + 8 * s.x.stage, s.x.phase);
        products_begin();
#pragma unroll
        for (int i = 0; i < WIDE_BATCH; i++) { multiply_units<Tokens8>(s.sums, fragment[i], x + i * (STEP * 2 / 16), 1); }
        products_commit();
        products_wait<1>(); /* those ahead of them */
        if (s.held != 0) { warp_arrive(s.held, p.lane); }
        s.held = p.base + p.l.x_free + 8 * s.x.stage;
        wide_advance(s.x, wide_x_stages<Codes, Tokens8>());
    }
}

/* ---- the kernel ------------------------------------------------------------------------------------------------------ */

template <typename Codes, int Tokens8> __device__ __forceinline__ wide_place wide_start(const small_args &a, const void *shared) {
    wide_place p;
    int blocks = cluster_size(), thread = threadIdx.x;
    p.warp = __shfl_sync(QL_FULL_WARP, threadIdx.x / WARP, 0); /* the same in all lanes: descriptors stay in uniform registers */
    p.cluster = __ffs(blocks) - 1, p.block = cluster_rank(), p.lane = threadIdx.x % WARP;
    p.part = __ffs(Codes::columns / STEP / a.parts) - 1;
    p.across = (a.m + 8 * Tokens8 - 1) / (8 * Tokens8);
    p.items = (a.tiles + WIDE_TILES - 1) / WIDE_TILES * p.across;
    p.base = (shared_address(shared) + 1023) & ~1023u;
    p.l = wide_layout_of<Codes, Tokens8>(a.stages, a.record);
    if (thread < wide_x_stages<Codes, Tokens8>()) {
        barrier_init(p.base + p.l.x_full + 8 * thread, 1), barrier_init(p.base + p.l.x_free + 8 * thread, warp_arrivals(WIDE_TILES));
    }
    if (thread < a.stages) {
        barrier_init(p.base + p.l.weights_full + 8 * thread, 1), barrier_init(p.base + p.l.weights_free + 8 * thread, warp_arrivals(WIDE_TILES));
    }
    if (thread < WIDE_TILES) {
        for (int round = 0; round < 2; round++) {
            barrier_init(wide_received_full(p, round, thread), 1), barrier_init(wide_received_free(p, round, thread), max(blocks - 1, 1));
        }
    }
    barrier_init_fence();
    return p;
}

template <typename Codes, int Tokens8> __device__ __forceinline__ void wide_multiply(const small_args &a, wide_place p, uint32_t table) {
    constexpr int together = wide_together<Codes>();
    wide_ring weights = {0, 0}, x = {0, 0};
    uint32_t mine = p.base + p.l.weights + 2 * p.warp * together * a.record, stage_bytes = 2 * WIDE_TILES * together * a.record;
    int round = 0;
    for (int turn = 0; wide_take(a, p, turn); turn++) {
        wide_state<Tokens8> s = {};
        wide_words<Codes> w; /* not loaded ahead from turn to turn: between them registers are few */
        if (turn == a.alone && p.shift > 0) { wide_open(p), round = 0; }
        s.x = x;
        barrier_wait(p.base + p.l.weights_full + 8 * weights.stage, weights.phase);
        wide_load<Codes>(w, a, mine + weights.stage * stage_bytes, p.lane);
#pragma unroll 1
        for (int u = p.k.first; u < p.k.end; u++) {
            bool last = u + 1 == p.k.end, in_stage = together > 1 && (u - p.k.first) % together + 1 < together && !last;
            wide_unit<Codes, Tokens8>(s, w, a, p, table, [&](wide_words<Codes> &next) {
                if (in_stage) { return wide_load<Codes>(next, a, next.from + a.record, p.lane); }
                warp_arrive(p.base + p.l.weights_free + 8 * weights.stage, p.lane);
                wide_advance(weights, a.stages);
                if (last) { return; }
                barrier_wait(p.base + p.l.weights_full + 8 * weights.stage, weights.phase);
                wide_load<Codes>(next, a, mine + weights.stage * stage_bytes, p.lane);
            });
        }
        products_wait<0>();
        pin(s.sums);
        if (s.held != 0) { warp_arrive(s.held, p.lane); }
        x = s.x;
        wide_finish<Tokens8>(a, p, round, s.sums);
    }
}

template <typename Codes, int Tokens8> __device__ __forceinline__ void wide_body(const small_args &a, const ql_tensor_map *map) {
    extern __shared__ __align__(128) uint8_t shared[];
    wide_place p = wide_start<Codes, Tokens8>(a, shared);
    uint32_t table = p.base + p.l.table;
    cluster_arrive();
    __syncthreads();
    ql_cuda_start_next();
    if (p.warp >= WIDE_TILES) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        cluster_wait();
        if (p.warp == WIDE_TILES + 1) { wide_fetch_weights<Codes>(a, p); }
        ql_cuda_wait_previous();
        if (p.warp == WIDE_TILES && p.lane == 0) { wide_fetch_x<Codes, Tokens8>(a, p, map); }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        if (Codes::table) { /* while the first weights are on their way */
            fill_table(table, a, WIDE_TILES * WARP);
            block_barrier(2, WIDE_TILES * WARP);
        }
        cluster_wait();
        ql_cuda_wait_previous();
        wide_multiply<Codes, Tokens8>(a, p, table);
    }
}

#endif

template <typename Codes, int Tokens8>
__global__ void __launch_bounds__(WIDE_THREADS, 1) small_wide(const __grid_constant__ small_args a, const __grid_constant__ ql_tensor_map map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    wide_body<Codes, Tokens8>(a, &map);
#else
    __trap(); /* not chosen: linear_packed.cu */
#endif
}

#endif
