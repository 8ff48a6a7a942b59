/* linear_decoded.cuh: y = x W^T for a thousand tokens and more by the warpgroup instructions of sm_90a. Where linear_wide.cuh decodes W for each 256
 * tokens anew, here it is decoded once, to bfloat16 in global memory, by warps of the same kernel that have nothing else to do, just ahead of
 * those that multiply, which find it in the L2 cache. Values and what becomes of the sums (linear_wide_store.cuh) are the same, but that outputs are
 * stored while the next item is multiplied; there is room for those of bfloat16 alone, and for float32 cuBLAS is as fast.
 *
 * An item is 128 outputs (eight tiles, one a warp; the decoded matrix has its rows in the order of the tiles) of 256 tokens. The two blocks of a cluster
 * take items of neighbouring outputs and the same tokens, and each brings half of the activations for both. Clusters go through bands of DECODED_BAND
 * items of tokens, outputs after outputs, so that what all of them read at a time stays in the L2 cache. Decoding is handed out DECODED_TASK tiles and
 * DECODED_CHUNK columns at a time, in the order in which the clusters come to need them; `ready` counts the tiles of an item's outputs that are there.
 *
 *   shared: barriers | table | lines of outputs, two places | stages: activations (256, 64), values (128, 64), bf16, swizzled */
#ifndef QL_CUDA_LINEAR_DECODED_CUH
#define QL_CUDA_LINEAR_DECODED_CUH

#include "linear_wide.cuh"

enum {
    DECODED_TOKENS8 = 32,
    DECODED_ROWS = WIDE_TILES * TILE_ROWS,
    DECODED_COLUMNS = 64, /* of a stage */
    DECODED_CHUNK = 256,
    DECODED_TASK = 2, /* tiles of a chunk that a warp decodes before it says so */
    DECODED_STAGES = 3,
    DECODED_BLOCKS = 2, /* of a cluster */
    DECODED_BAND = 8,
    DECODED_X = 8 * DECODED_TOKENS8 * DECODED_COLUMNS * 2, /* bytes of a stage's activations */
    DECODED_VALUES = DECODED_ROWS * DECODED_COLUMNS * 2,   /* and values */
    DECODED_STAGE = DECODED_X + DECODED_VALUES,
    DECODED_TABLE = 1024, /* where things begin */
    DECODED_LINES = DECODED_TABLE + 1024,
    DECODED_PLACE = 8 * DECODED_TOKENS8 * WIDE_GROUP_TILES * TILE_ROWS * 2, /* of a warpgroup */
    DECODED_RING = DECODED_LINES + 2 * DECODED_PLACE,
    DECODED_BYTES = DECODED_RING + DECODED_STAGES * DECODED_STAGE + 1024 /* what aligning the start may take */
};

