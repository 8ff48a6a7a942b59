/* attention_decode.cu: attention of one query a sequence over its cached keys, bf16 with float32 sums (split keys,
 * "Flash-Decoding", Dao et al. 2023).
 *
 * A block owns one chunk of the keys of one sequence and one kv head, and all the (up to 16) query heads of that group: they
 * are the 16 rows of the matrix products, so the keys are read once. Keys come in tiles of 64: each of 4 warps makes the scores
 * of 16 keys, all meet in shared memory, and each warp then weighs all 64 values for a quarter of the output's columns. Several
 * blocks an SM keep the memory busy, so tiles are not double-buffered. Where no sequence can have more than 32 keys (and d is 64 or
 * 128) a tile has 32, two warps make the scores, and more blocks share an SM; the bits are the same.
 *
 * Chunks are added up in their order: up to 8 (short contexts, sm_90) form a cluster, whose blocks send each other the columns
 * that each of them adds up; more go through scratch memory, and the block that ends last adds them up. Both compute the same
 * bits. Chunks depend on the sequence's own length alone, so its result does not depend on the batch, and the grid depends on
 * `max_keys` alone, so a recorded launch stays right while the lengths on the device grow.
 *
 * Before it waits for the kernel ahead a block loads its first tile, but for the newest key: that one alone comes from the
 * kernel ahead. Lengths and older keys were written before the last kernel that lets its follower start only after its own wait
 * (embedding, or the attention of the layer before), and so are there.
 *
 * Many (sequence, kv head) at once are attention_decode_many.cu's.
 *
 *   shared: Q (16, d + 8) | K (tile, d + 8) | V (tile, d + 8) | scores (16, tile + 4) float | of a cluster: parts, statistics
 *   parts: (chunks, group, columns) float; statistics: maximum and sum, (chunks, group, 2); in scratch for each (b, hkv) */
#include "attention_decode.cuh"

enum { MAX_COUNTERS = 1 << 16, MAX_CLUSTER = 8 };

/* how many blocks of (sequence, kv head) have ended; each goes back to 0 by itself */
static __device__ unsigned int ended[MAX_COUNTERS];

struct decode_args {
    attention_args<bf16> a;
    float *parts, *statistics; /* not of a cluster */
    int splits;                /* chunks that they have room for: the grid */
};

/* what a block is about */
struct chunk_work {
    int64_t query, keys, first_key, kv_row; /* kv_row: row of the first key of the chunk */
    int chunks, group;                      /* chunks 0: no query */
};

static __device__ __forceinline__ chunk_work look_up(const attention_args<bf16> &args) {
    int sequence = blockIdx.z;
    int64_t query = args.q_start[sequence], end = args.q_start[sequence + 1], start = args.kv_start[sequence];
    chunk_work w;
    w.query = query, w.keys = args.kv_len[sequence], w.first_key = blockIdx.x * chunk_keys(w.keys);
    w.kv_row = start + w.first_key;
    w.chunks = end > query ? (int)chunk_count(w.keys) : 0;
    w.group = args.hq / args.hkv;
    return w;
}

/* row `row` of keys and of values, and the queries of the group */
template <int D, int Keys>
__device__ __forceinline__ void load_row_and_queries(bf16 *k, bf16 *v, const bf16 *from_k, const bf16 *from_v, int64_t row,
                                                     int64_t step, bf16 *q, const bf16 *from_q, int group) {
    if (threadIdx.x < 2 * (D / 8) && row < Keys) {
        bool key = threadIdx.x < D / 8;
        int column = threadIdx.x % (D / 8) * 8;
        copy_async_16(shared_address((key ? k : v) + row * (D + 8) + column), (key ? from_k : from_v) + row * step + column, true);
    }
    for (int i = threadIdx.x; i < ROWS * (D / 8); i += THREADS) {
        int head = i / (D / 8), column = i % (D / 8) * 8;
        copy_async_16(shared_address(q + head * (D + 8) + column), from_q + (head < group ? head * D : 0) + column, head < group);
    }
}

