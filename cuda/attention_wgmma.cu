/* attention_wgmma.cu: causal attention of many queries by the warpgroup instructions of sm_90a (after FlashAttention-3, Shah et
 * al. 2024), for head size 128 (at 64 the kernel of attention_prefill.cu is as fast).
 *
 * A block, one an SM, walks its share of the items (128 query rows of one head), those with most keys first. Warpgroup 0 loads:
 * Q, then tiles of 128 keys and values, two of each in flight. Warpgroups 1 and 2 own 64 rows each and run free of each
 * other, so that one multiplies while the other is at its exponentials; within a warpgroup the scores of tile j are issued
 * before the weighted values of tile j - 1, and their softmax runs beside the latter.
 *
 * Rows in shared memory are 64 elements (128 bytes) wide, one panel for each 64 columns, 16-byte chunk c of row r at
 * c ^ (r % 8): the 128-byte swizzle of the matrix descriptors. K and Q are read along their columns, V across.
 *
 *   shared: Q (d / 64, 128, 64) | K, V (2 stages, d / 64, 128, 64) each | output (128, d + 8) | barriers
 *   registers, d = 128: output 64, scores 64, weights 32 */
#include "attention.cuh"
#include "cuda.h"
#include "pipeline.cuh"
#include "wgmma.cuh"

enum { THREADS = 384, GROUP = 128, ROWS = 128, KEYS = 128, STAGES = 2, PANEL = 128 * 64 }; /* PANEL: elements */

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* ---- warpgroup products ------------------------------------------------------------------------------------------- */

/* s (64, 128) = or += Q (64, 16) K (128, 16)^T, both in shared memory */
__device__ __forceinline__ void multiply_qk(float (&s)[64], uint64_t q, uint64_t k, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,"
                 "%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,"
                 "%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"
                 ", %64, %65, p, 1, 1, 0, 0;\n}\n"
                 : QL_OUT_64(s)
                 : "l"(q), "l"(k), "r"(accumulate));
}
/* out (64, 128) += weights (64, 16) V (16, 128); V in shared memory, its columns contiguous */
__device__ __forceinline__ void multiply_pv(float (&out)[64], const uint32_t *a, uint64_t v) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,"
                 "%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,"
                 "%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"
                 ", {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
                 : QL_OUT_64(out)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(v));
}
/* ---- loading --------------------------------------------------------------------------------------------------------- */

struct barriers {
    uint64_t q_full, q_empty, full[2 * STAGES], empty[2 * STAGES]; /* K stages, then V stages */
};

