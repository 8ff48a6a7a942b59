/* state.h: a device as backend.cu, memory.cu and libraries.cu see it; kernels see cuda.h. */
#ifndef QL_CUDA_STATE_H
#define QL_CUDA_STATE_H

#include "cuda.h"

enum { QL_CUDA_DEVICES = 16, QL_STAGES = 2, QL_KERNELS = 256 };
static const size_t QL_STAGE_BYTES = (size_t)16 << 20; /* of pinned memory, twice: uploads go through it */

typedef struct {
    int index, opened, capability, clusters[4]; /* clusters of 1, 2, 4, 8 blocks that fill an SM each, as many as run at once; 0: not asked for yet */
    ql_backend table;
    cudaDeviceProp properties;
    cudaStream_t stream;
    cudaMemPool_t pool;
    int recording;
    struct {
        void *memory;
        size_t bytes;
    } scratch[QL_SCRATCH_COUNT];
    struct {
        const void *kernel;
        size_t bytes;
    } allowed[QL_KERNELS]; /* shared memory that kernels may have, where they asked for more than is theirs */
    int64_t scratch_moves; /* a recorded step holds the addresses of the scratch memory: it is stale once they move */
    void *stage[QL_STAGES];
    int next_stage;
    cudaEvent_t stage_free[QL_STAGES];
    cudaEvent_t marks[QL_MARKS];
    ql_cublas cublas;
    ql_cusolver cusolver;
} ql_cuda_device;

ql_cuda_device *ql_cuda_current(void); /* between begin and end */
ql_status ql_cuda_open_memory(ql_cuda_device *device);
void ql_cuda_fill_memory(ql_backend *table); /* the memory functions of QL_DEVICE_OPS */

#endif
