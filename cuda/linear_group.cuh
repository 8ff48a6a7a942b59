/* linear_group.cuh: y = x W^T for up to 64 tokens by the warpgroup instructions of sm_90a. As in linear_small.cuh the packed weight
 * (units.cuh) is the A operand, decoded into registers, and groups are scaled in float32; but the activations are read from shared
 * memory by the tensor cores, 64 rows of W at a time, so that more tokens cost little.
 *
 * An item is 64 outputs: four tiles, one a warp of a warpgroup. The blocks of a cluster split K, and the warpgroups of a block split
 * its part: each holds the activations of its own columns for the whole launch, so it waits for no other, and takes all items of the
 * cluster. A warp brings its own weights, `stages` units of both halves of its tile, by bulk copies (the finishing warps bring the
 * first ones, while it brings activations). Fragments (16 rows x 8 tokens) of an item's sums are dealt out to the blocks of the
 * cluster, where finishing warps, one a tile, add those of all warpgroups in order and store them while the warpgroups go on.
 *
 *   shared: barriers | table | activations (columns / 64, tokens, 64) bf16 | sums of one or two items, of all warpgroups of the
 *           cluster | stages
 *
 * Activations are swizzled as the descriptors say: rows of 128 bytes, 16-byte chunk c of row r at c ^ (r % 8). The columns of 16 stand in
 * the order of the fragments of units.cuh: of 8 columns at 32 i + 8 t, pairs 0 and 1 are bytes 4 t of chunks 4 i and 4 i + 1, pairs
 * 2 and 3 those of chunks 4 i + 2 and 4 i + 3. */
#ifndef QL_CUDA_LINEAR_GROUP_CUH
#define QL_CUDA_LINEAR_GROUP_CUH

#include "linear_small.cuh"
#include "wgmma.cuh"

enum { GROUP_THREADS = 128, GROUP_WARPS = 4, GROUP_MAX_STAGES = 12, GROUP_BLOCK = 64 /* columns of a swizzled row */ };

struct group_layout {
    uint32_t full, sums_full, sums_free, table, x, sums, stages, bytes;
};

