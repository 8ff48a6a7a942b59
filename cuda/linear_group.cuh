/* linear_group.cuh: y = x W^T for up to 64 tokens by the warpgroup instructions of sm_90a. As in linear_small.cuh the packed weight
 * (units.cuh) is the A operand, decoded into registers, and groups are scaled in float32; but the activations are read from shared
 * memory by the tensor cores, 64 rows of W at a time, so that more tokens cost little.
 *
 * An item is 64 outputs: four tiles, one a warp of a warpgroup. The blocks of a cluster split K, and the warpgroups of a block split
 * its part: each has the activations of its own columns, so it waits for no other, and takes all items of the cluster. They stay in
 * shared memory for the whole launch; or, where a long K would leave them no room but in clusters of many blocks, and each cluster has
 * one item, they go by as the weights do, through `slots` units a warpgroup (Streams). A warp brings its own weights, units of both
 * halves of its tile in `stages` stages, by bulk copies: `ahead` of them are asked for before the activations, which the multiprocessor
 * would else bring after them all. Finishing warps, one a tile, add up fragments (16 rows x 8 tokens) while the warpgroups go on:
 * first those of the block's warpgroups, in order, then, dealt out to the blocks of the cluster, those of its blocks, and store them.
 *
 *   shared: barriers | norms | table | activations (columns / 64, tokens, 64) bf16 | sums of an item, of all warpgroups of the
 *           block | those of the cluster's blocks that are added here | stages
 *
 * Activations are swizzled as the descriptors say: rows of 128 bytes, 16-byte chunk c of row r at c ^ (r % 8). The columns of 16 stand in
 * the order of the fragments of units.cuh: of 8 columns at 32 i + 8 t, pairs 0 and 1 are bytes 4 t of chunks 4 i and 4 i + 1, pairs
 * 2 and 3 those of chunks 4 i + 2 and 4 i + 3. */
#ifndef QL_CUDA_LINEAR_GROUP_CUH
#define QL_CUDA_LINEAR_GROUP_CUH

#include "linear_small.cuh"
#include "tensor_map.h"
#include "wgmma.cuh"

enum { GROUP_THREADS = 128, GROUP_WARPS = 4, GROUP_MAX_STAGES = 12, GROUP_BLOCK = 64 /* columns of a swizzled row */ };

struct group_layout {
    uint32_t full, sums_full, sums_free, received_full, received_free, x_full, x_free; /* barriers, 8 bytes each; x_full, x_free: of each unit of the block */
    uint32_t norms, table, x, sums, received, stages, bytes;
};

/* in how many passes a tile's fragments go through the sums of the block: more tokens leave no room for all at once */
template <int Tokens8> __host__ __device__ constexpr int group_passes() { return Tokens8 > 6 ? 4 : 1; }

/* units that a bulk copy brings: two short ones in one copy, but where there is little room. As measured; with a table it costs time. */
template <typename Codes, int Tokens8> __host__ __device__ constexpr int group_together() {
    return (int)Codes::bytes == (int)CHUNK && !Codes::table && Tokens8 < 8 ? 2 : 1;
}

