/* linear_small.cuh: y = x W^T for 1 to 16 tokens, bound by reading W: the packed weight (units.cuh) is the A operand of
 * mma.m16n8k16, 8 tokens the B operand, the sums are float32. Codes become exact integers (or table values) in bf16; the scale of a
 * group multiplies the float32 sum of the group. Tiles: linear_parts.cuh; what becomes of the sums: linear_epilogue.cuh.
 *
 * ring      Persistent blocks. A producer warp copies stages (`warps` * `units` units of each half of a tile) into a ring in
 *           shared memory by bulk copies; `warps` consumer warps each take `units` units of K, so they split K; their partial
 *           sums go through shared memory to the finishing warps, which add them in order while the next tile runs. In a
 *           cluster each block takes a part of K, and a block adds the sums of its tiles from all blocks of the cluster.
 *           Activations lie in shared memory; they arrive in chunks of K, so that the first tile starts with the first chunk.
 *           Those of a single token may come as float32 and be normed on the way.
 * register  A block a tile (or several, one after the other); each warp loads all its units of a tile at once into
 *           registers. For small matrices, and for devices without bulk copies.
 * Both load weights before they wait for the kernel ahead of them, and let the next kernel start as soon as they run. */
#ifndef QL_CUDA_LINEAR_SMALL_CUH
#define QL_CUDA_LINEAR_SMALL_CUH

#include "linear_epilogue.cuh"

/* ---- one unit pair: 16 rows x columns ------------------------------------------------------------------------- */

/* sums += unit pair * x. Parts: scales a row and unit (0: known only at run time); x_at(b, nt) gives the lane's activations
 * of steps 2 b and 2 b + 1; scale_at(part, half) the scale, offset_at(part, half) the zero point */
template <typename Codes, int Tokens8, int Parts, typename X, typename Scale, typename Offset>
__device__ __forceinline__ void unit_pair(float (&sums)[Tokens8][4], const uint32_t (&wu)[Codes::words], const uint32_t (&wl)[Codes::words],
                                          int parts, uint32_t table, X x_at, Scale scale_at, Offset offset_at) {
    constexpr int steps = Codes::columns / STEP;
    constexpr int chains = Tokens8 == 1 ? 2 : 1; /* sums that do not wait for one another */
    int steps_a_part = Parts > 0 ? steps / Parts : steps / (parts > 0 ? parts : 1);
    float part_sums[chains][Tokens8][4];
    uint32_t offset_u = Codes::symmetric, offset_l = Codes::symmetric;
    uint4 x[Tokens8];
    int part = 0;
#pragma unroll
    for (int j = 0; j < steps; j++) {
        if (j % 2 == 0) {
#pragma unroll
            for (int nt = 0; nt < Tokens8; nt++) { x[nt] = x_at(j / 2, nt); }
        }
        if (j % steps_a_part == 0) {
            offset_u = offset_at(part, 0), offset_l = offset_at(part, 1);
#pragma unroll
            for (int e = 0; e < chains * Tokens8 * 4; e++) { (&part_sums[0][0][0])[e] = 0.0f; }
        }
        uint32_t a[4] = {Codes::pair(wu, j, 0, offset_u, table), Codes::pair(wl, j, 0, offset_l, table),
                         Codes::pair(wu, j, 1, offset_u, table), Codes::pair(wl, j, 1, offset_l, table)};
#pragma unroll
        for (int nt = 0; nt < Tokens8; nt++) {
            mma_units(part_sums[j % chains][nt], a, j % 2 ? x[nt].z : x[nt].x, j % 2 ? x[nt].w : x[nt].y);
        }
        if ((j + 1) % steps_a_part == 0) {
            float su = scale_at(part, 0), sl = scale_at(part, 1);
#pragma unroll
            for (int e = 0; e < Tokens8 * 4; e++) {
                float sum = part_sums[0][e / 4][e % 4] + (chains == 2 ? part_sums[chains - 1][e / 4][e % 4] : 0.0f);
                sums[e / 4][e % 4] += (e % 4 < 2 ? su : sl) * sum;
            }
            part++;
        }
    }
}

