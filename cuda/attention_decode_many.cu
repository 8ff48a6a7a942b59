/* attention_decode_many.cu: attention of one query a sequence (attention_decode.cu) where there are many (sequence, kv head), and no long sequence: a
 * block takes one after the other, all tiles of it, while the tiles that come next are on their way, those of the next one too. So memory is never idle,
 * as it is between blocks of one chunk each, and nothing is joined across blocks. A tile is a chunk, and they are added up in their order: the bits are
 * the same.
 *
 * Tile t + Stages - 1 replaces tile t - 1 once all warps have made their scores of tile t: those lie where the scores of t - 2 were. Three stages, or, where
 * the blocks of a multiprocessor have many items anyway, two, which leave room for one block more.
 *
 *   shared: barriers of the stages | stages of: Q (group, d + 8), where a sequence begins | K (64, d + 8) | V (64, d + 8); scores (2, 8 halves, 68) float */
#include "attention_decode.cuh"

enum { KEYS = 64, BARRIERS = 64 /* bytes */, MULTIPROCESSOR_MEMORY = 228 << 10, RESERVED = 1 << 10 /* of a block */ };
enum { MOST_KEYS = 1024 };
static_assert(chunk_keys(MOST_KEYS) == KEYS, "up to MOST_KEYS a chunk is a tile");

#ifdef QL_HAS_BULK_COPY

/* a tile of the block's work */
struct tile_cursor {
    int item, head;     /* item: kv head `head` of a sequence, sequence * hkv + head */
    int keys, done;     /* of the sequence; ahead of the tile */
    int64_t query, row; /* of the sequence: its query, the row of its first key */
};

/* goes to the first tile of the first item, from this one on, that has a query */
static __device__ __forceinline__ void seek_item(tile_cursor &c, const attention_args<bf16> &args) {
    c.done = 0;
    for (; c.item < args.b * args.hkv; c.item += gridDim.x) {
        int sequence = c.item / args.hkv;
        c.head = c.item - sequence * args.hkv;
        c.query = args.q_start[sequence], c.keys = (int)args.kv_len[sequence], c.row = args.kv_start[sequence];
        if (args.q_start[sequence + 1] > c.query) { return; }
    }
}
static __device__ __forceinline__ void next_tile(tile_cursor &c, const attention_args<bf16> &args) {
    c.done += KEYS;
    if (c.done >= c.keys) { c.item += gridDim.x, seek_item(c, args); }
}

/* where a stage stands; a line of it is D + 8 values */
template <int D> struct tile_stage {
    uint32_t full; /* its barrier: all threads' copies have arrived */
    bf16 *q, *k, *v;
    __device__ __forceinline__ tile_stage(bf16 *shared, int stage, int group) {
        full = shared_address(shared) + 8 * stage;
        q = shared + BARRIERS / sizeof(bf16) + stage * ((group + 2 * KEYS) * (D + 8)), k = q + group * (D + 8), v = k + KEYS * (D + 8);
    }
    /* once this thread's copies until here are there */
    __device__ __forceinline__ void arrive() const { asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(full) : "memory"); }
};

/* keys and values of the tile, zeros behind the last; but for the newest where it is `held` back */
template <int D> __device__ __forceinline__ void load_keys(const tile_stage<D> &to, const attention_args<bf16> &args, const tile_cursor &c, bool held) {
    int step = args.hkv * D, left = c.keys - c.done, skip = held && left <= KEYS ? left - 1 : -1;
    int64_t from = (c.row + c.done) * step + c.head * D;
    if constexpr (THREADS % (D / 8) == 0) { /* a thread's rows are equally far apart */
        constexpr int rows = THREADS / (D / 8);
        int row = threadIdx.x / (D / 8), column = threadIdx.x % (D / 8) * 8;
        uint32_t line = shared_address(to.k + row * (D + 8) + column);
        from += row * step + column;
#pragma unroll
        for (int i = 0; i < KEYS / rows; i++, row += rows, from += rows * step) {
            if (row == skip) { continue; }
            copy_async_16(line + i * rows * (D + 8) * 2, args.k + from, row < left);
            copy_async_16(line + (KEYS + i * rows) * (D + 8) * 2, args.v + from, row < left);
        }
    } else {
        load_tile<D, KEYS>(to.k, args.k + from, step, left, skip);
        load_tile<D, KEYS>(to.v, args.v + from, step, left, skip);
    }
}