/* the block's chunk of `left` keys, the first tile of which is on its way */
template <int D, int Keys>
__device__ __forceinline__ void attend_chunk(float (&out)[(D / 8 + WARPS - 1) / WARPS][4], float (&maximum)[2], float (&sum)[2],
                                             bf16 *q, bf16 *k, bf16 *v, float *scores, const bf16 *from_k, const bf16 *from_v,
                                             int64_t step, int left, float scale_log2) {
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    uint32_t q_lane = shared_address(q + lane % 16 * (D + 8) + lane / 16 * 8);
    uint32_t k_lane = shared_address(k + (warp * 16 + lane % 8 + lane / 16 * 8) * (D + 8) + lane / 8 % 2 * 8);
    for (int done = 0; done < left; done += Keys) {
        if (done > 0) {
            __syncthreads(); /* the tile before has been read */
            load_tile<D, Keys>(k, from_k + done * step, step, left - done, -1);
            load_tile<D, Keys>(v, from_v + done * step, step, left - done, -1);
        }
        copy_async_commit();
        copy_async_wait<0>();
        __syncthreads();
        if (warp < Keys / 16) {
            score_keys<D, Keys, 2>(scores, [&](uint32_t (&a)[4], int i) { load_matrix_4(a, q_lane + i * 32); }, k_lane, left - done, scale_log2);
        }
        __syncthreads();
        uint32_t weights[Keys / 16][4];
        float keep[2];
        weigh<Keys, 2>(weights, scores, maximum, sum, keep);
#pragma unroll
        for (int i = 0; i < (D / 8 + WARPS - 1) / WARPS; i++) {
            out[i][0] *= keep[0], out[i][1] *= keep[0], out[i][2] *= keep[1], out[i][3] *= keep[1];
        }
        add_values<D, Keys>(out, weights, v);
    }
}

/* a running maximum, sum and weighted values of one row and two columns */
struct pair_sum {
    float top, total;
    float2 value;
};
static __device__ __forceinline__ void add_part(pair_sum &s, float2 statistic, float2 part) {
    float2 factors = join_part(s.top, s.total, statistic);
    s.value.x = joined(s.value.x, factors, part.x), s.value.y = joined(s.value.y, factors, part.y);
}

/* Through scratch memory: the block of the group that ends last adds up all parts. */
template <int D>
__device__ __forceinline__ void combine_last(const decode_args &c, const chunk_work &w,
                                             const float (&out)[(D / 8 + WARPS - 1) / WARPS][4], const float (&maximum)[2],
                                             const float (&sum)[2]) {
    __shared__ bool last;
    int group = w.group;
    int64_t slot = (int64_t)blockIdx.z * c.a.hkv + blockIdx.y, part = (slot * c.splits + blockIdx.x) * group;
    each_pair<D>(
        out, maximum, sum, group,
        [&](int row, int column, float2 values, float) { *(float2 *)(c.parts + (part + row) * D + column) = values; },
        [&](int row, float2 statistic) { *(float2 *)(c.statistics + (part + row) * 2) = statistic; });
    __threadfence(); /* each thread's part is seen by all before the block counts as ended */
    __syncthreads();
    if (threadIdx.x == 0) { last = atomicInc(&ended[slot], (unsigned)w.chunks - 1) == (unsigned)w.chunks - 1; }
    __syncthreads();
    if (!last) { return; }
    __threadfence();
    const float *parts = c.parts + slot * c.splits * group * D, *statistics = c.statistics + slot * c.splits * group * 2;
    for (int i = threadIdx.x; i < group * (D / 2); i += THREADS) {
        int row = i / (D / 2), column = i % (D / 2) * 2;
        pair_sum s = {-INFINITY, 0.0f, {0.0f, 0.0f}};
#pragma unroll 8
        for (int chunk = 0; chunk < w.chunks; chunk++) {
            int64_t line = chunk * group + row;
            add_part(s, __ldcg((const float2 *)(statistics + line * 2)), __ldcg((const float2 *)(parts + line * D + column)));
        }
        store_pair<D>(c.a, w.query, blockIdx.y, row, column, s.value, s.total);
    }
}