/* a table in shared memory for byte -> pair of bf16, a copy a lane, by the block's first `threads` threads; each stores copies of four lanes at once */
__device__ __forceinline__ void fill_table(uint32_t table, const small_args &a, int threads) {
    for (int i = threadIdx.x; i < 256 * WARP / 4; i += threads) {
        int byte = i / (WARP / 4);
        uint32_t pair = (uint32_t)a.values[byte & 15] | (uint32_t)a.values[byte >> 4] << 16;
        store_shared(table + i * 16, make_uint4(pair, pair, pair, pair));
    }
}

/* ---- register kernel ------------------------------------------------------------------------------------------- */

/* units: of K, a warp; warp w of W takes units w, w + W, ... */
template <typename Codes, int Parts> struct small_unit {
    uint32_t upper[Codes::words], lower[Codes::words];
    uint32_t scale[Parts > 0 ? Parts : 1], offset[Parts > 0 ? Parts : 1]; /* upper in the low half, lower in the high half */
};

template <typename Codes, int Parts>
__device__ __forceinline__ void load_unit(small_unit<Codes, Parts> &u, const small_args &a, const small_tile &tile, int unit, int lane) {
    if (unit >= a.units) {
#pragma unroll
        for (int i = 0; i < Codes::words; i++) { u.upper[i] = u.lower[i] = 0; }
#pragma unroll
        for (int i = 0; i < Parts; i++) { u.scale[i] = 0, u.offset[i] = 0; }
        return;
    }
    const uint8_t *upper = tile.upper + (int64_t)unit * a.record, *lower = tile.lower + (int64_t)unit * a.record;
    load_words<Codes>(u.upper, upper, lane);
    load_words<Codes>(u.lower, lower, lane);
    int place = Codes::bytes + lane / 4 * 2;
#pragma unroll
    for (int i = 0; i < Parts; i++) {
        u.scale[i] = __ldg((const uint16_t *)(upper + place + 16 * i)) | (uint32_t)__ldg((const uint16_t *)(lower + place + 16 * i)) << 16;
        u.offset[i] = 0;
        if (a.zeros) {
            int zero = place + 16 * (Parts + i);
            u.offset[i] = __ldg((const uint16_t *)(upper + zero)) | (uint32_t)__ldg((const uint16_t *)(lower + zero)) << 16;
        }
    }
}

/* Single: one token, activations of one row. Units: of K a warp holds of a tile. The block has ceil(units / Units) warps. */
template <typename Codes, int Tokens8, bool Single, int Parts, int Units>
__device__ __forceinline__ void small_register_body(const small_args &a) {
    extern __shared__ __align__(128) uint8_t shared[];
    int warps = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    uint32_t base = shared_address(shared), table = base;
    uint32_t partial = base + (Codes::table ? TABLE_BYTES : 0);
    small_tile tile = locate_tile(a, blockIdx.x);
    small_unit<Codes, Parts> u[Units];
#pragma unroll
    for (int i = 0; i < Units; i++) { load_unit<Codes, Parts>(u[i], a, tile, warp + i * warps, lane); }
    if (Codes::table) {
        fill_table(table, a, blockDim.x);
        __syncthreads();
    }
    ql_cuda_start_next();
    ql_cuda_wait_previous();
    const bf16 *x = a.x + (Single ? 0 : (int64_t)g * a.x_line) + 8 * t;
    bool known_row = Single || g < a.m; /* Tokens8 is 1 */
    int parity = 0;
    for (int index = blockIdx.x; index < a.tiles; index += gridDim.x) {
        float sums[Tokens8][4] = {};
        small_tile next = index + (int)gridDim.x < a.tiles ? locate_tile(a, index + gridDim.x) : tile;
#pragma unroll
        for (int i = 0; i < Units; i++) {
            int unit = warp + i * warps, known = unit < a.units ? unit : 0;
            auto x_at = [&](int b, int) {
                return known_row ? *(const uint4 *)(x + known * Codes::columns + b * TWO_STEPS) : make_uint4(0, 0, 0, 0);
            };
            auto scale_at = [&](int part, int half) { return half_bits_to_float(half ? u[i].scale[part] >> 16 : u[i].scale[part] & 0xffffu); };
            auto offset_at = [&](int part, int half) {
                return a.zeros ? __byte_perm(u[i].offset[part], 0, half ? 0x3232 : 0x1010) : Codes::symmetric;
            };
            unit_pair<Codes, Tokens8, Parts>(sums, u[i].upper, u[i].lower, Parts, table, x_at, scale_at, offset_at);
            if (index + (int)gridDim.x < a.tiles) { load_unit<Codes, Parts>(u[i], a, next, unit, lane); }
        }
        constexpr int bytes = fragment_bytes<Single>();
        uint32_t buffer = partial + parity * warps * Tokens8 * bytes;
#pragma unroll
        for (int nt = 0; nt < Tokens8; nt++) { put_fragment<Single>(buffer + (nt * warps + warp) * bytes, lane, sums[nt]); }
        small_lines lines;
        small_target to;
        auto aim = [&](int nt) {
            lines = fragment_lines<Single>(a, a.part[tile.part], lane, nt, {1.0f, 0}), to = aim_fragment<Single>(a, tile, lines, lane, nt);
        };
        if (warp < Tokens8) { aim(warp); }
        __syncthreads();
        for (int nt = warp; nt < Tokens8; nt += warps) {
            if (nt != warp) { aim(nt); }
            store_fragment<Single>(a, tile, lines, to, add_fragments<Single>(buffer + nt * warps * bytes, lane, warps, bytes));
        }
        tile = next, parity ^= 1;
    }
}