__device__ __forceinline__ bool barrier_passed(uint32_t barrier, uint32_t parity) {
    uint32_t passed;
    asm volatile("{\n.reg .pred p;\n"
                 "mbarrier.test_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(passed)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return passed != 0;
}

/* A loading thread's view: a load is told only once it has arrived, and that is looked at after the next load was issued, or
 * before the thread would have to wait: the multiplying threads may be waiting for it. */
struct loader {
    uint32_t pending = 0;

    __device__ __forceinline__ void tell() {
        if (pending == 0) { return; }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        barrier_arrive(pending);
        pending = 0;
    }
    /* 128 rows, `step` elements apart, zeros from row `valid` on, once `empty` has passed */
    template <int D>
    __device__ __forceinline__ void load(uint32_t to, const bf16 *from, int64_t step, int valid, uint32_t full, uint32_t empty,
                                         uint32_t parity) {
        constexpr int chunks = D / 8, rows = GROUP / chunks;
        if (!barrier_passed(empty, parity)) {
            copy_async_wait<0>();
            tell();
            barrier_wait(empty, parity);
        }
        int thread = threadIdx.x % GROUP, row = thread / chunks, chunk = thread % chunks;
        uint32_t place = to + chunk / 8 * PANEL * 2 + row * 128 + ((chunk % 8) ^ (row % 8)) * 16;
        const bf16 *line = from + row * step + chunk * 8;
#pragma unroll 4
        for (int i = 0; i < 128 / rows; i++) { /* rows are multiples of 8 apart: the swizzle stays */
            bool there = row + i * rows < valid;
            copy_async_16(place + i * rows * 128, there ? line + i * rows * step : from, there);
        }
        copy_async_commit();
        copy_async_wait<1>();
        tell();
        pending = full;
    }
};

/* ---- items ----------------------------------------------------------------------------------------------------------- */

struct item {
    int64_t query;  /* of its first row, in q */
    int64_t kv_row; /* of the first key */
    int rows, keys, before, head, tiles; /* rows that are there; keys of the sequence; keys that row -1 sees; tiles of keys */
};

/* false where item `index` of the grid has no rows */
__device__ __forceinline__ bool find(item &w, const attention_args<bf16> &args, int index, int query_tiles) {
    int sequence = index / args.hq % args.b, first = (query_tiles - 1 - index / (args.hq * args.b)) * ROWS;
    int64_t begin = args.q_start[sequence];
    int queries = (int)(args.q_start[sequence + 1] - begin);
    w.rows = queries - first, w.keys = (int)args.kv_len[sequence], w.head = index % args.hq;
    w.query = begin + first, w.kv_row = args.kv_start[sequence], w.before = w.keys - queries + first;
    w.tiles = (min(w.before + ROWS, w.keys) + KEYS - 1) / KEYS;
    return w.rows > 0;
}

template <int D>
__device__ __forceinline__ void load_items(const attention_args<bf16> &args, int items, int query_tiles, uint32_t q, uint32_t kv,
                                           const barriers *b) {
    constexpr uint32_t bytes = D / 64 * PANEL * 2;
    int64_t q_step = (int64_t)args.hq * D, kv_step = (int64_t)args.hkv * D;
    loader l;
    item w;
    uint32_t done = 0, loads = 0;
    for (int i = blockIdx.x; i < items; i += gridDim.x) {
        if (!find(w, args, i, query_tiles)) { continue; }
        l.load<D>(q, args.q + w.query * q_step + w.head * D, q_step, w.rows, shared_address(&b->q_full),
                  shared_address(&b->q_empty), (done++ & 1) ^ 1);
        int64_t first = w.kv_row * kv_step + w.head / (args.hq / args.hkv) * D;
        for (int j = 0; j < w.tiles; j++, loads++) {
            int64_t key = (int64_t)j * KEYS;
            uint32_t parity = (loads / STAGES & 1) ^ 1;
#pragma unroll
            for (int v = 0; v < 2; v++) {
                int stage = v * STAGES + loads % STAGES;
                l.load<D>(kv + stage * bytes, (v ? args.v : args.k) + first + key * kv_step, kv_step, w.keys - (int)key,
                          shared_address(&b->full[stage]), shared_address(&b->empty[stage]), parity);
            }
        }
    }
    copy_async_wait<0>();
    l.tell();
}

/* ---- multiplying: one warpgroup, 64 rows -------------------------------------------------------------------------------- */

template <int D> struct state {
    float out[D / 2], score[64], maximum[2], sum[2];
    uint32_t weight[32];
};

/* -inf where the key is after the query; `seen`: keys of this tile that the lane's first row sees */
__device__ __forceinline__ void mask(float (&score)[64], int seen) {
    int column = 2 * (threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < 64; i++) {
        if (i / 4 * 8 + column + (i & 1) >= seen + (i >> 1 & 1) * 8) { score[i] = -INFINITY; }
    }
}

/* scores become weights; the factors that what came before is to be multiplied by */
template <int D> __device__ __forceinline__ void softmax(state<D> &s, float (&keep)[2], float scale_log2) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float top = s.maximum[r], part[2] = {0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < 64; i += 4) { top = fmaxf(top, fmaxf(s.score[i + 2 * r], s.score[i + 2 * r + 1])); }
        top = fmaxf(top, __shfl_xor_sync(QL_FULL_WARP, top, 1));
        top = fmaxf(top, __shfl_xor_sync(QL_FULL_WARP, top, 2));
        keep[r] = exp2_fast((s.maximum[r] - top) * scale_log2);
        s.maximum[r] = top;
        float shift = top * scale_log2;
#pragma unroll
        for (int i = 0; i < 64; i += 4) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float w = exp2_fast(fmaf(s.score[i + 2 * r + e], scale_log2, -shift));
                s.score[i + 2 * r + e] = w;
                part[e] += w;
            }
        }
        s.sum[r] = s.sum[r] * keep[r] + (part[0] + part[1]);
    }
}

