/* linear_wide_place.cuh: how a block of linear_wide.cuh lays out its shared memory, and which part of the work is its own. */
#ifndef QL_CUDA_LINEAR_WIDE_PLACE_CUH
#define QL_CUDA_LINEAR_WIDE_PLACE_CUH

#include "linear_small.cuh"

enum {
    WIDE_TILES = 8,                         /* of an item; warps that multiply */
    WIDE_THREADS = (WIDE_TILES + 4) * WARP, /* two warps of the last warpgroup bring what these need; registers are dealt out to warpgroups */
    WIDE_COLUMNS = 64,                      /* of a stage of activations: rows of 128 bytes */
    WIDE_BATCH = WIDE_COLUMNS / STEP,       /* steps that are decoded at once: those of a stage */
    WIDE_MAX_STAGES = 8,
    WIDE_ROUND = 4,                         /* fragments that a warp hands over, or turns, at once; also the most blocks of a cluster */
    WIDE_GROUP_TILES = 4,                   /* of a warpgroup */
    WIDE_TURNS = 4,                         /* times that a lane stores 16 bytes of a place */
    WIDE_PLACE = WIDE_TURNS * WIDE_GROUP_TILES * WARP * 16, /* bytes: lines of outputs of a warpgroup */
    WIDE_STAGE = 2 * WIDE_PLACE             /* of both */
};

template <typename Codes, int Tokens8> __host__ __device__ constexpr int wide_x_stages() { return Tokens8 <= 16 ? 6 : Codes::table ? 3 : 4; }
/* units that a bulk copy brings: two short ones */
template <typename Codes> __host__ __device__ constexpr int wide_together() { return (int)Codes::bytes == (int)CHUNK && !Codes::table ? 2 : 1; }

struct wide_layout {
    uint32_t x_full, x_free, weights_full, weights_free, received_full, received_free; /* barriers, 8 bytes each */
    uint32_t table, x, received, staging, weights, bytes;
};

/* stages: of weights; the bytes count what aligning the start may take */
template <typename Codes, int Tokens8> __host__ __device__ inline wide_layout wide_layout_of(int stages, int record) {
    wide_layout l;
    l.x_full = 0, l.x_free = l.x_full + 8 * WIDE_MAX_STAGES, l.weights_full = l.x_free + 8 * WIDE_MAX_STAGES;
    l.weights_free = l.weights_full + 8 * WIDE_MAX_STAGES, l.received_full = l.weights_free + 8 * WIDE_MAX_STAGES;
    l.received_free = l.received_full + 16 * WIDE_TILES, l.table = (l.received_free + 16 * WIDE_TILES + 127) / 128 * 128;
    l.x = (l.table + (Codes::table ? (uint32_t)TABLE_BYTES : 0u) + 1023) / 1024 * 1024;
    l.received = l.x + wide_x_stages<Codes, Tokens8>() * 8 * Tokens8 * WIDE_COLUMNS * 2, l.staging = l.received + 2 * WIDE_TILES * WIDE_ROUND * CHUNK;
    l.weights = l.staging + WIDE_STAGE;
    l.bytes = l.weights + (uint32_t)(stages * 2 * WIDE_TILES * wide_together<Codes>() * record) + 1024;
    return l;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* where a warp stands */
struct wide_place {
    uint32_t base;
    int cluster, block; /* log2 of the blocks of the cluster, number among them */
    int items, across;  /* all; those of the same outputs, which follow one another */
    int warp, lane;
    int part; /* log2 of the steps of a scale, which are a power of two */
    wide_layout l;
    /* of the turn: the item, whether it is the block's last; log2 of the blocks that split its K, number among them, units of the block */
    int item, shift, rank;
    bool last;
    small_range k;
};

/* The block's turn number `turn`: first items that it takes alone, a.alone of them, then what is left, which blocks of a cluster take together.
 * False: there is none. */
__device__ __forceinline__ bool wide_take(const small_args &a, wide_place &p, int turn) {
    int clusters = gridDim.x >> p.cluster, shared = a.alone * gridDim.x + (blockIdx.x >> p.cluster), together = turn - a.alone;
    bool alone = together < 0;
    p.item = alone ? blockIdx.x + turn * gridDim.x : shared + together * clusters;
    p.last = together + 1 >= 0 && shared + (together + 1) * clusters >= p.items;
    p.shift = alone ? 0 : p.cluster, p.rank = alone ? 0 : p.block;
    p.k = small_units_of(a.units, p.rank, p.shift);
    return p.item < p.items;
}

/* a place in a ring of stages */
struct wide_ring {
    int stage, phase;
};
__device__ __forceinline__ void wide_advance(wide_ring &r, int stages) {
    if (++r.stage == stages) { r.stage = 0, r.phase ^= 1; }
}

/* of the turn's item; there may be no such tile: wide_tile is then the last */
__device__ __forceinline__ int wide_tile_number(const wide_place &p, int warp) { return p.item / p.across * WIDE_TILES + warp; }
__device__ __forceinline__ small_tile wide_tile(const small_args &a, const wide_place &p, int warp) {
    return locate_tile(a, min(wide_tile_number(p, warp), a.tiles - 1));
}

#endif

#endif