/* ---- ring kernel ------------------------------------------------------------------------------------------------ */

/* where things are in shared memory: barriers, table, norm, activations, partial sums of warps, sums of other blocks, stages */
struct small_layout {
    uint32_t full, empty, x_full, sums_full, sums_empty, tile_full; /* barriers, 8 bytes each */
    uint32_t table, norm, x, x_line, sums, tile_sums, stages, bytes;
};
enum { SMALL_MAX_STAGES = 16, SMALL_X_CHUNKS = 16, SMALL_MAX_OWNED = 64, SMALL_X_PAD = 64, SMALL_MAX_FINISHERS = 2 };

/* units: of K, of a block. owned: tiles that one block of a cluster adds up, 0 without clusters.
 * Lines of activations are padded so that 64 bytes of two lines, as a quarter of a warp reads them, are in different banks. */
template <typename Codes, int Tokens8, bool Single, int Warps, int Units>
__host__ __device__ inline small_layout small_ring_layout(int stages, int record, int units, int cluster, int owned) {
    constexpr uint32_t fragments = Tokens8 * fragment_bytes<Single>();
    small_layout l;
    l.full = 0, l.empty = l.full + 8 * SMALL_MAX_STAGES, l.x_full = l.empty + 8 * SMALL_MAX_STAGES;
    l.sums_full = l.x_full + 8 * SMALL_X_CHUNKS, l.sums_empty = l.sums_full + 16, l.tile_full = l.sums_empty + 16;
    l.norm = (l.tile_full + 8 * owned + 15) / 16 * 16;
    l.table = (l.norm + (Single ? 4 * Warps : norms_bytes(SMALL_MAX_FINISHERS, 8 * Tokens8)) + 127) / 128 * 128;
    l.x = l.table + (Codes::table ? (uint32_t)TABLE_BYTES : 0u);
    l.x_line = (uint32_t)(units * Codes::columns * 2 + SMALL_X_PAD);
    l.sums = (l.x + (Single ? 1u : 8u * Tokens8) * l.x_line + 127) / 128 * 128;
    l.tile_sums = l.sums + 2 * Warps * fragments;
    l.stages = (l.tile_sums + owned * cluster * fragments + 127) / 128 * 128;
    l.bytes = l.stages + (uint32_t)(stages * 2 * Warps * Units * record);
    return l;
}

#ifdef QL_HAS_BULK_COPY

/* the units of K of one block of a cluster of 2^shift */
struct small_range {
    int first, end;
};
__device__ __forceinline__ small_range small_units_of(int units, int rank, int shift) { return {units * rank >> shift, units * (rank + 1) >> shift}; }