#ifdef QL_HAS_BULK_COPY
/* bytes that block `rank` receives of all chunks, its own among them */
template <int D> __device__ __forceinline__ uint32_t inbound_bytes(const chunk_work &w, int rank) {
    int tiles = (D / 8 - rank + w.chunks - 1) / w.chunks; /* of 8 columns, that it adds up */
    return (uint32_t)(w.chunks * w.group * (8 * tiles + 2) * (int)sizeof(float));
}

/* Through the cluster: block r adds up columns [8 i, 8 i + 8), i % chunks == r, in its i / chunks'th slot. All blocks of the cluster have begun, and their
 * barriers `arrived` are there, which count what they receive: none ends before it has all that others send it, and no fence is needed. */
template <int D>
__device__ __forceinline__ void combine_cluster(const chunk_work &w, const float (&out)[(D / 8 + WARPS - 1) / WARPS][4],
                                                const float (&maximum)[2], const float (&sum)[2], const attention_args<bf16> &args, float *parts,
                                                uint32_t arrived) {
    int rank = blockIdx.x, slots = (D / 8 + w.chunks - 1) / w.chunks, width = slots * 8;
    float *statistics = parts + w.chunks * w.group * width;
    auto send = [&](const float *place, int to, float2 v) {
        cluster_store_async(cluster_address(shared_address(place), to), v, cluster_address(arrived, to));
    };
    each_pair<D>(
        out, maximum, sum, w.group,
        [&](int row, int column, float2 values, float) {
            int tile = column / 8;
            send(parts + (rank * w.group + row) * width + tile / w.chunks * 8 + column % 8, tile % w.chunks, values);
        },
        [&](int row, float2 statistic) {
            for (int to = 0; to < w.chunks; to++) { send(statistics + (rank * w.group + row) * 2, to, statistic); }
        });
    barrier_wait(arrived, 0);
    for (int i = threadIdx.x; i < w.group * slots * 4; i += THREADS) {
        int row = i / (slots * 4), at = i % (slots * 4) * 2, column = (at / 8 * w.chunks + rank) * 8 + at % 8;
        if (column >= D) { continue; }
        pair_sum s = {-INFINITY, 0.0f, {0.0f, 0.0f}};
#pragma unroll
        for (int chunk = 0; chunk < MAX_CLUSTER; chunk++) {
            if (chunk < w.chunks) {
                int line = chunk * w.group + row;
                add_part(s, *(const float2 *)(statistics + line * 2), *(const float2 *)(parts + line * width + at));
            }
        }
        store_pair<D>(args, w.query, blockIdx.y, row, column, s.value, s.total);
    }
}
#endif

/* the blocks of this cluster have all begun */
template <bool clustered> __device__ __forceinline__ void wait_cluster() {
#ifdef QL_HAS_BULK_COPY
    if (clustered) { cluster_wait(); }
#endif
}

/* grid (chunks, hkv, b); clustered: the chunks of a group are one cluster */
template <int D, int Keys, bool clustered> __global__ void __launch_bounds__(THREADS, Keys > FEW_KEYS ? 5 : 8) attention_decode_kernel(decode_args c) {
    constexpr int stride = D + 8, tiles_n = (D / 8 + WARPS - 1) / WARPS;
    extern __shared__ __align__(16) bf16 shared[];
    const attention_args<bf16> &args = c.a;
    chunk_work w = look_up(args);
    bool active = (int)blockIdx.x < w.chunks;
#ifdef QL_HAS_BULK_COPY
    __shared__ uint64_t received;
    uint32_t arrived = shared_address(&received);
    if (clustered) { cluster_arrive_expect(arrived, active ? inbound_bytes<D>(w, blockIdx.x) : 0); }
#endif
    int64_t step = (int64_t)args.hkv * D, left = min(chunk_keys(w.keys), w.keys - w.first_key), newest = w.keys - 1 - w.first_key;
    bf16 *q = shared, *k = q + ROWS * stride, *v = k + Keys * stride;
    float *scores = (float *)(v + Keys * stride);
    const bf16 *from_k = args.k + w.kv_row * step + (int64_t)blockIdx.y * D, *from_v = args.v + (from_k - args.k);
    if (active) {
        load_tile<D, Keys>(k, from_k, step, (int)left, newest < Keys ? (int)newest : -1);
        load_tile<D, Keys>(v, from_v, step, (int)left, newest < Keys ? (int)newest : -1);
    }
    ql_cuda_wait_previous();
    ql_cuda_start_next();
    if (!active) { return wait_cluster<clustered>(); }

    int64_t head = w.query * args.hq + (int64_t)blockIdx.y * w.group;
    float out[tiles_n][4] = {}, maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    load_row_and_queries<D, Keys>(k, v, from_k, from_v, newest, step, q, args.q + head * D, w.group);
    attend_chunk<D, Keys>(out, maximum, sum, q, k, v, scores, from_k, from_v, step, (int)left, args.scale);
    wait_cluster<clustered>();
    if (w.chunks == 1) {
        each_pair<D>(
            out, maximum, sum, w.group,
            [&](int row, int column, float2 values, float total) { store_pair<D>(args, w.query, blockIdx.y, row, column, values, total); },
            [](int, float2) {});
        return;
    }
#ifdef QL_HAS_BULK_COPY
    if (clustered) { return combine_cluster<D>(w, out, maximum, sum, args, scores + ROWS * score_stride<Keys>(), arrived); }
#endif
    combine_last<D>(c, w, out, maximum, sum);
}