/* units: of K, of a block; buffers: of sums of an item, 1 or 2; the bytes count what aligning the start may take */
template <typename Codes, int Tokens8, int Groups>
__host__ __device__ inline group_layout group_layout_of(int stages, int record, int units, int buffers) {
    constexpr int warps = Groups * GROUP_WARPS;
    group_layout l;
    l.full = 0, l.sums_full = l.full + 8 * warps * GROUP_MAX_STAGES, l.sums_free = l.sums_full + 16;
    l.table = (l.sums_free + 16 + 127) / 128 * 128;
    l.x = (l.table + (Codes::table ? (uint32_t)TABLE_BYTES : 0u) + 1023) / 1024 * 1024;
    l.sums = l.x + (uint32_t)(units * Codes::columns * 8 * Tokens8 * 2);
    l.stages = l.sums + (uint32_t)(buffers * warps * Tokens8 * CHUNK);
    l.bytes = l.stages + (uint32_t)(stages * warps * 2 * record) + 1024;
    return l;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* where a thread stands */
struct group_place {
    uint32_t base;
    int shift, rank, first, step, items; /* log2 of the cluster; items of the cluster: first, first + step, ... */
    int buffers;
    int group, member, lane;             /* warpgroup (Groups: the finishing warps) and warp in it */
    small_range k;                       /* units of the block */
    group_layout l;
};

/* ---- weights: each warp for itself ---------------------------------------------------------------------------- */

__device__ __forceinline__ small_tile group_tile(const small_args &a, int tile) { return locate_tile(a, min(tile, a.tiles - 1)); }
__device__ __forceinline__ small_range group_units(const group_place &p, int group, int groups) {
    small_range r = small_units_of(p.k.end - p.k.first, group, groups);
    return {p.k.first + r.first, p.k.first + r.end};
}
/* of warp `warp` of those that multiply */
__device__ __forceinline__ uint32_t group_stage_full(const group_place &p, int warp, int stage) {
    return p.base + p.l.full + 8 * (warp * GROUP_MAX_STAGES + stage);
}
__device__ __forceinline__ uint32_t group_stage(const small_args &a, const group_place &p, int warp, int stage) {
    return p.base + p.l.stages + (warp * a.stages + stage) * 2 * a.record;
}

struct group_fetch {
    int item, unit; /* what comes next */
    const uint8_t *upper, *lower;
};

__device__ __forceinline__ void group_seek(group_fetch &f, const small_args &a, const group_place &p, int member) {
    small_tile tile = group_tile(a, f.item * GROUP_WARPS + member);
    f.upper = tile.upper + (int64_t)f.unit * a.record, f.lower = tile.lower + (int64_t)f.unit * a.record;
}

/* the next unit, of `mine`, of tile `member` of the item to stage `stage` of the warp; by one lane */
__device__ __forceinline__ void group_fetch_stage(group_fetch &f, const small_args &a, const group_place &p, small_range mine, int member, int warp, int stage) {
    if (f.item >= p.items) { return; }
    uint32_t full = group_stage_full(p, warp, stage), to = group_stage(a, p, warp, stage);
    barrier_arrive_expect(full, 2 * a.record);
    copy_bulk(to, f.upper, a.record, full);
    copy_bulk(to + a.record, f.lower, a.record, full);
    f.upper += a.record, f.lower += a.record;
    if (++f.unit < mine.end) { return; }
    f.unit = mine.first, f.item += p.step;
    if (f.item < p.items) { group_seek(f, a, p, member); }
}

/* where a warp's fetching stands after its first `stages` units; with Fetch they are fetched, by one lane */
template <bool Fetch> __device__ __forceinline__ group_fetch group_fetch_first(const small_args &a, const group_place &p, small_range mine, int member, int warp) {
    group_fetch f = {mine.first < mine.end ? p.first : p.items, mine.first, NULL, NULL};
    if (Fetch) {
        if (f.item < p.items) { group_seek(f, a, p, member); }
        for (int i = 0; i < a.stages; i++) { group_fetch_stage(f, a, p, mine, member, warp, i); }
        return f;
    }
    int units = mine.end - mine.first;
    if (units > 0) { f.item += a.stages / units * p.step, f.unit += a.stages % units; }
    if (f.item < p.items) { group_seek(f, a, p, member); }
    return f;
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

__device__ __forceinline__ uint32_t group_full(const group_place &p, int buffer) { return p.l.sums_full + 8 * buffer; }
__device__ __forceinline__ uint32_t group_free(const group_place &p, int buffer) { return p.l.sums_free + 8 * buffer; }
/* Fragment nt of tile `member` of an item is number member * Tokens8 + nt; block number % cluster adds it. The place there of what
 * warpgroup `from` of the cluster sends; this and the barriers above count from the base. */
template <int Tokens8, int Groups> __device__ __forceinline__ uint32_t group_sums_at(const group_place &p, int buffer, int from, int fragment) {
    int slots = GROUP_WARPS * Tokens8 >> p.shift;
    return p.l.sums + (buffer * Groups * GROUP_WARPS * Tokens8 + from * slots + (fragment >> p.shift)) * CHUNK;
}
template <int Tokens8, int Groups> __device__ __forceinline__ void group_expect(const group_place &p, int buffer) {
    barrier_arrive_expect(p.base + group_full(p, buffer), GROUP_WARPS * Tokens8 * Groups * CHUNK);
}

/* sums of the count'th item to the blocks that add them, once those have added what was in the buffer */
template <int Tokens8, int Groups> __device__ __forceinline__ void group_send(const group_place &p, int count, const float (&sums)[4 * Tokens8]) {
    int buffer = count & (p.buffers - 1);
    if (count >= p.buffers) { barrier_wait(p.base + group_free(p, buffer), (count - p.buffers) >> (p.buffers - 1) & 1); }
#pragma unroll
    for (int nt = 0; nt < Tokens8; nt++) {
        int fragment = p.member * Tokens8 + nt;
        uint32_t there = cluster_address(p.base, fragment & ((1 << p.shift) - 1));
        float4 v = make_float4(sums[4 * nt], sums[4 * nt + 1], sums[4 * nt + 2], sums[4 * nt + 3]);
        cluster_store_async(there + group_sums_at<Tokens8, Groups>(p, buffer, p.rank * Groups + p.group, fragment) + p.lane * 16, v,
                            there + group_full(p, buffer));
    }
}

/* the sums in a buffer of this block have been read: the warpgroups of the cluster may send the next ones */
template <int Tokens8, int Groups> __device__ __forceinline__ void group_release(const group_place &p, int buffer) {
    __syncwarp();
    if (p.lane == 0 && p.member == 0) { group_expect<Tokens8, Groups>(p, buffer); }
    __syncwarp();
    if (p.lane < 1 << p.shift) { barrier_arrive_cluster(cluster_address(p.base + group_free(p, buffer), p.lane)); }
}

/* A finishing warp adds and stores this block's fragments of tile `member` of every item, GROUP_AIMED at a time. */
template <int Tokens8, int Groups> __device__ __forceinline__ void group_finish(const small_args &a, const group_place &p) {
    enum { GROUP_AIMED = 2 };
    int index = 0, cluster = 1 << p.shift, first = p.rank - (p.member * Tokens8 & (cluster - 1));
    uint32_t stride = (GROUP_WARPS * Tokens8 >> p.shift) * CHUNK;
    first = first < 0 ? Tokens8 : first; /* none */
    for (int item = p.first; item < p.items; item += p.step, index++) {
        int buffer = index & (p.buffers - 1), place = item * GROUP_WARPS + p.member;
        small_tile tile = group_tile(a, place);
#pragma unroll 1
        for (int nt = first; nt < Tokens8 || nt == first; nt += GROUP_AIMED * cluster) {
            small_target to[GROUP_AIMED];
            float4 sums[GROUP_AIMED];
#pragma unroll
            for (int i = 0; i < GROUP_AIMED; i++) { to[i] = aim_fragment<false>(a, tile, p.lane, place < a.tiles ? nt + i * cluster : Tokens8, 1.0f); }
            if (nt == first) { barrier_wait(p.base + group_full(p, buffer), index >> (p.buffers - 1) & 1); }
#pragma unroll
            for (int i = 0; i < GROUP_AIMED; i++) {
                int fragment = p.member * Tokens8 + min(nt + i * cluster, Tokens8 - 1);
                sums[i] = add_fragments<false>(p.base + group_sums_at<Tokens8, Groups>(p, buffer, 0, fragment), p.lane, Groups << p.shift, stride);
            }
            /* before the stores; at the end nobody waits for the buffer, and the other blocks may have ended */
            if (nt + GROUP_AIMED * cluster >= Tokens8 && item + p.buffers * p.step < p.items) { group_release<Tokens8, Groups>(p, buffer); }
#pragma unroll
            for (int i = 0; i < GROUP_AIMED; i++) {
                if (nt + i * cluster < Tokens8) { store_fragment<false>(a, tile, to[i], sums[i]); }
            }
        }
    }
}

/* ---- the kernel ------------------------------------------------------------------------------------------------------ */

template <typename Codes, int Tokens8, int Groups> __device__ __forceinline__ group_place group_start(const small_args &a, const void *shared) {
    group_place p;
    int warp = __shfl_sync(QL_FULL_WARP, threadIdx.x / WARP, 0); /* the same in all lanes: descriptors stay in uniform registers */
    int cluster = cluster_size();
    p.shift = __ffs(cluster) - 1, p.rank = cluster_rank(), p.lane = threadIdx.x % WARP;
    p.group = warp / GROUP_WARPS, p.member = warp % GROUP_WARPS;
    p.items = (a.tiles + GROUP_WARPS - 1) / GROUP_WARPS, p.first = blockIdx.x >> p.shift, p.step = gridDim.x >> p.shift;
    p.k = small_units_of(a.units, p.rank, cluster);
    p.base = (shared_address(shared) + 1023) & ~1023u;
    p.l = group_layout_of<Codes, Tokens8, Groups>(a.stages, a.record, (a.units + cluster - 1) / cluster, a.buffers);
    p.buffers = a.buffers;
    if (p.group < Groups && p.lane < a.stages) { barrier_init(group_stage_full(p, warp, p.lane), 1); }
    if (p.group == Groups && p.lane < a.buffers && p.member == 0) {
        barrier_init(p.base + group_full(p, p.lane), 1), barrier_init(p.base + group_free(p, p.lane), GROUP_WARPS * cluster);
        group_expect<Tokens8, Groups>(p, p.lane);
    }
    barrier_init_fence();
    return p;
}

/* the part of the warpgroup's columns in all items of the cluster */
template <typename Codes, int Tokens8, int Parts, int Groups>
__device__ __forceinline__ void group_multiply(const small_args &a, const group_place &p, small_range mine, uint32_t x, uint32_t table) {
    int stage = 0, phase = 0, count = 0, warp = p.group * GROUP_WARPS + p.member;
    group_fetch fetch = group_fetch_first<false>(a, p, mine, p.member, warp);
    for (int item = p.first; item < p.items; item += p.step, count++) {
        group_state<Tokens8, group_batch<Codes, Parts>()> s = {};
        uint32_t x_here = (uint32_t)descriptor(x, 16);
        for (int u = mine.first; u < mine.end; u++) {
            uint32_t upper = group_stage(a, p, warp, stage);
            barrier_wait(group_stage_full(p, warp, stage), phase);
            group_unit<Codes, Tokens8, Parts>(s, a, upper, upper + a.record, x_here, table, p.lane);
            __syncwarp();
            if (p.lane == 0) { group_fetch_stage(fetch, a, p, mine, p.member, warp, stage); }
            x_here += Codes::columns / GROUP_BLOCK * 1024 * Tokens8 / 16;
            if (++stage == a.stages) { stage = 0, phase ^= 1; }
        }
        group_scale(s);
        group_send<Tokens8, Groups>(p, count, s.sums);
    }
}

/* The block has 4 Groups warps that multiply and 4 that finish. */
template <typename Codes, int Tokens8, int Parts, int Groups> __device__ __forceinline__ void group_body(const small_args &a) {
    extern __shared__ __align__(128) uint8_t shared[];
    group_place p = group_start<Codes, Tokens8, Groups>(a, shared);
    small_range mine = group_units(p, p.group, Groups);
    uint32_t table = p.base + p.l.table, x = p.base + p.l.x + (mine.first - p.k.first) * (Codes::columns * 16 * Tokens8);
    if (Codes::table) { fill_table((uint32_t *)(shared + (table - shared_address(shared))), a.values); }
    cluster_arrive();
    __syncthreads();
    ql_cuda_start_next();
    if (p.group == Groups) { /* the first weights: a lane a warpgroup's tile of the warp's number */
        if (p.lane < Groups) { group_fetch_first<true>(a, p, group_units(p, p.lane, Groups), p.member, p.lane * GROUP_WARPS + p.member); }
        __syncwarp();
        ql_cuda_wait_previous();
        cluster_wait();
        group_finish<Tokens8, Groups>(a, p);
        return;
    }
    ql_cuda_wait_previous();
    group_load_x<Tokens8>(a, p, x, mine.first * Codes::columns, (mine.end - mine.first) * Codes::columns);
    cluster_wait();
    group_multiply<Codes, Tokens8, Parts, Groups>(a, p, mine, x, table);
}

#endif

template <typename Codes, int Tokens8, int Parts, int Groups>
__global__ void __launch_bounds__((Groups + 1) * GROUP_THREADS, 1) small_group(const __grid_constant__ small_args a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    group_body<Codes, Tokens8, Parts, Groups>(a);
#else
    __trap(); /* not chosen: linear_small.cu */
#endif
}

#endif