/* units of K whose activations arrive together: whole stages */
template <int Warps, int Units> __device__ __forceinline__ int small_chunk(small_range k) {
    int stages = (k.end - k.first + Warps * Units - 1) / (Warps * Units);
    return (stages + SMALL_X_CHUNKS - 1) / SMALL_X_CHUNKS * Warps * Units;
}

/* Activations of this block's part of K, by one lane of each finishing warp: warp `self` brings every Finishers-th token, and the first says how
 * much is to come (bytes may be there before that is said: the barrier waits for both). */
template <typename Codes, int Warps, int Units, int Finishers>
__device__ __forceinline__ void small_fetch_x(const small_args &a, uint32_t base, const small_layout &l, small_range k, int self) {
    int chunk = small_chunk<Warps, Units>(k);
    for (int u = k.first, i = 0; u < k.end; u += chunk, i++) {
        uint32_t bytes = (uint32_t)min(chunk, k.end - u) * Codes::columns * 2, barrier = base + l.x_full + 8 * i;
        if (self == 0) { barrier_arrive_expect(barrier, a.m * bytes); }
#pragma unroll 1
        for (int token = self; token < a.m; token += Finishers) {
            copy_bulk(base + l.x + token * l.x_line + (u - k.first) * Codes::columns * 2, a.x + (int64_t)token * a.x_line + u * Codes::columns,
                      bytes, barrier);
        }
    }
}

/* four stored columns from column j on of a token, or of its gain; zeros beyond k. Vector: they lie side by side, aligned. */
__device__ __forceinline__ float4 small_four(const float *from, const small_args &a, int j, bool vector) {
    if (vector && j < a.k) { return *(const float4 *)(from + j); }
    float v[4] = {};
#pragma unroll
    for (int e = 0; e < 4 && !vector; e++) {
        if (j + e < a.k) { v[e] = from[a.perm != NULL ? a.perm[j + e] : j + e]; }
    }
    return make_float4(v[0], v[1], v[2], v[3]);
}

/* A single token from float32, times the gain, by all consumer warps, `AHEAD` loads of a lane at once; the first gains are there before the kernel
 * ahead has ended. The mean of squares is left in parts at l.norm: the finishing warps multiply the sums by what follows from it. */
template <typename Codes, int Warps>
__device__ __forceinline__ void small_make_x(const small_args &a, uint32_t base, const small_layout &l, small_range k, int warp, int lane) {
    enum { AHEAD = 4, COLUMNS = 4 * Warps * WARP };
    float squares = 0.0f;
    int first = k.first * Codes::columns, end = k.end * Codes::columns;
    bool vector = a.perm == NULL && a.k % 4 == 0 && ((uintptr_t)a.floats | (uintptr_t)a.gain) % 16 == 0;
    int from = a.gain != NULL ? 0 : first, to = a.gain != NULL ? a.x_line : end; /* the norm is over all of the token */
    for (int column = from; column < to; column += AHEAD * COLUMNS) {
        int j = column + 4 * (warp * WARP + lane);
        float4 x[AHEAD], gain[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) { gain[i] = a.gain != NULL ? small_four(a.gain, a, j + i * COLUMNS, vector) : make_float4(1, 1, 1, 1); }
        if (column == from) { ql_cuda_wait_previous(); }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) { x[i] = small_four(a.floats, a, j + i * COLUMNS, vector); }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int at = j + i * COLUMNS;
            squares += x[i].x * x[i].x + x[i].y * x[i].y + x[i].z * x[i].z + x[i].w * x[i].w;
            if (at < first || at >= end) { continue; }
            uint2 halves = make_uint2(pack_bf16(x[i].x * gain[i].x, x[i].y * gain[i].y), pack_bf16(x[i].z * gain[i].z, x[i].w * gain[i].w));
            store_shared(base + l.x + (at - first) * 2, halves);
        }
    }
    squares = warp_sum(squares);
    if (lane == 0) { store_shared(base + l.norm + 4 * warp, squares); }
}

