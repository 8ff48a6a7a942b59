/* linear_group.cuh: y = x W^T for up to 64 tokens by the warpgroup instructions of sm_90a. As in linear_small.cuh the packed weight
 * (units.cuh) is the A operand, decoded into registers, and groups are scaled in float32; but the activations are read from shared
 * memory by the tensor cores, 64 rows of W at a time, so that more tokens cost little.
 *
 * An item is 64 outputs: four tiles, one a warp of a warpgroup. The blocks of a cluster split K; each holds its part of the
 * activations for the whole launch, and its warpgroups take the items of the cluster in turn, free of one another. A warp brings
 * its own weights, `stages` times group_units units of both halves of its tile, by bulk copies. Fragments (16 rows x 8 tokens) of
 * an item's sums are dealt out to the blocks of the cluster, where a finishing warp adds them in order and stores them while the
 * warpgroup goes on.
 *
 *   shared: barriers | table | activations (columns / 64, tokens, 64) bf16 | sums of two items a warpgroup, from all blocks | stages
 *
 * Activations are swizzled as the descriptors say: rows of 128 bytes, 16-byte chunk c of row r at c ^ (r % 8). The columns of 16 stand in
 * the order of the fragments of units.cuh: of 8 columns at 32 i + 8 t, pairs 0 and 1 are bytes 4 t of chunks 4 i and 4 i + 1, pairs
 * 2 and 3 those of chunks 4 i + 2 and 4 i + 3. */
#ifndef QL_CUDA_LINEAR_GROUP_CUH
#define QL_CUDA_LINEAR_GROUP_CUH

#include "linear_small.cuh"
#include "wgmma.cuh"

enum { GROUP_THREADS = 128, GROUP_WARPS = 4, GROUP_MAX_STAGES = 8, GROUP_BLOCK = 64 /* columns of a swizzled row */ };

template <typename Codes> __host__ __device__ constexpr int group_units() { return (int)Codes::bytes > (int)CHUNK ? 1 : 2; } /* of a stage and half: about 1 KB */

template <int Tokens8> __host__ __device__ constexpr int group_buffers() { return Tokens8 > 4 ? 1 : 2; } /* of sums of an item */

struct group_layout {
    uint32_t full, sums_full, sums_free, table, x, sums, stages, bytes;
};