/* what was held back of a sequence's first tile */
template <int D> __device__ __forceinline__ void load_newest(const tile_stage<D> &to, const attention_args<bf16> &args, const tile_cursor &c) {
    int column = threadIdx.x % (D / 8) * 8, values = threadIdx.x / (D / 8);
    int64_t from = ((c.row + c.keys - 1) * args.hkv + c.head) * D + column;
    if (c.keys > KEYS || values > 1) { return; }
    copy_async_16(shared_address((values ? to.v : to.k) + (c.keys - 1) * (D + 8) + column), (values ? args.v : args.k) + from, true);
}

template <int D> __device__ __forceinline__ void load_queries(const tile_stage<D> &to, const attention_args<bf16> &args, const tile_cursor &c, int group) {
    const bf16 *from = args.q + (c.query * args.hq + c.head * group) * D;
#pragma unroll 1
    for (int i = threadIdx.x; i < group * (D / 8); i += THREADS) {
        copy_async_16(shared_address(to.q + i / (D / 8) * (D + 8) + i % (D / 8) * 8), from + 8 * i, true);
    }
}

/* the next tile, if there is one, to stage `stage` */
template <int D> __device__ __forceinline__ void load_stage(bf16 *shared, int stage, const attention_args<bf16> &args, tile_cursor &c, int group) {
    tile_stage<D> to(shared, stage, group);
    if (c.item >= args.b * args.hkv) { return; }
    load_keys<D>(to, args, c, false);
    if (c.done == 0) { load_queries<D>(to, args, c, group); }
    to.arrive();
    next_tile(c, args);
}

/* The first tiles; false: there is none. The newest key alone comes from the kernel ahead, and the queries (attention_decode.cu). */
template <int D, int Stages> __device__ __forceinline__ bool load_first(bf16 *shared, const attention_args<bf16> &args, tile_cursor &c, int group) {
    bool any = c.item < args.b * args.hkv;
    tile_stage<D> first(shared, 0, group);
    if (threadIdx.x == 0) {
        for (int i = 0; i < Stages; i++) { barrier_init(first.full + 8 * i, THREADS); }
    }
    __syncthreads();
    if (any) { load_keys<D>(first, args, c, true); }
    ql_cuda_wait_previous();
    ql_cuda_start_next();
    if (!any) { return false; }
    load_newest<D>(first, args, c), load_queries<D>(first, args, c, group);
    first.arrive();
    next_tile(c, args);
    for (int i = 1; i < Stages - 1; i++) { load_stage<D>(shared, i, args, c, group); }
    return true;
}