template <int Warps, int Units>
__device__ __forceinline__ void small_produce(const small_args &a, uint32_t base, const small_layout &l, small_range k, int first, int step) {
    uint64_t policy = policy_evict_first();
    int stage = 0, phase = 0;
    uint32_t half_bytes = Warps * Units * a.record;
    for (int index = first; index < a.tiles; index += step) {
        small_tile tile = locate_tile(a, index);
        for (int u = k.first; u < k.end; u += Warps * Units) {
            barrier_wait(base + l.empty + 8 * stage, phase ^ 1);
            uint32_t bytes = min(Warps * Units, k.end - u) * a.record, full = base + l.full + 8 * stage;
            barrier_arrive_expect(full, 2 * bytes);
            uint32_t to = base + l.stages + stage * 2 * half_bytes;
            copy_bulk_hint(to, tile.upper + (int64_t)u * a.record, bytes, full, policy);
            copy_bulk_hint(to + half_bytes, tile.lower + (int64_t)u * a.record, bytes, full, policy);
            if (++stage == a.stages) { stage = 0, phase ^= 1; }
        }
    }
}

/* sums += the unit pair at `upper` and `lower` in shared memory */
template <typename Codes, int Tokens8, int Parts, typename X>
__device__ __forceinline__ void small_unit_pair(float (&sums)[Tokens8][4], const small_args &a, uint32_t upper, uint32_t lower, uint32_t table,
                                                int lane, X x_at) {
    uint32_t wu[Codes::words], wl[Codes::words], place = Codes::bytes + lane / 4 * 2;
    load_words<Codes>(wu, upper, lane);
    load_words<Codes>(wl, lower, lane);
    auto scale_at = [&](int part, int half) {
        return half_bits_to_float(load_shared<uint16_t>((half ? lower : upper) + place + 16 * part));
    };
    auto offset_at = [&](int part, int half) {
        if (!a.zeros) { return Codes::symmetric; }
        uint32_t zero = load_shared<uint16_t>((half ? lower : upper) + place + 16 * (a.parts + part));
        return zero | zero << 16;
    };
    unit_pair<Codes, Tokens8, Parts>(sums, wu, wl, a.parts, table, x_at, scale_at, offset_at);
}

template <typename Codes, int Tokens8, bool Single, int Parts, int Warps, int Units>
__device__ __forceinline__ void small_consume(const small_args &a, uint32_t base, const small_layout &l, small_range k, int first, int step,
                                              int warp, int lane) {
    constexpr int bytes = fragment_bytes<Single>();
    uint32_t half_bytes = Warps * Units * a.record, x = base + l.x + (Single ? 0 : lane / 4) * l.x_line + lane % 4 * 16;
    int stage = 0, phase = 0, count = 0, chunk = small_chunk<Warps, Units>(k);
    bool arrives = a.floats == NULL;
    for (int index = first; index < a.tiles; index += step, count++) {
        float sums[Tokens8][4] = {};
        for (int u = k.first; u < k.end; u += Warps * Units) {
            if (arrives && count == 0) { barrier_wait(base + l.x_full + 8 * ((u - k.first) / chunk), 0); }
            barrier_wait(base + l.full + 8 * stage, phase);
#pragma unroll
            for (int i = 0; i < Units; i++) {
                int unit = i * Warps + warp;
                if (u + unit >= k.end) { break; }
                uint32_t x_here = x + (u - k.first + unit) * Codes::columns * 2;
                uint32_t upper = base + l.stages + stage * 2 * half_bytes + unit * a.record;
                auto x_at = [&](int b, int nt) { return load_shared<uint4>(x_here + nt * 8 * l.x_line + b * TWO_STEPS * 2); };
                small_unit_pair<Codes, Tokens8, Parts>(sums, a, upper, upper + half_bytes, base + l.table, lane, x_at);
            }
            warp_arrive(base + l.empty + 8 * stage, lane);
            if (++stage == a.stages) { stage = 0, phase ^= 1; }
        }
        int buffer = count & 1;
        barrier_wait(base + l.sums_empty + 8 * buffer, (count >> 1 & 1) ^ 1);
#pragma unroll
        for (int nt = 0; nt < Tokens8; nt++) {
            put_fragment<Single>(base + l.sums + ((buffer * Tokens8 + nt) * Warps + warp) * bytes, lane, sums[nt]);
        }
        warp_arrive(base + l.sums_full + 8 * buffer, lane);
    }
}