/* the weights as A fragments */
template <int D> __device__ __forceinline__ void pack_weights(state<D> &s) {
#pragma unroll
    for (int i = 0; i < 32; i++) { s.weight[i] = pack_bf16(s.score[2 * i], s.score[2 * i + 1]); }
}

template <int D> __device__ __forceinline__ void issue_scores(state<D> &s, uint32_t q, uint32_t k) {
    pin(s.score);
    products_begin();
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        uint32_t at = i / 4 * PANEL * 2 + i % 4 * 32;
        multiply_qk(s.score, descriptor(q + at, 16), descriptor(k + at, 16), i > 0);
    }
    products_commit();
}
template <int D> __device__ __forceinline__ void issue_values(state<D> &s, uint32_t v) {
    pin(s.out);
    products_begin();
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++) { multiply_pv(s.out, s.weight + 4 * i, descriptor(v + i * 16 * 128, PANEL * 2)); }
    products_commit();
}

__device__ __forceinline__ void release(const uint64_t *barrier) {
    __syncwarp();
    if (threadIdx.x % WARP == 0) { barrier_arrive(shared_address(barrier)); }
}

/* out / sum through the warp's 16 rows of `shared` (16, D + 8) to rows of global memory; ordered: each column at its ordered_column */
template <int D>
__device__ __forceinline__ void write_rows(bf16 *to, int64_t step, int valid, bf16 *shared, state<D> &s, float scale_log2, float *lse,
                                           int64_t lse_step, int ordered) {
    int lane = threadIdx.x % WARP;
    __syncwarp(); /* the rows of the item before have been read */
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float total = s.sum[r];
        total += __shfl_xor_sync(QL_FULL_WARP, total, 1);
        total += __shfl_xor_sync(QL_FULL_WARP, total, 2);
        float inverse = 1.0f / total;
        if (lse != NULL && lane % 4 == 0 && r * 8 + lane / 4 < valid) {
            lse[(r * 8 + lane / 4) * lse_step] = log_sum(s.maximum[r], total, scale_log2);
        }
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
            int place = ordered ? i / 4 * 32 + lane % 4 * 8 + i % 4 * 2 : i * 8 + lane % 4 * 2; /* of column 8 i + 2 (lane % 4) */
            *(uint32_t *)(shared + (r * 8 + lane / 4) * (D + 8) + place) =
                pack_bf16(s.out[4 * i + 2 * r] * inverse, s.out[4 * i + 2 * r + 1] * inverse);
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16 * (D / 8) / WARP; i++) {
        int index = lane + i * WARP, row = index / (D / 8), chunk = index % (D / 8);
        if (row < valid) { *(uint4 *)(to + row * step + chunk * 8) = *(uint4 *)(shared + row * (D + 8) + chunk * 8); }
    }
}