/* what a warp has of a row a half: its columns of weighted values, the maximum and the sum of weights */
template <int D> struct row_state {
    float value[(D / 8 + WARPS - 1) / WARPS][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {};
};

/* adds the values of a tile, weighed; scores: of the tile, of all warps */
template <int D, int Halves> __device__ __forceinline__ void add_tile(row_state<D> &all, const float *scores, const bf16 *v) {
    row_state<D> part;
    uint32_t weights[KEYS / 16][4];
    float keep[2];
    weigh<KEYS, Halves>(weights, scores, part.top, part.total, keep);
    add_values<D, KEYS>(part.value, weights, v);
#pragma unroll
    for (int r = 0; r < Halves; r++) {
        float2 factors = join_part(all.top[r], all.total[r], make_float2(part.top[r], part.total[r]));
#pragma unroll
        for (int i = 0; i < (D / 8 + WARPS - 1) / WARPS; i++) {
            all.value[i][2 * r] = joined(all.value[i][2 * r], factors, part.value[i][2 * r]);
            all.value[i][2 * r + 1] = joined(all.value[i][2 * r + 1], factors, part.value[i][2 * r + 1]);
        }
    }
}

#endif

/* Halves: 1 where a group has at most 8 heads */
template <int D, int Halves, int Stages> __global__ void __launch_bounds__(THREADS) attention_decode_many_kernel(attention_args<bf16> args) {
#ifdef QL_HAS_BULK_COPY
    constexpr int stride = D + 8;
    extern __shared__ __align__(128) bf16 shared[];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, group = args.hq / args.hkv, items = args.b * args.hkv;
    float *scores = (float *)tile_stage<D>(shared, Stages, group).q;
    tile_cursor ahead = {(int)blockIdx.x, 0, 0, 0, 0, 0};
    seek_item(ahead, args);
    tile_cursor now = ahead;
    if (!load_first<D, Stages>(shared, args, ahead, group)) { return; }

    uint32_t queries[D / 16][4];
    row_state<D> all;
    for (int stage = 0, phase = 0, turn = 0; now.item < items; turn ^= 1) {
        tile_stage<D> tile(shared, stage, group);
        float *mine = scores + turn * 8 * Halves * score_stride<KEYS>();
        barrier_wait(tile.full, phase);
        if (now.done == 0) { /* rows from the group on are what stands behind: nothing is made of their scores */
#pragma unroll
            for (int i = 0; i < D / 16; i++) { load_matrix_4(queries[i], shared_address(tile.q + lane % 16 * stride + lane / 16 * 8 + i * 16)); }
        }
        score_keys<D, KEYS, Halves>(
            mine, [&](uint32_t (&a)[4], int i) { a[0] = queries[i][0], a[1] = queries[i][1], a[2] = queries[i][2], a[3] = queries[i][3]; },
            shared_address(tile.k + (warp * 16 + lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8), now.keys - now.done, args.scale);
        __syncthreads(); /* all scores are there, and the tile before has been read */
        load_stage<D>(shared, stage > 0 ? stage - 1 : Stages - 1, args, ahead, group);
        add_tile<D, Halves>(all, mine, tile.v);
        if (++stage == Stages) { stage = 0, phase ^= 1; }
        now.done += KEYS;
        if (now.done < now.keys) { continue; }
        each_pair<D>(
            all.value, all.top, all.total, group,
            [&](int row, int column, float2 values, float total) { store_pair<D>(args, now.query, now.head, row, column, values, total); },
            [](int, float2) {});
        all = row_state<D>();
        now.item += gridDim.x, seek_item(now, args);
    }
#endif
}

template <int D, int Stages> static void launch_staged(const attention_args<bf16> &args) {
    int items = args.b * args.hkv, group = args.hq / args.hkv, halves = group > 8 ? 2 : 1;
    int bytes = BARRIERS + Stages * (group + 2 * KEYS) * (D + 8) * (int)sizeof(bf16) + 2 * 8 * halves * score_stride<KEYS>() * (int)sizeof(float);
    int places = ql_cuda_multiprocessors() * (MULTIPROCESSOR_MEMORY / (bytes + RESERVED));
    ql_cuda_launch(halves > 1 ? attention_decode_many_kernel<D, 2, Stages> : attention_decode_many_kernel<D, 1, Stages>,
                   dim3((unsigned)(items < places ? items : places)), dim3(THREADS), (size_t)bytes, true, args);
}

template <int D> static void launch_many(const attention_args<bf16> &args) {
    enum { MANY_ITEMS = 6 /* of a multiprocessor, as measured on an H100 */ };
    if (args.b * args.hkv >= MANY_ITEMS * ql_cuda_multiprocessors()) {
        launch_staged<D, 2>(args);
    } else {
        launch_staged<D, 3>(args);
    }
}

bool ql_attention_decode_many(const attention_args<bf16> &args, int64_t max_keys) {
    if (max_keys <= FEW_KEYS || max_keys > MOST_KEYS || ql_cuda_capability() < 90) { return false; }
    if ((int64_t)args.b * args.hkv < ql_cuda_multiprocessors()) { return false; }
    attention_args<bf16> scaled = args;
    scaled.scale *= 1.4426950408889634f; /* log2 e: weights are powers of two */
    switch (args.d) {
    case 64: launch_many<64>(scaled); return true;
    case 80: launch_many<80>(scaled); return true;
    case 96: launch_many<96>(scaled); return true;
    case 128: launch_many<128>(scaled); return true;
    }
    return false;
}