/* what the norm multiplies the sums by, for finishing warp `self` of Finishers */
template <bool Single, int Warps, int Finishers>
__device__ __forceinline__ small_norms small_make_norms(const small_args &a, uint32_t base, const small_layout &l, int self, int lane) {
    if (!Single && a.made.halves != NULL) {
        make_norms(base + l.norm, a.made, a.k, a.eps, self, Finishers, lane, 1);
        return {1.0f, base + l.norm};
    }
    if (!Single || a.gain == NULL) { return {1.0f, 0}; }
    float squares = 0.0f;
    for (int i = 0; i < Warps; i++) { squares += load_shared<float>(base + l.norm + 4 * i); }
    return {1.0f / sqrtf(squares / (float)a.k + a.eps), 0};
}

/* Finishing warp `self` of Finishers takes every Finishers-th fragment; in a cluster it hands its sum to the owner of the tile,
 * and adds what came for the tiles of this block at the end. */
template <int Tokens8, bool Single, int Warps, int Finishers>
__device__ __forceinline__ void small_finish(const small_args &a, uint32_t base, const small_layout &l, int first, int step, int self, int lane,
                                             int rank, int cluster, small_norms norms) {
    constexpr int bytes = fragment_bytes<Single>();
    int count = 0, item = 0, part = -1, fragment = 0; /* of `lines`: they seldom change */
    small_lines lines;
    auto aim = [&](small_target &to, const small_tile &tile, int nt) {
        if (tile.part != part || nt != fragment) {
            part = tile.part, fragment = nt;
            lines = fragment_lines<Single>(a, a.part[part], lane, nt, norms);
        }
        to = aim_fragment<Single>(a, tile, lines, lane, nt);
    };
    for (int index = first; index < a.tiles; index += step, count++) {
        int buffer = count & 1;
#pragma unroll 1
        for (int nt = 0; nt < Tokens8; nt++, item++) {
            if (item % Finishers != self) { continue; }
            small_tile tile = {};
            small_target to = {};
            if (cluster == 1) { tile = locate_tile(a, index), aim(to, tile, nt); }
            barrier_wait(base + l.sums_full + 8 * buffer, count >> 1 & 1);
            float4 c = add_fragments<Single>(base + l.sums + (buffer * Tokens8 + nt) * Warps * bytes, lane, Warps, bytes);
            warp_arrive(base + l.sums_empty + 8 * buffer, lane);
            if (cluster == 1) {
                store_fragment<Single>(a, tile, lines, to, c);
                continue;
            }
            int owner = count % cluster, slot = count / cluster;
            uint32_t barrier = cluster_address(base + l.tile_full + 8 * slot, owner);
            uint32_t place = cluster_address(base + l.tile_sums + ((slot * cluster + rank) * Tokens8 + nt) * bytes, owner);
            if (!Single) {
                cluster_store_async(place + lane * 16, c, barrier);
            } else if (lane < 16) {
                cluster_store_async(place + lane * 4, c.x, barrier);
            }
        }
    }
    if (cluster == 1) { return; }
    item = 0;
    for (int i = rank; i < count; i += cluster) {
#pragma unroll 1
        for (int nt = 0; nt < Tokens8; nt++, item++) {
            if (item % Finishers != self) { continue; }
            int slot = i / cluster;
            small_tile tile = locate_tile(a, first + i * step);
            small_target to;
            aim(to, tile, nt);
            barrier_wait(base + l.tile_full + 8 * slot, 0);
            uint32_t from = base + l.tile_sums + (slot * cluster * Tokens8 + nt) * bytes;
            store_fragment<Single>(a, tile, lines, to, add_fragments<Single>(from, lane, cluster, Tokens8 * bytes));
        }
    }
}

