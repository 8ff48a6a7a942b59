/* pipeline.cuh: barriers in shared memory, bulk copies that arrive on them, and clusters (sm_90). */
#ifndef QL_CUDA_PIPELINE_CUH
#define QL_CUDA_PIPELINE_CUH

#include "device.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define QL_HAS_BULK_COPY 1
#endif

#ifdef QL_HAS_BULK_COPY

/* ---- barriers: an address in shared memory, 8 bytes each ------------------------------------------------------- */

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
/* after the inits, before any other thread, copy or block of the cluster uses them (beside a block or cluster barrier) */
__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
/* A warp arrives, once all its lanes are here. The tool racecheck follows each thread by its own arrivals alone: for it, every lane
 * arrives (-DQL_RACECHECK, README.md). */
#ifdef QL_RACECHECK
__device__ __forceinline__ constexpr int warp_arrivals(int warps) { return warps * WARP; }
__device__ __forceinline__ void warp_arrive(uint32_t barrier, int) { barrier_arrive(barrier); }
#else
__device__ __forceinline__ constexpr int warp_arrivals(int warps) { return warps; }
__device__ __forceinline__ void warp_arrive(uint32_t barrier, int lane) {
    __syncwarp();
    if (lane == 0) { barrier_arrive(barrier); }
}
#endif
/* arrives once and lets the phase also wait for `bytes` of bulk copies */
__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
/* Arrives on a barrier of another block of the cluster, after what this thread read of shared memory. Nothing written is handed over:
 * a release for the cluster would wait for all stores to global memory that are on their way, about a microsecond. */
__device__ __forceinline__ void barrier_arrive_cluster(uint32_t barrier) {
    asm volatile("mbarrier.arrive.release.cta.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
/* until the phase of this parity is complete */
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}\n" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

/* true in one lane of a whole warp, always the same; what only that lane does the compiler issues once, without a loop over lanes */
__device__ __forceinline__ bool one_lane() {
    uint32_t chosen;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}\n" : "=r"(chosen));
    return chosen != 0;
}

/* ---- bulk copies from global memory: addresses and bytes are multiples of 16 ------------------------------------- */

/* what is read once should be the first to leave the L2 cache */
__device__ __forceinline__ uint64_t policy_evict_first() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ void copy_bulk(uint32_t to, const void *from, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
                 "r"(bytes), "r"(barrier)
                 : "memory");
}
__device__ __forceinline__ void copy_bulk_hint(uint32_t to, const void *from, uint32_t bytes, uint32_t barrier, uint64_t policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
                 : "memory");
}

/* a box of a matrix (tensor_map.h) from column `column` and row `row` on; completes as many bytes of the barrier as it has, zeros included */
__device__ __forceinline__ void copy_tensor(uint32_t to, const void *map, int column, int row, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to), "l"(map),
                 "r"(column), "r"(row), "r"(barrier)
                 : "memory");
}
/* the same for all blocks of the cluster in `blocks` (bits), at the same places of their shared memory and on the same barriers */
__device__ __forceinline__ void copy_tensor_multicast(uint32_t to, const void *map, int column, int row, uint32_t barrier, int blocks) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
                 "l"(map), "r"(column), "r"(row), "r"(barrier), "h"((uint16_t)blocks)
                 : "memory");
}
/* Between threads of several blocks, by counters in global memory: what a warp wrote, each lane then fenced and its lanes met, is there for the copies of
 * who acquired what one of them released, and fenced. */
__device__ __forceinline__ void fence_for_copies() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
__device__ __forceinline__ void release_add(uint32_t *counter, uint32_t v) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(v) : "memory");
}
__device__ __forceinline__ uint32_t acquire_load(const uint32_t *counter) {
    uint32_t v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(counter) : "memory");
    return v;
}
/* brings what the copies are told of the matrix near: its first use would wait for it */
__device__ __forceinline__ void prefetch_tensor_map(const void *map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

/* ---- clusters ------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ uint32_t cluster_size() {
    uint32_t size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}
__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
/* The same in two halves, which say only that all blocks have come and that their barriers are there (barrier_init_fence): a
 * release would wait for all that is on its way, microseconds where copies were begun before. */
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
/* the same place in the shared memory of block `rank` of the cluster */
__device__ __forceinline__ uint32_t cluster_address(uint32_t address, uint32_t rank) {
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}
/* Says by all threads that the block has begun, and that its barrier, which counts `bytes` that come by cluster_store_async, is there; others store once
 * they have come back from cluster_wait. */
__device__ __forceinline__ void cluster_arrive_expect(uint32_t barrier, uint32_t bytes) {
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        barrier_init_fence();
        barrier_arrive_expect(barrier, bytes);
    }
    __syncwarp();
    cluster_arrive();
}
/* stores that complete `bytes` of a barrier of the same block as the address (of the cluster): no fence is needed */
__device__ __forceinline__ void cluster_store_async(uint32_t address, float4 v, uint32_t barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address), "f"(v.x),
                 "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier)
                 : "memory");
}
__device__ __forceinline__ void cluster_store_async(uint32_t address, float2 v, uint32_t barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(address), "f"(v.x), "f"(v.y), "r"(barrier)
                 : "memory");
}
__device__ __forceinline__ void cluster_store_async(uint32_t address, float v, uint32_t barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(address), "f"(v), "r"(barrier)
                 : "memory");
}

#endif

/* ---- shared memory by address: plain loads, which the compiler may move between the barriers ------------------------ */

template <typename T> __device__ __forceinline__ T load_shared(uint32_t address) {
    return *(const T *)__cvta_shared_to_generic(address);
}
template <typename T> __device__ __forceinline__ void store_shared(uint32_t address, T v) {
    *(T *)__cvta_shared_to_generic(address) = v;
}

#ifdef QL_HAS_BULK_COPY
/* 8 x 8 matrices of bfloat16 as products leave them, two columns of row l / 4 in lane l, turned: column j of matrix i goes to the 16 bytes whose
 * address is lane 8 i + j's */
__device__ __forceinline__ void store_transposed(uint32_t to, uint32_t a, uint32_t b) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(a), "r"(b) : "memory");
}
__device__ __forceinline__ void store_transposed(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
/* four floats of global memory += v */
__device__ __forceinline__ void add_vector(float *to, float4 v) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
#endif

/* a barrier of `threads` threads of the block; number 0 is that of __syncthreads */
__device__ __forceinline__ void block_barrier(int number, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

/* arrives there without waiting */
__device__ __forceinline__ void block_arrive(int number, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

#endif