/* units: of K, of a block; slots: units of activations that a warpgroup holds, 0: all of its part; the bytes count what aligning the start may take */
template <typename Codes, int Tokens8, int Groups>
__host__ __device__ inline group_layout group_layout_of(int stages, int record, int units, int slots) {
    constexpr int warps = Groups * GROUP_WARPS, line = Tokens8 > 4 ? 64 : 8 * Tokens8; /* of the norms: a power of two */
    group_layout l;
    l.full = 0, l.sums_full = l.full + 8 * warps * GROUP_MAX_STAGES, l.sums_free = l.sums_full + 8 * GROUP_WARPS;
    l.received_full = l.sums_free + 8 * GROUP_WARPS, l.received_free = l.received_full + 8 * GROUP_WARPS, l.x_full = l.received_free + 8 * GROUP_WARPS;
    l.x_free = l.x_full + 8 * units;
    l.norms = (l.x_free + 8 * units + 15) / 16 * 16;
    l.table = (l.norms + norms_bytes(GROUP_WARPS, line) + 127) / 128 * 128;
    l.x = (l.table + (Codes::table ? (uint32_t)TABLE_BYTES : 0u) + 1023) / 1024 * 1024;
    l.sums = l.x + (uint32_t)((slots > 0 ? Groups * slots : units) * Codes::columns * 8 * Tokens8 * 2);
    l.received = l.sums + (uint32_t)(warps * Tokens8 / group_passes<Tokens8>() * CHUNK), l.stages = l.received + GROUP_WARPS * Tokens8 * CHUNK;
    l.bytes = l.stages + (uint32_t)(stages * warps * 2 * group_together<Codes, Tokens8>() * record) + 1024;
    return l;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* where a thread stands */
struct group_place {
    uint32_t base;
    int shift, rank, first, step, items; /* log2 of the cluster; items of the cluster: first, first + step, ... */
    int group, member, lane;             /* warpgroup (Groups: the finishing warps) and warp in it */
    small_range k;                       /* units of the block */
    group_layout l;
};

/* ---- weights: each warp for itself ---------------------------------------------------------------------------- */

__device__ __forceinline__ small_tile group_tile(const small_args &a, int tile) { return locate_tile(a, min(tile, a.tiles - 1)); }
/* of the warpgroup's columns */
template <int Groups> __device__ __forceinline__ small_range group_units(const group_place &p, int group) {
    int units = p.k.end - p.k.first;
    return {p.k.first + units * group / Groups, p.k.first + units * (group + 1) / Groups};
}
/* of warp `warp` of those that multiply */
__device__ __forceinline__ uint32_t group_stage_full(const group_place &p, int warp, int stage) {
    return p.base + p.l.full + 8 * (warp * GROUP_MAX_STAGES + stage);
}
/* activations of unit `unit` of K */
__device__ __forceinline__ uint32_t group_x_full(const group_place &p, int unit) { return p.base + p.l.x_full + 8 * (unit - p.k.first); }
/* the same, when they have been multiplied */
__device__ __forceinline__ uint32_t group_x_free(const group_place &p, int unit) { return p.base + p.l.x_free + 8 * (unit - p.k.first); }
template <int Together> __device__ __forceinline__ uint32_t group_stage(const small_args &a, const group_place &p, int warp, int stage) {
    return p.base + p.l.stages + (warp * a.stages + stage) * 2 * Together * a.record;
}

/* What a warp fetches next. All lanes follow it, so that it stays in uniform registers; one issues the copies. */
struct group_fetch {
    int item, unit;
    const uint8_t *upper, *lower;
};

__device__ __forceinline__ void group_seek(group_fetch &f, const small_args &a, const group_place &p) {
    small_tile tile = group_tile(a, f.item * GROUP_WARPS + p.member);
    f.upper = tile.upper + (int64_t)f.unit * a.record, f.lower = tile.lower + (int64_t)f.unit * a.record;
}
__device__ __forceinline__ group_fetch group_fetch_first(const small_args &a, const group_place &p, small_range mine) {
    group_fetch f = {mine.first < mine.end ? p.first : p.items, mine.first, NULL, NULL};
    if (f.item < p.items) { group_seek(f, a, p); }
    return f;
}

/* the next units, of `mine`, of the warp's tile of the item to stage `stage` */
template <int Together> __device__ __forceinline__ void group_fetch_stage(group_fetch &f, const small_args &a, const group_place &p, small_range mine, int warp, int stage) {
    if (f.item >= p.items) { return; }
    uint32_t full = group_stage_full(p, warp, stage), to = group_stage<Together>(a, p, warp, stage);
    uint32_t bytes = (Together > 1 ? min(Together, mine.end - f.unit) : 1) * a.record;
    if (one_lane()) {
        barrier_arrive_expect(full, 2 * bytes);
        copy_bulk(to, f.upper, bytes, full);
        copy_bulk(to + Together * a.record, f.lower, bytes, full);
    }
    f.upper += bytes, f.lower += bytes, f.unit += Together;
    if (f.unit < mine.end) { return; }
    f.unit = mine.first, f.item += p.step;
    if (f.item < p.items) { group_seek(f, a, p); }
}

/* ---- activations ------------------------------------------------------------------------------------------------ */

/* `columns` columns of all tokens, zeros from token m on, by a warpgroup: a warp takes 64 columns of 4 tokens at a time */
template <int Tokens8> __device__ __forceinline__ void group_load_x(const small_args &a, const group_place &p, uint32_t to, int column, int columns) {
    constexpr int quads = 2 * Tokens8, ahead = 16;
    int v = p.lane % 8, count = quads * (columns / GROUP_BLOCK);
    for (int first = p.member; first < count; first += ahead * GROUP_WARPS) {
        uint4 x[ahead];
#pragma unroll
        for (int i = 0; i < ahead; i++) {
            int piece = first + i * GROUP_WARPS, token = piece % quads * 4 + p.lane / 8;
            bool there = piece < count && token < a.m;
            const bf16 *from = a.x + (int64_t)token * a.x_line + column + piece / quads * GROUP_BLOCK + 8 * v;
            x[i] = there ? *(const uint4 *)from : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < ahead; i++) {
            int piece = first + i * GROUP_WARPS, token = piece % quads * 4 + p.lane / 8;
            uint32_t row = to + (piece / quads * 8 * Tokens8 + token) * 128 + v % 4 * 4, chunk = v / 4 * 4, turn = token % 8;
            if (piece >= count) { break; }
            store_shared(row + ((chunk ^ turn) * 16), x[i].x);
            store_shared(row + (((chunk + 1) ^ turn) * 16), x[i].y);
            store_shared(row + (((chunk + 2) ^ turn) * 16), x[i].z);
            store_shared(row + (((chunk + 3) ^ turn) * 16), x[i].w);
        }
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    block_barrier(1 + p.group, GROUP_THREADS);
}

/* bytes of a unit's */
template <typename Codes, int Tokens8> __host__ __device__ constexpr int group_x_bytes() { return Codes::columns * 16 * Tokens8; }

/* The same of columns that stand in the order of the fragments (ordered_column), by tensor copies to `x`, so that the products start with the
 * first unit: units from `first` on, less than `end`; by one lane. Streams: through a.slots slots. */
template <typename Codes, int Tokens8, bool Streams>
__device__ __forceinline__ void group_fetch_x(const small_args &a, const group_place &p, const ql_tensor_map *map, uint32_t x, small_range mine, int first, int end) {
    constexpr int blocks = Codes::columns / GROUP_BLOCK, bytes = group_x_bytes<Codes, Tokens8>();
    int slot = first - mine.first;
#pragma unroll 1
    for (int u = first; u < end; u++, slot++) {
        uint32_t full = group_x_full(p, u);
        if (Streams && u - mine.first >= a.slots) {
            slot = slot >= a.slots ? slot - a.slots : slot;
            barrier_wait(group_x_free(p, u - a.slots), 0);
        }
        barrier_arrive_expect(full, bytes);
#pragma unroll
        for (int i = 0; i < blocks; i++) { copy_tensor(x + slot * bytes + i * (bytes / blocks), map, u * Codes::columns + i * GROUP_BLOCK, 0, full); }
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

/* the units at `upper` and `lower` times the activations at x; Parts: scales a row and unit (0: known at run time). What was multiplied before is
 * there once `done` is called. */
template <typename Codes, int Tokens8, int Parts, int Batch, typename Done>
__device__ __forceinline__ void group_unit(group_state<Tokens8, Batch> &s, const small_args &a, uint32_t upper, uint32_t lower, uint32_t x,
                                           uint32_t table, int lane, Done done) {
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
            if (first == 0) { done(); }
            s.scale_u = half_bits_to_float(load_shared<uint16_t>(upper + place + 16 * part));
            s.scale_l = half_bits_to_float(load_shared<uint16_t>(lower + place + 16 * part));
        }
        products_begin();
#pragma unroll
        for (int i = 0; i < Batch; i++) {
            int step = first + i;
            multiply_units<Tokens8>(s.product, fragment[i], x + (step / 4 * (1024 * Tokens8) + step % 4 * 32) / 16, step % part_steps > 0);
        }
        products_commit();
        products_wait<1>(); /* those ahead of them, whose fragments are decoded next */
    }
}

/* ---- sums of an item ------------------------------------------------------------------------------------------------ */

/* Number nt of the fragments of tile `member` of an item is number member * Tokens8 + nt of all; block number % cluster of the cluster
 * adds those of all blocks. First of the tile's that is this block's (Tokens8 and more: none). */
template <int Tokens8> __device__ __forceinline__ int group_first(const group_place &p) {
    return (p.rank - p.member * Tokens8) & ((1 << p.shift) - 1);
}
/* bytes that the other blocks send of a tile; the barrier waits for as many */
template <int Tokens8> __device__ __forceinline__ uint32_t group_inbound(const group_place &p) {
    int first = group_first<Tokens8>(p), cluster = 1 << p.shift;
    return first < Tokens8 ? ((Tokens8 - first + cluster - 1) >> p.shift) * (cluster - 1) * CHUNK : 0;
}
/* where the sum of block `rank` of the fragment is received, counted from the base */
template <int Tokens8> __device__ __forceinline__ uint32_t group_received(const group_place &p, int nt, int rank) {
    return p.l.received + (((p.member * Tokens8 + nt) >> p.shift << p.shift) + rank) * CHUNK;
}
__device__ __forceinline__ uint32_t group_barrier(const group_place &p, uint32_t first) { return p.base + first + 8 * p.member; }

/* what the warps of the warpgroups have of a tile of the count'th item, to the finishing warp of the tile */
template <int Tokens8> __device__ __forceinline__ void group_put(const group_place &p, int count, const float (&sums)[4 * Tokens8]) {
    constexpr int passes = group_passes<Tokens8>(), some = Tokens8 / passes;
    uint32_t to = p.base + p.l.sums + (p.group * GROUP_WARPS + p.member) * some * CHUNK + p.lane * 16;
#pragma unroll
    for (int pass = 0; pass < passes; pass++) {
        int phase = count * passes + pass;
        if (phase > 0) { barrier_wait(group_barrier(p, p.l.sums_free), (phase - 1) & 1); }
#pragma unroll
        for (int i = 0; i < some; i++) {
            const float *from = sums + 4 * (pass * some + i);
            store_shared(to + i * CHUNK, make_float4(from[0], from[1], from[2], from[3]));
        }
        warp_arrive(group_barrier(p, p.l.sums_full), p.lane);
    }
}

/* the sums of the block, over its warpgroups in order, to the blocks that add those of the cluster, once these have read the last ones */
template <int Tokens8, int Groups> __device__ __forceinline__ void group_send(const group_place &p, int count) {
    constexpr int passes = group_passes<Tokens8>(), some = Tokens8 / passes;
    uint32_t from = p.base + p.l.sums + p.member * some * CHUNK + p.lane * 16;
#pragma unroll
    for (int pass = 0; pass < passes; pass++) {
        float4 sums[some];
        barrier_wait(group_barrier(p, p.l.sums_full), (count * passes + pass) & 1);
#pragma unroll
        for (int i = 0; i < some; i++) { sums[i] = load_shared<float4>(from + i * CHUNK); }
#pragma unroll
        for (int group = 1; group < Groups; group++) {
#pragma unroll
            for (int i = 0; i < some; i++) {
                float4 more = load_shared<float4>(from + (group * GROUP_WARPS * some + i) * CHUNK);
                sums[i].x += more.x, sums[i].y += more.y, sums[i].z += more.z, sums[i].w += more.w;
            }
        }
        warp_arrive(group_barrier(p, p.l.sums_free), p.lane);
        if (pass == 0 && count > 0) { barrier_wait(group_barrier(p, p.l.received_free), (count - 1) & 1); }
#pragma unroll
        for (int i = 0; i < some; i++) {
            int nt = pass * some + i, owner = (p.member * Tokens8 + nt) & ((1 << p.shift) - 1);
            uint32_t place = group_received<Tokens8>(p, nt, p.rank) + p.lane * 16;
            if (owner == p.rank) {
                store_shared(p.base + place, sums[i]); /* read by the lane that stores it */
            } else {
                uint32_t there = cluster_address(p.base, owner);
                cluster_store_async(there + place, sums[i], there + p.l.received_full + 8 * p.member);
            }
        }
    }
}

/* what was received of the tile has been read: the other blocks may send the next; its bytes are awaited first */
template <int Tokens8> __device__ __forceinline__ void group_release(const group_place &p) {
    __syncwarp();
    if (p.lane == 0) { barrier_arrive_expect(group_barrier(p, p.l.received_full), group_inbound<Tokens8>(p)); }
    __syncwarp();
    if (p.lane < 1 << p.shift && p.lane != p.rank) { barrier_arrive_cluster(cluster_address(group_barrier(p, p.l.received_free), p.lane)); }
}

/* the sum of what was received of a fragment, in the order of the blocks */
template <int Tokens8> __device__ __forceinline__ float4 group_add(const group_place &p, int nt) {
    uint32_t from = p.base + group_received<Tokens8>(p, nt, 0) + p.lane * 16;
    float4 sum = load_shared<float4>(from);
#pragma unroll 1
    for (int rank = 1; rank < 1 << p.shift; rank++) {
        float4 more = load_shared<float4>(from + rank * CHUNK);
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
    }
    return sum;
}

/* A finishing warp adds up tile `member` of every item, and stores those of its fragments that are this block's, `aimed` at a time: all
 * three of 48 tokens, else two. A warp has little time for all of this: it must keep up with those that multiply. */
template <int Tokens8, int Groups> __device__ __forceinline__ void group_finish(const small_args &a, const group_place &p, small_norms norms) {
    constexpr int most = Tokens8 / 2, aimed = most % 2 == 0 ? 2 : most; /* fragments of this block: clusters have two blocks at least */
    int count = 0, cluster = 1 << p.shift, first = group_first<Tokens8>(p), part = -1;
    small_lines lines[most];
    for (int item = p.first; item < p.items; item += p.step, count++) {
        int place = item * GROUP_WARPS + p.member;
        small_tile tile = group_tile(a, place);
        if (tile.part != part) {
            part = tile.part;
#pragma unroll
            for (int i = 0; i < most; i++) { lines[i] = fragment_lines<false>(a, a.part[part], p.lane, first + i * cluster, norms); }
        }
#pragma unroll
        for (int i = 0; i < most; i += aimed) {
            small_target to[aimed];
            float4 sums[aimed];
            if (i > 0 && first + i * cluster >= Tokens8) { break; }
#pragma unroll
            for (int j = 0; j < aimed; j++) { to[j] = aim_fragment<false>(a, tile, lines[i + j], p.lane, first + (i + j) * cluster); }
            if (i == 0) {
                group_send<Tokens8, Groups>(p, count);
                if (first >= Tokens8) { break; }
                barrier_wait(group_barrier(p, p.l.received_full), count & 1);
            }
#pragma unroll
            for (int j = 0; j < aimed; j++) { sums[j] = group_add<Tokens8>(p, first + (first + (i + j) * cluster < Tokens8 ? i + j : i) * cluster); } /* another's is not read */
            /* before the stores; at the end nobody waits for it, and the other blocks may have ended */
            if (first + (i + aimed) * cluster >= Tokens8 && item + p.step < p.items) { group_release<Tokens8>(p); }
#pragma unroll
            for (int j = 0; j < aimed; j++) {
                if (place < a.tiles && first + (i + j) * cluster < Tokens8) { store_fragment<false>(a, tile, lines[i + j], to[j], sums[j]); }
            }
        }
    }
}

/* ---- the kernel ------------------------------------------------------------------------------------------------------ */

template <typename Codes, int Tokens8, int Groups, bool Streams> __device__ __forceinline__ group_place group_start(const small_args &a, const void *shared) {
    group_place p;
    int warp = __shfl_sync(QL_FULL_WARP, threadIdx.x / WARP, 0); /* the same in all lanes: descriptors stay in uniform registers */
    int cluster = cluster_size();
    p.shift = __ffs(cluster) - 1, p.rank = cluster_rank(), p.lane = threadIdx.x % WARP;
    p.group = warp / GROUP_WARPS, p.member = warp % GROUP_WARPS;
    p.items = (a.tiles + GROUP_WARPS - 1) / GROUP_WARPS, p.first = blockIdx.x >> p.shift, p.step = gridDim.x >> p.shift;
    p.k = small_units_of(a.units, p.rank, p.shift);
    p.base = (shared_address(shared) + 1023) & ~1023u;
    p.l = group_layout_of<Codes, Tokens8, Groups>(a.stages, a.record, (a.units + cluster - 1) >> p.shift, Streams ? a.slots : 0);
    if (one_lane()) { /* of each warp: places that differ by lane would be set one after the other */
#pragma unroll 1
        for (int u = p.k.first + warp; u < p.k.end; u += (Groups + 1) * GROUP_WARPS) {
            barrier_init(group_x_full(p, u), 1);
            if (Streams) { barrier_init(group_x_free(p, u), warp_arrivals(GROUP_WARPS)); }
        }
        if (p.group < Groups) {
#pragma unroll 1
            for (int i = 0; i < a.stages; i++) { barrier_init(group_stage_full(p, warp, i), 1); }
        } else {
            int others = min(Tokens8, cluster) - (group_first<Tokens8>(p) < Tokens8 ? 1 : 0); /* that add fragments of the tile: one at least */
            barrier_init(group_barrier(p, p.l.sums_full), warp_arrivals(Groups)), barrier_init(group_barrier(p, p.l.sums_free), warp_arrivals(1));
            barrier_init(group_barrier(p, p.l.received_full), 1), barrier_init(group_barrier(p, p.l.received_free), others);
            barrier_arrive_expect(group_barrier(p, p.l.received_full), group_inbound<Tokens8>(p));
        }
    }
    barrier_init_fence();
    return p;
}

/* the part of the warpgroup's columns in all items of the cluster */
template <typename Codes, int Tokens8, int Parts, int Groups, bool Streams>
__device__ __forceinline__ void group_multiply(const small_args &a, const group_place &p, group_fetch fetch, small_range mine, uint32_t x, uint32_t table) {
    int stage = 0, phase = 0, count = 0, slot = 0, warp = p.group * GROUP_WARPS + p.member;
    constexpr int together = group_together<Codes, Tokens8>();
    for (int item = p.first; item < p.items; item += p.step, count++) {
        group_state<Tokens8, group_batch<Codes, Parts>()> s = {};
        uint32_t x_here = (uint32_t)descriptor(x, 16);
        for (int first = mine.first; first < mine.end; first += together) {
            uint32_t upper = group_stage<together>(a, p, warp, stage);
            int end = together > 1 ? min(first + together, mine.end) : first + 1;
#pragma unroll 1
            for (int u = first; u < end; u++) {
                if (Streams || (count == 0 && a.ordered)) { barrier_wait(group_x_full(p, u), 0); }
                if (u == first) { barrier_wait(group_stage_full(p, warp, stage), phase); }
                group_unit<Codes, Tokens8, Parts>(s, a, upper, upper + together * a.record, x_here, table, p.lane, [&] {
                    if (Streams && u > mine.first) { warp_arrive(group_x_free(p, u - 1), p.lane); }
                });
                upper += a.record, x_here += group_x_bytes<Codes, Tokens8>() / 16;
                if (Streams && ++slot == a.slots) { slot = 0, x_here -= a.slots * group_x_bytes<Codes, Tokens8>() / 16; }
            }
            __syncwarp();
            group_fetch_stage<together>(fetch, a, p, mine, warp, stage);
            if (++stage == a.stages) { stage = 0, phase ^= 1; }
        }
        group_scale(s);
        group_put<Tokens8>(p, count, s.sums);
    }
}

/* The block has 4 Groups warps that multiply and 4 that finish. */
template <typename Codes, int Tokens8, int Parts, int Groups, bool Streams> __device__ __forceinline__ void group_body(const small_args &a, const ql_tensor_map *map) {
    extern __shared__ __align__(128) uint8_t shared[];
    group_place p = group_start<Codes, Tokens8, Groups, Streams>(a, shared);
    int part = p.group < Groups ? p.group : p.member; /* a finishing warp's: of the activations it brings */
    small_range mine = group_units<Groups>(p, part);
    int units_ahead = Streams ? part * a.slots : mine.first - p.k.first; /* of activations in shared memory */
    uint32_t table = p.base + p.l.table, x = p.base + p.l.x + units_ahead * group_x_bytes<Codes, Tokens8>();
    bool multiplies = p.group < Groups, brings_x = !multiplies && (Streams || a.ordered) && p.member < Groups;
    constexpr int together = group_together<Codes, Tokens8>();
    group_fetch fetch = {};
    if (multiplies) { fetch = group_fetch_first(a, p, mine); }
    if (brings_x && one_lane()) { prefetch_tensor_map(map); }
    cluster_arrive();
    __syncthreads();
    ql_cuda_start_next();
    if (!multiplies) {
        ql_cuda_wait_previous();
        int asked = Streams ? min(mine.first + a.slots, mine.end) : mine.end;
        if (brings_x && one_lane()) { group_fetch_x<Codes, Tokens8, Streams>(a, p, map, x, mine, mine.first, asked); }
        __syncwarp();
        block_arrive(3 + Groups, (Groups + 1) * GROUP_THREADS);
        if (Streams && brings_x && one_lane()) { group_fetch_x<Codes, Tokens8, Streams>(a, p, map, x, mine, asked, mine.end); }
        __syncwarp();
        small_norms norms = {1.0f, a.made.halves != NULL ? p.base + p.l.norms : 0};
        if (norms.each != 0) { make_norms(norms.each, a.made, a.k, a.eps, p.member, GROUP_WARPS, p.lane, 1 + Groups); }
        cluster_wait();
        group_finish<Tokens8, Groups>(a, p, norms);
        return;
    }
#pragma unroll 1
    for (int i = 0; i < a.ahead; i++) { group_fetch_stage<together>(fetch, a, p, mine, p.group * GROUP_WARPS + p.member, i); }
    if (Codes::table) { /* while the first weights are on their way */
        fill_table(table, a, Groups * GROUP_THREADS);
        block_barrier(2 + Groups, Groups * GROUP_THREADS);
    }
    if (!Streams && !a.ordered) {
        ql_cuda_wait_previous();
        group_load_x<Tokens8>(a, p, x, mine.first * Codes::columns, (mine.end - mine.first) * Codes::columns);
    }
    cluster_wait();
    block_barrier(3 + Groups, (Groups + 1) * GROUP_THREADS);
#pragma unroll 1
    for (int i = a.ahead; i < a.stages; i++) { group_fetch_stage<together>(fetch, a, p, mine, p.group * GROUP_WARPS + p.member, i); }
    group_multiply<Codes, Tokens8, Parts, Groups, Streams>(a, p, fetch, mine, x, table);
}

#endif

template <typename Codes, int Tokens8, int Parts, int Groups, bool Streams>
__global__ void __launch_bounds__((Groups + 1) * GROUP_THREADS, 1) small_group(const __grid_constant__ small_args a, const __grid_constant__ ql_tensor_map map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    group_body<Codes, Tokens8, Parts, Groups, Streams>(a, &map);
#else
    __trap(); /* not chosen: linear_packed.cu */
#endif
}

#endif