/* what the blocks share */
struct decoded_work {
    bf16 *values;             /* (tiles of 16 rows, x_line) */
    uint32_t *claimed, *done; /* tasks of decoding that are handed out; blocks that have ended: zeros before and after, as are: */
    uint32_t *ready;          /* (outputs / DECODED_ROWS, x_line / DECODED_CHUNK), both rounded up: tiles that are decoded */
    int counters;             /* of all three, side by side from `claimed` on */
    int group;                /* tiles that the clusters begin with at once: their columns are decoded side by side */
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ uint32_t decoded_full(const wide_place &p, int stage) { return p.base + 8 * stage; }
__device__ __forceinline__ uint32_t decoded_free(const wide_place &p, int stage) { return p.base + 8 * (DECODED_STAGES + stage); }
__device__ __forceinline__ uint32_t decoded_stage(const wide_place &p, int stage) { return p.base + DECODED_RING + stage * DECODED_STAGE; }

/* the item of turn `turn`; false: there is none. The last of a pair may have no outputs. */
__device__ __forceinline__ bool decoded_take(wide_place &p, int turn) {
    int number = (blockIdx.x + turn * gridDim.x) / DECODED_BLOCKS, pairs = (p.items / p.across + DECODED_BLOCKS - 1) / DECODED_BLOCKS;
    int band = number / (pairs * DECODED_BAND), within = number - band * pairs * DECODED_BAND;
    int width = min((int)DECODED_BAND, p.across - band * DECODED_BAND);
    if (number >= pairs * p.across) { return false; }
    p.item = (within / width * DECODED_BLOCKS + p.block) * p.across + band * DECODED_BAND + within % width;
    return true;
}

/* ---- decoding ------------------------------------------------------------------------------------------------------- */

/* codes whose table has a place in memory for each byte alone: lanes may meet in a bank, but it is small */
struct codes_small_table : codes_table {
    static __device__ __forceinline__ uint32_t pair(const uint32_t *w, int j, int p, uint32_t, uint32_t table) {
        int shift = 8 * (2 * (j % 2) + p) - 2;
        uint32_t q = shift < 0 ? w[j / 2] << 2 : w[j / 2] >> shift;
        return load_shared<uint32_t>((q & 0x3fcu) + table);
    }
};
template <typename Codes> struct decoded_codes { typedef Codes type; };
template <> struct decoded_codes<codes_table> { typedef codes_small_table type; };

__device__ __forceinline__ void fill_small_table(uint32_t table, const small_args &a, int first, int threads) {
    for (int byte = first; byte < 256; byte += threads) {
        store_shared(table + byte * 4, (uint32_t)a.values[byte & 15] | (uint32_t)a.values[byte >> 4] << 16);
    }
}

/* a tile's units of a chunk, and what a lane has loaded of them */
template <typename Codes> struct decoded_tile {
    enum { units = DECODED_CHUNK / Codes::columns };
    int number, chunk;
    small_tile tile;
    uint32_t words[units][2][Codes::words], scale[units][2]; /* (unit, half); scale: and zero point, of the unit's first part */

    __device__ __forceinline__ const uint8_t *record(const small_args &a, int u, int half) const {
        return (half ? tile.lower : tile.upper) + (int64_t)(chunk * units + u) * a.record;
    }
    __device__ __forceinline__ bool has(const small_args &a, int u) const { return u == 0 || chunk * units + u < a.units; }

    __device__ __forceinline__ static uint32_t load_scale(const small_args &a, const uint8_t *record, int part) {
        const uint8_t *from = record + Codes::bytes + threadIdx.x % WARP / 4 * 2 + part * 16;
        uint32_t zero = a.zeros ? __ldg((const uint16_t *)(from + a.parts * 16)) : Codes::symmetric & 0xffff;
        return __ldg((const uint16_t *)from) | zero << 16;
    }
    __device__ __forceinline__ void load(const small_args &a) {
#pragma unroll
        for (int i = 0; i < 2 * units; i++) {
            if (!has(a, i / 2)) { continue; }
            const uint8_t *from = record(a, i / 2, i % 2);
            load_words<Codes>(words[i / 2][i % 2], from, threadIdx.x % WARP);
            scale[i / 2][i % 2] = load_scale(a, from, 0);
        }
    }
    /* to: values (tiles of 16 rows, x_line); part: log2 of the steps of a scale */
    __device__ __forceinline__ void decode(bf16 *to, const small_args &a, int part, uint32_t table) const {
        int lane = threadIdx.x % WARP;
        to += ((int64_t)number * TILE_ROWS + lane / 4) * a.x_line + chunk * DECODED_CHUNK + lane % 4 * 8;
#pragma unroll
        for (int i = 0; i < 2 * units; i++) {
            if (!has(a, i / 2)) { continue; }
            wide_scale s = wide_scale_of(scale[i / 2][i % 2]);
            bf16 *line = to + (int64_t)(i % 2 * UNIT_ROWS) * a.x_line + i / 2 * Codes::columns;
#pragma unroll
            for (int step = 0; step < Codes::columns / STEP; step += 2) {
                if (step > 0 && (step & ((1 << part) - 1)) == 0) { s = wide_scale_of(load_scale(a, record(a, i / 2, i % 2), step >> part)); }
                uint32_t v[4];
#pragma unroll
                for (int e = 0; e < 4; e++) { v[e] = wide_scaled(Codes::pair(words[i / 2][i % 2], step + e / 2, e % 2, s.offset, table), s); }
                *(uint4 *)(line + step * STEP) = make_uint4(v[0], v[1], v[2], v[3]);
            }
        }
    }
};

/* Tasks one after the other, by a warp: DECODED_TASK tiles of a chunk, in the order in which clusters need them. What the next tile needs is on its
 * way while the warp waits for what it stored. */
template <typename Codes> __device__ __forceinline__ void decoded_decode(const small_args &a, const wide_place &p, const decoded_work &work, uint32_t table) {
    int chunks = (a.x_line + DECODED_CHUNK - 1) / DECODED_CHUNK, left = 0, tiles = 0; /* of the task: tiles still to come, all */
    uint32_t claimed = p.lane == 0 ? atomicAdd(work.claimed, 1) : 0;
    decoded_tile<Codes> t = {};
    auto next = [&]() {
        if (left > 0) {
            t.number++, left--;
        } else {
            int task = __shfl_sync(QL_FULL_WARP, claimed, 0), whole = work.group / DECODED_TASK * chunks; /* tasks of a group */
            int first = task / whole * work.group, tasks = (min(work.group, a.tiles - first) + DECODED_TASK - 1) / DECODED_TASK, within = task % whole;
            if (first >= a.tiles || within >= tasks * chunks) { return false; }
            t.number = first + within % tasks * DECODED_TASK, t.chunk = within / tasks;
            tiles = min((int)DECODED_TASK, a.tiles - t.number), left = tiles - 1;
        }
        t.tile = locate_tile(a, t.number);
        t.load(a);
        return true;
    };
    for (bool there = next(); there;) {
        uint32_t *ready = work.ready + t.number / WIDE_TILES * chunks + t.chunk;
        int whole = left == 0 ? tiles : 0; /* a task that ends here */
        if (whole > 0 && p.lane == 0) { claimed = atomicAdd(work.claimed, 1); }
        t.decode(work.values, a, p.part, table);
        there = next();
        if (whole == 0) { continue; }
        fence_for_copies();
        __syncwarp();
        if (p.lane == 0) { release_add(ready, whole); }
    }
}

/* ---- what is brought, by one lane -------------------------------------------------------------------------------------- */

__device__ __forceinline__ void decoded_fetch(const small_args &a, wide_place p, const decoded_work &work, const ql_tensor_map *x, const ql_tensor_map *values) {
    constexpr int tokens = 8 * DECODED_TOKENS8 / DECODED_BLOCKS;
    int chunks = (a.x_line + DECODED_CHUNK - 1) / DECODED_CHUNK;
    wide_ring ring = {0, 1}; /* all stages are free at first */
    for (int turn = 0; decoded_take(p, turn); turn++) {
        int outputs = p.item / p.across, token = p.item % p.across * (8 * DECODED_TOKENS8) + p.block * tokens;
        int tiles = min(WIDE_TILES, a.tiles - outputs * WIDE_TILES); /* none: nothing is waited for */
        for (int column = 0; column < a.x_line; column += DECODED_COLUMNS) {
            uint32_t full = decoded_full(p, ring.stage), to = decoded_stage(p, ring.stage);
            if (column % DECODED_CHUNK == 0 && tiles > 0) {
                while (acquire_load(work.ready + outputs * chunks + column / DECODED_CHUNK) < (uint32_t)tiles) {}
                fence_for_copies();
            }
            barrier_wait(decoded_free(p, ring.stage), ring.phase);
            barrier_arrive_expect(full, DECODED_STAGE);
            copy_tensor_multicast(to + p.block * (DECODED_X / DECODED_BLOCKS), x, column, token, full, (1 << DECODED_BLOCKS) - 1);
            copy_tensor(to + DECODED_X, values, column, outputs * DECODED_ROWS, full);
            wide_advance(ring, DECODED_STAGES);
        }
    }
}

/* ---- what becomes of the sums ------------------------------------------------------------------------------------------- */

/* lines of an item that a lane has still to store, a piece of one at a time */
struct decoded_lines {
    int left;
    uint32_t from;         /* in shared memory */
    int token, step;       /* of the line, from line to line */
    char *out;             /* where its piece goes, of row 0 */
    int bytes, part;       /* of a row; of the product */
    int ordered;           /* 0, or the places of a line are turned by ordered - 1 */