template <int D, int Keys> static void launch_decode(decode_args args, dim3 grid, bool clustered) {
    int64_t group = args.a.hq / args.a.hkv;
    size_t bytes = (size_t)(ROWS + 2 * Keys) * (D + 8) * sizeof(bf16) + (size_t)ROWS * score_stride<Keys>() * sizeof(float);
    if constexpr (Keys > FEW_KEYS) { /* fewer are one chunk */
        if (clustered) {
            bytes += (size_t)group * ((D / 8 + grid.x) * 8 + grid.x * 2) * sizeof(float);
            return ql_cuda_launch_cluster(attention_decode_kernel<D, Keys, true>, grid, dim3(THREADS), bytes, true, grid.x, args);
        }
    }
    ql_cuda_launch(attention_decode_kernel<D, Keys, false>, grid, dim3(THREADS), bytes, true, args);
}

bool ql_attention_decode(const attention_args<bf16> &args, int64_t max_keys) {
    int64_t slots = (int64_t)args.b * args.hkv, group = args.hq / args.hkv;
    if (group > ROWS || args.b > 65535 || args.hkv > 65535 || slots > MAX_COUNTERS) { return false; }
    if (args.d != 64 && args.d != 80 && args.d != 96 && args.d != 128) { return false; }
    if (ql_attention_decode_many(args, max_keys)) { return true; }
    decode_args decode = {args, NULL, NULL, 1};
    /* the count of chunks is not monotonic in the number of keys: it is largest at the end of a step of chunk_keys */
    for (int64_t keys : {(int64_t)1024, (int64_t)4096, (int64_t)8192, max_keys}) {
        if (keys <= max_keys && chunk_count(keys) > decode.splits) { decode.splits = (int)chunk_count(keys); }
    }
    decode.a.scale *= 1.4426950408889634f; /* log2 e: weights are powers of two */
    bool clustered = decode.splits > 1 && decode.splits <= MAX_CLUSTER && ql_cuda_capability() >= 90;
    if (decode.splits > 1 && !clustered) {
        int64_t parts = slots * decode.splits * group;
        decode.parts = (float *)ql_cuda_scratch(QL_SCRATCH_ATTENTION, (size_t)(parts * (args.d + 2)) * sizeof(float));
        if (decode.parts == NULL) { return true; }
        decode.statistics = decode.parts + parts * args.d;
    }
    dim3 grid((unsigned)decode.splits, (unsigned)args.hkv, (unsigned)args.b);
    bool few = max_keys <= FEW_KEYS;
    switch (args.d) {
    case 64: (few ? launch_decode<64, FEW_KEYS> : launch_decode<64, 64>)(decode, grid, clustered); break;
    case 80: launch_decode<80, 64>(decode, grid, clustered); break;
    case 96: launch_decode<96, 64>(decode, grid, clustered); break;
    case 128: (few ? launch_decode<128, FEW_KEYS> : launch_decode<128, 64>)(decode, grid, clustered); break;
    }
    return true;
}