template <int D>
__device__ __forceinline__ void multiply_items(const attention_args<bf16> &args, int items, int query_tiles, uint32_t q,
                                               uint32_t kv, bf16 *output, const barriers *b) {
    constexpr uint32_t bytes = D / 64 * PANEL * 2;
    int row = threadIdx.x / GROUP * 64 - 64, warp_row = row + threadIdx.x % GROUP / WARP * 16; /* in the item */
    uint32_t done = 0, loads = 0;
    item w;
    state<D> s;
    q += row * 128;
    for (int i = blockIdx.x; i < items; i += gridDim.x) {
        if (!find(w, args, i, query_tiles)) { continue; }
        int seen = w.before + warp_row + threadIdx.x % WARP / 4 + 1, unmasked = w.before + row + 1;
        float keep[2];
#pragma unroll
        for (int e = 0; e < D / 2; e++) { s.out[e] = 0.0f; }
        s.maximum[0] = s.maximum[1] = -INFINITY, s.sum[0] = s.sum[1] = 0.0f;
        barrier_wait(shared_address(&b->q_full), done++ & 1);
        for (int j = 0; j < w.tiles; j++, loads++) {
            uint32_t stage = loads % STAGES, parity = loads / STAGES & 1;
            uint32_t last = (loads - 1) % STAGES, last_parity = (loads - 1) / STAGES & 1;
            barrier_wait(shared_address(&b->full[stage]), parity);
            issue_scores(s, q, kv + stage * bytes);
            if (j > 0) {
                barrier_wait(shared_address(&b->full[STAGES + last]), last_parity);
                issue_values(s, kv + (STAGES + last) * bytes);
                products_wait<1>();
            } else {
                products_wait<0>();
            }
            pin(s.score);
            release(&b->empty[stage]);
            if (j + 1 == w.tiles) { release(&b->q_empty); }
            if ((j + 1) * KEYS > unmasked) { mask(s.score, seen - j * KEYS); }
            softmax(s, keep, args.scale);
            products_wait<0>();
            pin(s.out);
            if (j > 0) { release(&b->empty[STAGES + last]); }
            if (__any_sync(QL_FULL_WARP, keep[0] != 1.0f || keep[1] != 1.0f)) {
#pragma unroll
                for (int e = 0; e < D / 2; e++) { s.out[e] *= keep[e >> 1 & 1]; }
            }
            pack_weights(s);
        }
        uint32_t last = (loads - 1) % STAGES;
        barrier_wait(shared_address(&b->full[STAGES + last]), (loads - 1) / STAGES & 1);
        issue_values(s, kv + (STAGES + last) * bytes);
        products_wait<0>();
        pin(s.out);
        release(&b->empty[STAGES + last]);
        int64_t at = (w.query + warp_row) * args.hq + w.head;
        write_rows(args.out + at * D, (int64_t)args.hq * D, w.rows - warp_row, output + warp_row * (D + 8), s, args.scale,
                   args.lse != NULL ? args.lse + at : NULL, args.hq, args.ordered);
    }
}

#endif

template <int D> static constexpr size_t shared_bytes() {
    return (size_t)(1 + 2 * STAGES) * (D / 64) * PANEL * 2 + (size_t)ROWS * (D + 8) * 2 + 128 + 1024; /* 1024: to align */
}

/* one block an SM; item i: the query tile with the most keys first, then sequences, then heads */
template <int D>
__global__ void __launch_bounds__(THREADS, 1) attention_wgmma_kernel(attention_args<bf16> args, int items, int query_tiles) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    constexpr uint32_t bytes = D / 64 * PANEL * 2;
    extern __shared__ char raw[];
    char *shared = raw + (1024 - shared_address(raw) % 1024) % 1024;
    uint32_t q = shared_address(shared), kv = q + bytes;
    bf16 *output = (bf16 *)(shared + (1 + 2 * STAGES) * bytes);
    barriers *b = (barriers *)(output + ROWS * (D + 8));
    if (threadIdx.x == 0) {
        barrier_init(shared_address(&b->q_full), GROUP), barrier_init(shared_address(&b->q_empty), 2 * GROUP / WARP);
        for (int i = 0; i < 2 * STAGES; i++) {
            barrier_init(shared_address(&b->full[i]), GROUP), barrier_init(shared_address(&b->empty[i]), 2 * GROUP / WARP);
        }
        barrier_init_fence();
    }
    __syncthreads();
    ql_cuda_wait_previous();
    ql_cuda_start_next();
    if (threadIdx.x < GROUP) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        load_items<D>(args, items, query_tiles, q, kv, b);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        multiply_items<D>(args, items, query_tiles, q, kv, output, b);
    }
#else
    __trap(); /* not chosen: ql_attention_wgmma */
#endif
}

template <int D> static bool launch(attention_args<bf16> args, int64_t max_queries) {
    int64_t query_tiles = (max_queries + ROWS - 1) / ROWS, items = query_tiles * args.hq * args.b;
    int64_t blocks = ql_cuda_multiprocessors();
    static const bool there = ql_cuda_is_built((const void *)attention_wgmma_kernel<D>);
    if (!there || items > 0x7fffffff - blocks) { return false; }
    args.scale *= 1.4426950408889634f; /* log2 e: weights are powers of two */
    ql_cuda_launch(attention_wgmma_kernel<D>, dim3((unsigned)(items < blocks ? items : blocks)), dim3(THREADS),
                   shared_bytes<D>(), true, args, items, query_tiles);
    return true;
}

bool ql_attention_wgmma(const attention_args<bf16> &args, int64_t max_queries) {
    if (ql_cuda_capability() != 90) { return false; }
    return args.d == 128 && launch<128>(args, max_queries);
}