    __device__ __forceinline__ void store_one(const small_args &a) {
        const small_part &of = a.part[part];
        if (token < a.m) {
            char *to = out + (int64_t)(of.rows != NULL ? __ldg(of.rows + token) : token) * bytes;
            if (ordered > 0) { /* a pair of each unit */
                uint32_t v[WIDE_GROUP_TILES];
#pragma unroll
                for (int unit = 0; unit < WIDE_GROUP_TILES; unit++) { v[unit] = load_shared<uint32_t>(from + (unit ^ (ordered - 1)) * 16); }
                *(uint4 *)to = make_uint4(v[0], v[1], v[2], v[3]);
            } else {
                *(float4 *)to = load_shared<float4>(from);
            }
        }
        from += WIDE_GROUP_TILES * WARP * 16, token += step, left--;
    }
};

/* the item as lines at `stage` */
template <int Output>
__device__ __forceinline__ void decoded_emit(const small_args &a, const wide_place &p, const wide_item &item, const wide_lines &l, uint32_t stage,
                                             const float (&sums)[4 * DECODED_TOKENS8]) {
    enum { AT_ONCE = 2 * WIDE_ROUND }; /* whose angles come at once */
    int angle[DECODED_TOKENS8 / WIDE_ROUND];
#pragma unroll
    for (int i = 0; i < DECODED_TOKENS8 / WIDE_ROUND; i++) { angle[i] = wide_angle<Output>(a, p.lane, item.token8 + i * WIDE_ROUND, 0); }
#pragma unroll
    for (int round = 0; round < DECODED_TOKENS8; round += AT_ONCE) {
        wide_turns turns[2];
#pragma unroll
        for (int i = 0; i < 2; i++) { turns[i] = wide_turns_of<Output>(l, p.lane, angle[round / WIDE_ROUND + i], WIDE_ROUND); }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float4 sum[WIDE_ROUND];
#pragma unroll
            for (int j = 0; j < WIDE_ROUND; j++) {
                const float *from = sums + 4 * (round + i * WIDE_ROUND + j);
                sum[j] = make_float4(from[0], from[1], from[2], from[3]);
            }
#pragma unroll
            for (int j = 0; j < WIDE_ROUND; j += 2) {
                wide_emit<Output>(l, stage + (round + i * WIDE_ROUND + j) * 8 * wide_line<Output>::bytes, turns[i].of, j, sum);
            }
        }
    }
}