template <int Warps, int Fragments>
__device__ __forceinline__ void small_init_barriers(uint32_t base, const small_layout &l, int stages, int owned, uint32_t owned_bytes) {
    for (int i = 0; i < stages; i++) {
        barrier_init(base + l.full + 8 * i, 1);
        barrier_init(base + l.empty + 8 * i, warp_arrivals(Warps));
    }
    for (int i = 0; i < SMALL_X_CHUNKS; i++) { barrier_init(base + l.x_full + 8 * i, 1); }
    for (int i = 0; i < 2; i++) {
        barrier_init(base + l.sums_full + 8 * i, warp_arrivals(Warps));
        barrier_init(base + l.sums_empty + 8 * i, warp_arrivals(Fragments));
    }
    for (int i = 0; i < owned; i++) { barrier_init(base + l.tile_full + 8 * i, 1); }
    barrier_init_fence();
    for (int i = 0; i < owned; i++) { barrier_arrive_expect(base + l.tile_full + 8 * i, owned_bytes); }
}

/* The block has Warps + 1 + Finishers warps: consumers, the producer, the finishers. */
template <typename Codes, int Tokens8, bool Single, int Parts, int Warps, int Units, int Finishers>
__device__ __forceinline__ void small_ring_body(const small_args &a) {
    extern __shared__ __align__(128) uint8_t shared[];
    static_assert(Finishers <= 2 * Tokens8, "or a finishing warp would take a use of its buffer of sums for the next but one");
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int cluster = cluster_size(), shift = __ffs(cluster) - 1, rank = cluster_rank(), first = blockIdx.x >> shift, step = gridDim.x >> shift;
    small_range k = small_units_of(a.units, rank, shift);
    int owned = cluster > 1 ? ((a.tiles + step - 1) / step + cluster - 1) >> shift : 0;
    small_layout l = small_ring_layout<Codes, Tokens8, Single, Warps, Units>(a.stages, a.record, (a.units + cluster - 1) >> shift, cluster, owned);
    uint32_t base = shared_address(shared);
    if (threadIdx.x < WARP && one_lane()) {
        small_init_barriers<Warps, Tokens8>(base, l, a.stages, owned, (uint32_t)(cluster * Tokens8 * fragment_bytes<Single>()));
    }
    if (cluster > 1) { cluster_arrive(); }
    __syncthreads();
    if (cluster > 1) { cluster_wait(); }
    ql_cuda_start_next();
    if (warp == Warps) {
        if (one_lane()) { small_produce<Warps, Units>(a, base, l, k, first, step); }
        __syncwarp();
        ql_cuda_wait_previous();
        return;
    }
    bool makes = Single && a.floats != NULL;
    if (Codes::table && warp < Warps) { /* while the first weights are on their way */
        fill_table(base + l.table, a, Warps * WARP);
        block_barrier(2, Warps * WARP);
    }
    if (warp < Warps && makes) { small_make_x<Codes, Warps>(a, base, l, k, warp, lane); }
    ql_cuda_wait_previous();
    if (warp > Warps && !makes) {
        if (one_lane()) { small_fetch_x<Codes, Warps, Units, Finishers>(a, base, l, k, warp - Warps - 1); }
        __syncwarp();
    }
    if (makes) { block_barrier(1, (Warps + Finishers) * WARP); }
    if (warp < Warps) {
        small_consume<Codes, Tokens8, Single, Parts, Warps, Units>(a, base, l, k, first, step, warp, lane);
    } else {
        int self = warp - Warps - 1;
        small_norms norms = small_make_norms<Single, Warps, Finishers>(a, base, l, self, lane);
        small_finish<Tokens8, Single, Warps, Finishers>(a, base, l, first, step, self, lane, rank, cluster, norms);
    }
}

#endif

/* ---- the kernels ------------------------------------------------------------------------------------------------ */

template <typename Codes, int Tokens8, bool Single, int Parts, int Units, int MaxWarps, int Blocks>
__global__ void __launch_bounds__(MaxWarps *WARP, Blocks) small_register(const __grid_constant__ small_args a) {
    small_register_body<Codes, Tokens8, Single, Parts, Units>(a);
}

template <typename Codes, int Tokens8, bool Single, int Parts, int Warps, int Units, int Finishers, int Blocks>
__global__ void __launch_bounds__((Warps + 1 + Finishers) * WARP, Blocks) small_ring(const __grid_constant__ small_args a) {
#ifdef QL_HAS_BULK_COPY
    small_ring_body<Codes, Tokens8, Single, Parts, Warps, Units, Finishers>(a);
#endif
}

#endif