/* units: of K, of a block; the bytes count what aligning the start may take */
template <typename Codes, int Tokens8, int Groups>
__host__ __device__ inline group_layout group_layout_of(int stages, int record, int units, int cluster) {
    constexpr int warps = Groups * GROUP_WARPS, fragments = GROUP_WARPS * Tokens8, buffers = group_buffers<Tokens8>();
    group_layout l;
    l.full = 0, l.sums_full = l.full + 8 * warps * GROUP_MAX_STAGES, l.sums_free = l.sums_full + 8 * buffers * Groups;
    l.table = (l.sums_free + 8 * buffers * Groups + 127) / 128 * 128;
    l.x = (l.table + (Codes::table ? (uint32_t)TABLE_BYTES : 0u) + 1023) / 1024 * 1024;
    l.sums = l.x + (uint32_t)(units * Codes::columns * 8 * Tokens8 * 2);
    l.stages = l.sums + (uint32_t)(Groups * buffers * (fragments > cluster ? fragments : cluster) * CHUNK);
    l.bytes = l.stages + (uint32_t)(stages * warps * 2 * group_units<Codes>() * record) + 1024;
    return l;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* where a thread stands */
struct group_place {
    uint32_t base;
    int cluster, rank, first, step; /* items of the cluster: first, first + step, ... */
    int items, group, warp, member, lane;
    small_range k;
    group_layout l;
};

/* ---- weights: each warp for itself ---------------------------------------------------------------------------- */

struct group_fetch {
    int item, unit, stage; /* what comes next, and where it goes */
    small_tile tile;
};

__device__ __forceinline__ small_tile group_tile(const small_args &a, int tile) { return locate_tile(a, min(tile, a.tiles - 1)); }

template <typename Codes, int Groups> __device__ __forceinline__ void group_fetch_stage(group_fetch &f, const small_args &a, const group_place &p) {
    constexpr int units = group_units<Codes>();
    if (f.item >= p.items) { return; }
    if (f.unit == p.k.first) { f.tile = group_tile(a, f.item * GROUP_WARPS + p.member); }
    if (p.lane == 0) {
        uint32_t full = p.base + p.l.full + 8 * (p.warp * GROUP_MAX_STAGES + f.stage), half = units * a.record;
        uint32_t bytes = min(units, p.k.end - f.unit) * a.record, to = p.base + p.l.stages + (p.warp * a.stages + f.stage) * 2 * half;
        barrier_arrive_expect(full, 2 * bytes);
        copy_bulk(to, f.tile.upper + (int64_t)f.unit * a.record, bytes, full);
        copy_bulk(to + half, f.tile.lower + (int64_t)f.unit * a.record, bytes, full);
    }
    if ((f.unit += units) >= p.k.end) { f.unit = p.k.first, f.item += Groups * p.step; }
    if (++f.stage == a.stages) { f.stage = 0; }
}

/* ---- activations ------------------------------------------------------------------------------------------------ */

/* this block's columns of all tokens, zeros from token m on: a warp takes 64 columns of 4 tokens at a time */
template <int Tokens8> __device__ __forceinline__ void group_load_x(const small_args &a, uint32_t to, int column, int columns) {
    constexpr int quads = 2 * Tokens8, ahead = 8;
    int warps = blockDim.x / WARP, lane = threadIdx.x % WARP, v = lane % 8, count = quads * (columns / GROUP_BLOCK);
    for (int first = threadIdx.x / WARP; first < count; first += ahead * warps) {
        uint4 x[ahead];
#pragma unroll
        for (int i = 0; i < ahead; i++) {
            int piece = first + i * warps, token = piece % quads * 4 + lane / 8;
            bool there = piece < count && token < a.m;
            const bf16 *from = a.x + (int64_t)token * a.x_line + column + piece / quads * GROUP_BLOCK + 8 * v;
            x[i] = there ? *(const uint4 *)from : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < ahead; i++) {
            int piece = first + i * warps, token = piece % quads * 4 + lane / 8;
            uint32_t row = to + (piece / quads * 8 * Tokens8 + token) * 128 + v % 4 * 4, chunk = v / 4 * 4, turn = token % 8;
            if (piece >= count) { break; }
            store_shared(row + ((chunk ^ turn) * 16), x[i].x);
            store_shared(row + (((chunk + 1) ^ turn) * 16), x[i].y);
            store_shared(row + (((chunk + 2) ^ turn) * 16), x[i].z);
            store_shared(row + (((chunk + 3) ^ turn) * 16), x[i].w);
        }
    }
}

/* ---- one unit of four tiles --------------------------------------------------------------------------------------- */

/* What a warpgroup holds of an item: `product` is of the last group of columns and may still be in the tensor cores, as may the
 * fragments; the next ones are decoded meanwhile. */
template <int Tokens8, int Batch> struct group_state {
    float sums[4 * Tokens8], product[4 * Tokens8], scale_u, scale_l;
    uint32_t fragment[2][Batch][4];
};

template <typename Codes, int Parts> __host__ __device__ constexpr int group_part_steps() { return Parts > 0 ? Codes::columns / STEP / Parts : 2; }
template <typename Codes, int Parts> __host__ __device__ constexpr int group_batch() { /* steps that are decoded at once */
    return group_part_steps<Codes, Parts>() < 4 ? group_part_steps<Codes, Parts>() : 4;
}

/* sums += scales * product, once it is there */
template <int Tokens8, int Batch> __device__ __forceinline__ void group_scale(group_state<Tokens8, Batch> &s) {
    products_wait<0>();
    pin(s.product);
#pragma unroll
    for (int e = 0; e < 4 * Tokens8; e++) { s.sums[e] = fmaf(e % 4 < 2 ? s.scale_u : s.scale_l, s.product[e], s.sums[e]); }
}

/* the units at `upper` and `lower` times the activations at x; Parts: scales a row and unit (0: known at run time) */
template <typename Codes, int Tokens8, int Parts, int Batch>
__device__ __forceinline__ void group_unit(group_state<Tokens8, Batch> &s, const small_args &a, uint32_t upper, uint32_t lower, uint32_t x,
                                           uint32_t table, int lane) {
    constexpr int steps = Codes::columns / STEP, part_steps = group_part_steps<Codes, Parts>();
    uint32_t wu[Codes::words], wl[Codes::words], place = Codes::bytes + lane / 4 * 2;
    load_words<Codes>(wu, upper, lane);
    load_words<Codes>(wl, lower, lane);
#pragma unroll
    for (int first = 0; first < steps; first += Batch) {
        int part = Parts > 0 ? first / part_steps : first * a.parts / steps;
        uint32_t offset_u = Codes::symmetric, offset_l = Codes::symmetric, (&fragment)[Batch][4] = s.fragment[first / Batch % 2];
        if (a.zeros) {
            uint32_t zero = place + 16 * (a.parts + part);
            offset_u = load_shared<uint16_t>(upper + zero) * 0x10001u, offset_l = load_shared<uint16_t>(lower + zero) * 0x10001u;
        }
#pragma unroll
        for (int i = 0; i < Batch; i++) {
            fragment[i][0] = Codes::pair(wu, first + i, 0, offset_u, table), fragment[i][1] = Codes::pair(wl, first + i, 0, offset_l, table);
            fragment[i][2] = Codes::pair(wu, first + i, 1, offset_u, table), fragment[i][3] = Codes::pair(wl, first + i, 1, offset_l, table);
        }
        if (first % part_steps == 0) {
            group_scale(s);
            s.scale_u = half_bits_to_float(load_shared<uint16_t>(upper + place + 16 * part));
            s.scale_l = half_bits_to_float(load_shared<uint16_t>(lower + place + 16 * part));
        }
        products_wait<0>(); /* what was decoded while they ran is ready */
        products_begin();
#pragma unroll
        for (int i = 0; i < Batch; i++) {
            int step = first + i;
            multiply_units<Tokens8>(s.product, fragment[i], x + (step / 4 * (1024 * Tokens8) + step % 4 * 32) / 16, step % part_steps > 0);
        }
        products_commit();
    }
}

/* ---- sums of an item ------------------------------------------------------------------------------------------------ */

/* fragments of an item that block `rank` adds: rank, rank + cluster, ... */
template <int Tokens8> __device__ __forceinline__ int group_share(int rank, int cluster) {
    return (GROUP_WARPS * Tokens8 - rank + cluster - 1) / cluster;
}
/* place of a sum of block `block` */
template <int Tokens8> __device__ __forceinline__ uint32_t group_sums_at(const group_place &p, int buffer, int block, int slot) {
    int most = max(GROUP_WARPS * Tokens8, p.cluster), slots = group_share<Tokens8>(0, p.cluster);
    return p.base + p.l.sums + ((p.group * group_buffers<Tokens8>() + buffer) * most + block * slots + slot) * CHUNK;
}
template <int Tokens8> __device__ __forceinline__ uint32_t group_full(const group_place &p, int buffer) {
    return p.base + p.l.sums_full + 8 * (p.group * group_buffers<Tokens8>() + buffer);
}
template <int Tokens8> __device__ __forceinline__ uint32_t group_free(const group_place &p, int buffer) {
    return p.base + p.l.sums_free + 8 * (p.group * group_buffers<Tokens8>() + buffer);
}

/* sums of the warpgroup's count'th item to the blocks that add them, once those have added what was in the buffer */
template <int Tokens8> __device__ __forceinline__ void group_send(const group_place &p, int count, const float (&sums)[4 * Tokens8]) {
    constexpr int buffers = group_buffers<Tokens8>();
    int buffer = count % buffers;
    if (count >= buffers) { barrier_wait_cluster(group_free<Tokens8>(p, buffer), (count / buffers - 1) & 1); }
#pragma unroll
    for (int nt = 0; nt < Tokens8; nt++) {
        int fragment = p.member * Tokens8 + nt, owner = fragment % p.cluster;
        uint32_t place = cluster_address(group_sums_at<Tokens8>(p, buffer, p.rank, fragment / p.cluster), owner);
        float4 v = make_float4(sums[4 * nt], sums[4 * nt + 1], sums[4 * nt + 2], sums[4 * nt + 3]);
        cluster_store_async(place + p.lane * 16, v, cluster_address(group_full<Tokens8>(p, buffer), owner));
    }
}

/* Finishing warp `self` of Finishers adds and stores this block's fragments of every Finishers-th item, GROUP_AIMED at a time. */
template <int Tokens8, int Groups, int Finishers> __device__ __forceinline__ void group_finish(const small_args &a, group_place p, int self) {
    enum { GROUP_AIMED = 2 };
    constexpr int buffers = group_buffers<Tokens8>();
    int share = group_share<Tokens8>(p.rank, p.cluster), index = self;
    uint32_t stride = group_share<Tokens8>(0, p.cluster) * CHUNK;
    for (int item = p.first + self * p.step; item < p.items; item += Finishers * p.step, index += Finishers) {
        int count = index / Groups, buffer = count % buffers;
        p.group = index % Groups;
        for (int slot = 0; slot < share || slot == 0; slot += GROUP_AIMED) {
            small_tile tile[GROUP_AIMED];
            small_target to[GROUP_AIMED];
#pragma unroll
            for (int i = 0; i < GROUP_AIMED; i++) {
                int fragment = (slot + i) * p.cluster + p.rank, place = item * GROUP_WARPS + fragment / Tokens8;
                bool there = slot + i < share && place < a.tiles;
                tile[i] = group_tile(a, place);
                to[i] = aim_fragment<false>(a, tile[i], p.lane, there ? fragment % Tokens8 : Tokens8, 1.0f); /* Tokens8: none */
            }
            if (slot == 0) { barrier_wait_cluster(group_full<Tokens8>(p, buffer), count / buffers & 1); }
#pragma unroll
            for (int i = 0; i < GROUP_AIMED; i++) {
                if (slot + i >= share) { break; }
                store_fragment<false>(a, tile[i], to[i], add_fragments<false>(group_sums_at<Tokens8>(p, buffer, 0, slot + i), p.lane, p.cluster, stride));
            }
        }
        if (item + buffers * Groups * p.step >= p.items) { continue; } /* nobody waits for the buffer; the other blocks may have ended */
        __syncwarp();
        if (p.lane == 0) { barrier_arrive_expect(group_full<Tokens8>(p, buffer), share * p.cluster * CHUNK); }
        __syncwarp();
        if (p.lane < p.cluster) { barrier_arrive_cluster(cluster_address(group_free<Tokens8>(p, buffer), p.lane)); }
    }
}

/* ---- the kernel ------------------------------------------------------------------------------------------------------ */

template <typename Codes, int Tokens8, int Groups> __device__ __forceinline__ group_place group_start(const small_args &a, const void *shared) {
    constexpr int buffers = group_buffers<Tokens8>();
    group_place p;
    p.cluster = cluster_size(), p.rank = cluster_rank(), p.warp = threadIdx.x / WARP, p.lane = threadIdx.x % WARP;
    p.group = p.warp / GROUP_WARPS, p.member = p.warp % GROUP_WARPS;
    p.items = (a.tiles + GROUP_WARPS - 1) / GROUP_WARPS, p.first = blockIdx.x / p.cluster, p.step = gridDim.x / p.cluster;
    p.k = small_units_of(a.units, p.rank, p.cluster);
    p.base = (shared_address(shared) + 1023) & ~1023u;
    p.l = group_layout_of<Codes, Tokens8, Groups>(a.stages, a.record, (a.units + p.cluster - 1) / p.cluster, p.cluster);
    if (p.lane != 0 || p.warp >= Groups * GROUP_WARPS) { return p; }
    for (int i = 0; i < a.stages; i++) { barrier_init(p.base + p.l.full + 8 * (p.warp * GROUP_MAX_STAGES + i), 1); }
    for (int i = 0; i < buffers && p.member == 0; i++) { barrier_init(group_full<Tokens8>(p, i), 1), barrier_init(group_free<Tokens8>(p, i), p.cluster); }
    barrier_init_fence();
    for (int i = 0; i < buffers && p.member == 0; i++) {
        barrier_arrive_expect(group_full<Tokens8>(p, i), group_share<Tokens8>(p.rank, p.cluster) * p.cluster * CHUNK);
    }
    return p;
}

/* a warpgroup's items: every Groups-th of the cluster's */
template <typename Codes, int Tokens8, int Parts, int Groups>
__device__ __forceinline__ void group_multiply(const small_args &a, const group_place &p, group_fetch fetch, uint32_t x, uint32_t table) {
    constexpr int units = group_units<Codes>();
    int stage = 0, phase = 0, count = 0;
    for (int item = p.first + p.group * p.step; item < p.items; item += Groups * p.step, count++) {
        group_state<Tokens8, group_batch<Codes, Parts>()> s = {};
        for (int u = p.k.first; u < p.k.end; u += units) {
            barrier_wait(p.base + p.l.full + 8 * (p.warp * GROUP_MAX_STAGES + stage), phase);
            uint32_t half = units * a.record, upper = p.base + p.l.stages + (p.warp * a.stages + stage) * 2 * half;
            for (int i = 0; i < units && u + i < p.k.end; i++) {
                uint32_t x_here = x + (u - p.k.first + i) * (Codes::columns / GROUP_BLOCK * 1024 * Tokens8);
                group_unit<Codes, Tokens8, Parts>(s, a, upper + i * a.record, upper + half + i * a.record, (uint32_t)descriptor(x_here, 16), table, p.lane);
            }
            __syncwarp();
            group_fetch_stage<Codes, Groups>(fetch, a, p);
            if (++stage == a.stages) { stage = 0, phase ^= 1; }
        }
        group_scale(s);
        group_send<Tokens8>(p, count, s.sums);
    }
}

/* The block has 4 Groups warps that multiply and Finishers others. */
template <typename Codes, int Tokens8, int Parts, int Groups, int Finishers> __device__ __forceinline__ void group_body(const small_args &a) {
    extern __shared__ __align__(128) uint8_t shared[];
    group_place p = group_start<Codes, Tokens8, Groups>(a, shared);
    uint32_t table = p.base + p.l.table, x = p.base + p.l.x;
    bool multiplies = p.warp < Groups * GROUP_WARPS;
    group_fetch fetch = {p.first + p.group * p.step, p.k.first, 0, {}};
    __syncwarp();
    for (int i = 0; i < a.stages && multiplies; i++) { group_fetch_stage<Codes, Groups>(fetch, a, p); }
    cluster_arrive();
    ql_cuda_start_next();
    if (Codes::table) { fill_table((uint32_t *)(shared + (table - shared_address(shared))), a.values); }
    ql_cuda_wait_previous();
    group_load_x<Tokens8>(a, x, p.k.first * Codes::columns, (p.k.end - p.k.first) * Codes::columns);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    cluster_wait();
    if (multiplies) {
        group_multiply<Codes, Tokens8, Parts, Groups>(a, p, fetch, x, table);
    } else {
        group_finish<Tokens8, Groups, Finishers>(a, p, p.warp - Groups * GROUP_WARPS);
    }
}

#endif

template <typename Codes, int Tokens8, int Parts, int Groups, int Finishers>
__global__ void __launch_bounds__(Groups *GROUP_THREADS + Finishers *WARP, 1) small_group(const __grid_constant__ small_args a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    group_body<Codes, Tokens8, Parts, Groups, Finishers>(a);
#else
    __trap(); /* not chosen: linear_small.cu */
#endif
}

#endif