template <int Output>
__device__ __forceinline__ void decoded_finish_lines(const small_args &a, const wide_place &p, const wide_item &item, decoded_lines &lines,
                                                     const float (&sums)[4 * DECODED_TOKENS8]) {
    typedef wide_line<Output> line;
    const small_part &part = a.part[item.tile.part];
    wide_lines l = wide_lines_of<Output>(a, p, item);
    uint32_t stage = p.base + DECODED_LINES + p.warp / WIDE_GROUP_TILES * DECODED_PLACE;
    bool ordered = Output == SMALL_SWIGLU && part.ordered;
    lines.part = item.tile.part, lines.out = l.out, lines.bytes = l.bytes, lines.step = line::lines, lines.ordered = ordered ? 1 + line::turn(l.line) : 0;
    wide_group_barrier(p); /* what stood there has been stored */
    decoded_emit<Output>(a, p, item, l, stage, sums);
    lines.left = 8 * DECODED_TOKENS8 / line::lines, lines.token = 8 * item.token8 + l.line;
    lines.from = stage + (ordered ? l.line * line::bytes + l.piece * 4 : line::piece(l.line, l.piece));
    wide_group_barrier(p);
}

/* the sums of the turn's item to where they belong, or to `lines` */
__device__ __forceinline__ void decoded_finish(const small_args &a, const wide_place &p, decoded_lines &lines, int &round, const float (&sums)[4 * DECODED_TOKENS8]) {
    wide_item item = wide_item_of<DECODED_TOKENS8>(a, p);
    if (!wide_has_lines(a, item, wide_tile(a, p, WIDE_TILES - 1), wide_tile_number(p, WIDE_TILES - 1) < a.tiles)) {
        return wide_finish_any<DECODED_TOKENS8>(a, p, item, round, sums);
    }
    switch (a.part[item.first.part].output) {
    case SMALL_BF16: return decoded_finish_lines<SMALL_BF16>(a, p, item, lines, sums);
    case SMALL_ROPE: return decoded_finish_lines<SMALL_ROPE>(a, p, item, lines, sums);
    default: return decoded_finish_lines<SMALL_SWIGLU>(a, p, item, lines, sums);
    }
}

/* ---- products ---------------------------------------------------------------------------------------------------------- */

/* what was read of a stage is free, in this block and where its activations are brought from */
__device__ __forceinline__ void decoded_release(const wide_place &p, int stage) {
    __syncwarp();
#pragma unroll
    for (int block = 0; block < DECODED_BLOCKS; block++) {
        if (warp_arrivals(1) > 1 || p.lane == block) { barrier_arrive_cluster(cluster_address(decoded_free(p, stage), block)); }
    }
}

__device__ __forceinline__ void decoded_multiply(const small_args &a, wide_place p) {
    wide_ring ring = {0, 0};
    int round = 0, steps = a.x_line / DECODED_COLUMNS;
    uint32_t mine = DECODED_X + p.warp / WIDE_GROUP_TILES * (DECODED_VALUES / 2);
    decoded_lines lines = {};
    for (int turn = 0; decoded_take(p, turn); turn++) {
        float sums[4 * DECODED_TOKENS8];
        int held = -1; /* the stage that is being multiplied */
#pragma unroll
        for (int i = 0; i < 4 * DECODED_TOKENS8; i++) { sums[i] = 0.0f; }
        pin(sums);
#pragma unroll 1
        for (int step = 0; step < steps; step++) {
            uint32_t at = decoded_stage(p, ring.stage), x = (uint32_t)descriptor(at, 16), values = (uint32_t)descriptor(at + mine, 16);
            barrier_wait(decoded_full(p, ring.stage), ring.phase);
            products_begin();
#pragma unroll
            for (int i = 0; i < DECODED_COLUMNS / STEP; i++) {
                multiply_tiles(sums, values + i * (STEP * 2 / 16), x + i * (STEP * 2 / 16));
            }
            products_commit();
            if (lines.left > 0) { lines.store_one(a); } /* of the item ahead, while these run */
            products_wait<1>();                         /* those ahead of them */
            if (held >= 0) { decoded_release(p, held); }
            held = ring.stage;
            wide_advance(ring, DECODED_STAGES);
        }
        while (lines.left > 0) { lines.store_one(a); }
        products_wait<0>();
        pin(sums);
        if (held >= 0) { decoded_release(p, held); }
        decoded_finish(a, p, lines, round, sums);
    }
    while (lines.left > 0) { lines.store_one(a); }
}

/* ---- the kernel ---------------------------------------------------------------------------------------------------------- */

template <typename Codes> __device__ __forceinline__ wide_place decoded_start(const small_args &a, const void *shared) {
    wide_place p = {};
    p.warp = __shfl_sync(QL_FULL_WARP, threadIdx.x / WARP, 0); /* the same in all lanes: descriptors stay in uniform registers */
    p.block = cluster_rank(), p.lane = threadIdx.x % WARP;
    p.part = __ffs(Codes::columns / STEP / a.parts) - 1;
    p.across = (a.m + 8 * DECODED_TOKENS8 - 1) / (8 * DECODED_TOKENS8);
    p.items = (a.tiles + WIDE_TILES - 1) / WIDE_TILES * p.across;
    p.base = (shared_address(shared) + 1023) & ~1023u;
    p.l.received = DECODED_LINES;
    if (threadIdx.x < DECODED_STAGES) {
        barrier_init(decoded_full(p, threadIdx.x), 1);
        barrier_init(decoded_free(p, threadIdx.x), DECODED_BLOCKS * warp_arrivals(WIDE_TILES));
    }
    if (Codes::table) { fill_small_table(p.base + DECODED_TABLE, a, threadIdx.x, WIDE_THREADS); }
    barrier_init_fence();
    return p;
}

/* the last block leaves zeros for the next kernel, behind all that was counted; by a warp, once its block is done */
__device__ __forceinline__ void decoded_end(const wide_place &p, const decoded_work &work) {
    __threadfence();
    uint32_t ended = p.lane == 0 ? atomicAdd(work.done, 1) + 1 : 0;
    __threadfence();
    if (__shfl_sync(QL_FULL_WARP, ended, 0) < gridDim.x) { return; }
    for (int i = p.lane; i < work.counters; i += WARP) { work.claimed[i] = 0; }
}

template <typename Codes>
__device__ __forceinline__ void decoded_body(const small_args &a, const decoded_work &work, const ql_tensor_map *x, const ql_tensor_map *values) {
    extern __shared__ __align__(128) uint8_t shared[];
    wide_place p = decoded_start<Codes>(a, shared);
    cluster_arrive();
    __syncthreads();
    ql_cuda_start_next();
    cluster_wait();
    ql_cuda_wait_previous();
    if (p.warp >= WIDE_TILES) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
        if (p.warp > WIDE_TILES) { decoded_decode<typename decoded_codes<Codes>::type>(a, p, work, p.base + DECODED_TABLE); }
        if (p.warp == WIDE_TILES && p.lane == 0) { decoded_fetch(a, p, work, x, values); }
        __syncwarp();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
        decoded_multiply(a, p);
    }
    cluster_sync(); /* the other block may still release stages here */
    if (p.warp == 0) { decoded_end(p, work); }
}

#endif

template <typename Codes>
__global__ void __launch_bounds__(WIDE_THREADS, 1) small_decoded(const __grid_constant__ small_args a, const __grid_constant__ decoded_work work,
                                                                 const __grid_constant__ ql_tensor_map x, const __grid_constant__ ql_tensor_map values) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    decoded_body<Codes>(a, work, &x, &values);
#else
    __trap(); /* not chosen: linear_packed.cu */
#endif
}

#endif
