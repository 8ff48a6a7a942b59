/* memory.cu: device memory from one stream-ordered pool, scratch memory, and uploads through pinned staging. */
#include "../csrc/formats/weight.h"
#include "state.h"

#include <string.h>

ql_status ql_cuda_open_memory(ql_cuda_device *device) {
    int pools = 0;
    ql_status status = ql_cuda_status(cudaDeviceGetAttribute(&pools, cudaDevAttrMemoryPoolsSupported, device->index), "memory pools");
    if (status != QL_OK) { return status; }
    if (!pools) { return ql_fail(QL_ECUDA, "%s has no memory pools (cudaMallocAsync)", device->properties.name); }
    cudaMemPoolProps properties = {};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location.type = cudaMemLocationTypeDevice;
    properties.location.id = device->index;
    status = ql_cuda_status(cudaMemPoolCreate(&device->pool, &properties), "cudaMemPoolCreate");
    uint64_t keep = UINT64_MAX; /* freed memory stays with the pool until memory runs out */
    if (status == QL_OK) {
        status = ql_cuda_status(cudaMemPoolSetAttribute(device->pool, cudaMemPoolAttrReleaseThreshold, &keep), "cudaMemPoolSetAttribute");
    }
    for (int i = 0; i < QL_STAGES && status == QL_OK; i++) {
        status = ql_cuda_status(cudaEventCreateWithFlags(&device->stage_free[i], cudaEventDisableTiming), "cudaEventCreate");
    }
    return status;
}

static ql_status out_of_memory(size_t bytes) {
    size_t free_bytes = 0, total = 0;
    uint64_t used = 0;
    cudaMemGetInfo(&free_bytes, &total);
    cudaMemPoolGetAttribute(ql_cuda_current()->pool, cudaMemPoolAttrUsedMemCurrent, &used);
    (void)cudaGetLastError();
    return ql_cuda_refuse(QL_ECUDA, "out of device memory on cuda:%d: asked for %zu bytes; %zu of %zu are free, quantlab uses %llu",
                          ql_cuda_current()->index, bytes, free_bytes, total, (unsigned long long)used);
}

ql_status ql_cuda_alloc(void **memory, size_t bytes) {
    ql_cuda_device *device = ql_cuda_current();
    *memory = NULL;
    if (device->recording) { return ql_cuda_refuse(QL_EVALUE, "memory was asked for within a recorded step"); }
    size_t asked = bytes > 0 ? bytes : 1;
    cudaError_t error = cudaMallocFromPoolAsync(memory, asked, device->pool, device->stream);
    if (error == cudaErrorMemoryAllocation) { /* what the pool holds in pieces may do in one */
        (void)cudaGetLastError();
        *memory = NULL;
        if (ql_cuda_check(cudaStreamSynchronize(device->stream), "a kernel")) {
            cudaMemPoolTrimTo(device->pool, 0);
            error = cudaMallocFromPoolAsync(memory, asked, device->pool, device->stream);
        }
    }
    if (error == cudaSuccess) { return QL_OK; }
    *memory = NULL;
    (void)cudaGetLastError();
    return error == cudaErrorMemoryAllocation ? out_of_memory(bytes)
                                              : (ql_cuda_check(error, "cudaMallocFromPoolAsync"), ql_cuda_status(error, "cudaMallocFromPoolAsync"));
}

void ql_cuda_free(void *memory) {
    if (memory != NULL) { ql_cuda_check(cudaFreeAsync(memory, ql_cuda_stream()), "cudaFreeAsync"); }
}

void *ql_cuda_scratch(ql_cuda_slot slot, size_t bytes) {
    ql_cuda_device *device = ql_cuda_current();
    if (device->scratch[slot].bytes >= bytes && device->scratch[slot].memory != NULL) { return device->scratch[slot].memory; }
    if (device->recording) {
        ql_cuda_refuse(QL_EVALUE, "a recorded step needs %zu bytes of scratch memory that were not there", bytes);
        return NULL;
    }
    ql_cuda_free(device->scratch[slot].memory); /* first: two of a large one may not fit */
    device->scratch[slot].memory = NULL;
    device->scratch[slot].bytes = 0;
    device->scratch_moves++;
    size_t rounded = (bytes + 0xffff) & ~(size_t)0xffff;
    if (ql_cuda_alloc(&device->scratch[slot].memory, rounded) != QL_OK) { return NULL; }
    if (slot == QL_SCRATCH_COUNTERS && !ql_cuda_check(cudaMemsetAsync(device->scratch[slot].memory, 0, rounded, ql_cuda_stream()), "cudaMemsetAsync")) {
        return NULL;
    }
    device->scratch[slot].bytes = rounded;
    return device->scratch[slot].memory;
}

/* ---- copies --------------------------------------------------------------------------------------------------------- */

typedef struct {
    char *to;
    const char *from;
    size_t bytes, part;
} copy_context;

static void copy_task(void *context, int64_t i) {
    const copy_context *c = (const copy_context *)context;
    size_t start = (size_t)i * c->part, bytes = c->bytes - start < c->part ? c->bytes - start : c->part;
    memcpy(c->to + start, c->from + start, bytes);
}

static ql_status open_stage(ql_cuda_device *device, int i) {
    if (device->stage[i] != NULL) { return QL_OK; }
    return ql_cuda_check(cudaHostAlloc(&device->stage[i], QL_STAGE_BYTES, cudaHostAllocDefault), "cudaHostAlloc")
               ? QL_OK
               : ql_cuda_refuse(QL_ECUDA, "pinned memory for uploads");
}

/* One half of the staging memory is filled by the threads while the other is on its way. `host` may be a memory map. */
ql_status ql_cuda_upload(void *memory, const void *host, size_t bytes) {
    ql_cuda_device *device = ql_cuda_current();
    for (size_t done = 0; done < bytes; done += QL_STAGE_BYTES) {
        int i = device->next_stage;
        device->next_stage = (i + 1) % QL_STAGES;
        size_t part = bytes - done < QL_STAGE_BYTES ? bytes - done : QL_STAGE_BYTES;
        ql_status status = open_stage(device, i);
        if (status != QL_OK) { return status; }
        if (!ql_cuda_check(cudaEventSynchronize(device->stage_free[i]), "an upload")) { return ql_fail(QL_ECUDA, "an upload failed"); }
        copy_context copy = {(char *)device->stage[i], (const char *)host + done, part, (size_t)1 << 20};
        ql_parallel_for((int64_t)((part + copy.part - 1) / copy.part), copy_task, &copy);
        if (!ql_cuda_check(cudaMemcpyAsync((char *)memory + done, device->stage[i], part, cudaMemcpyHostToDevice, device->stream), "an upload") ||
            !ql_cuda_check(cudaEventRecord(device->stage_free[i], device->stream), "an upload")) {
            return ql_fail(QL_ECUDA, "an upload failed");
        }
    }
    return QL_OK;
}

ql_status ql_cuda_finish(void) {
    cudaError_t error = cudaStreamSynchronize(ql_cuda_stream());
    ql_cuda_check(error, "a kernel");
    return ql_cuda_status(error, "a kernel");
}

ql_status ql_cuda_download(void *host, const void *memory, size_t bytes) {
    if (bytes == 0) { return QL_OK; }
    cudaError_t error = cudaMemcpyAsync(host, memory, bytes, cudaMemcpyDeviceToHost, ql_cuda_stream());
    if (!ql_cuda_check(error, "a download")) { return ql_cuda_status(error, "a download"); }
    return ql_cuda_finish();
}

static ql_status fill(void *memory, int byte, size_t bytes) {
    cudaError_t error = bytes > 0 ? cudaMemsetAsync(memory, byte, bytes, ql_cuda_stream()) : cudaSuccess;
    ql_cuda_check(error, "cudaMemsetAsync");
    return ql_cuda_status(error, "cudaMemsetAsync");
}

static ql_status copy(void *to, const void *from, size_t bytes) {
    cudaError_t error = bytes > 0 ? cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, ql_cuda_stream()) : cudaSuccess;
    ql_cuda_check(error, "a copy");
    return ql_cuda_status(error, "a copy");
}

static ql_status alloc_shared(void **memory, size_t bytes) {
    cudaError_t error = cudaHostAlloc(memory, bytes > 0 ? bytes : 1, cudaHostAllocDefault);
    if (error != cudaSuccess) { *memory = NULL; }
    ql_cuda_check(error, "pinned memory");
    return ql_cuda_status(error, "pinned memory");
}

static void release_shared(void *memory) {
    if (memory != NULL) { ql_cuda_check(cudaFreeHost(memory), "cudaFreeHost"); }
}

/* ---- weights ---------------------------------------------------------------------------------------------------------- */

static ql_status upload_part(const void **to, const void *from, size_t bytes) {
    void *memory = NULL;
    *to = NULL;
    if (from == NULL) { return QL_OK; }
    ql_status status = ql_cuda_alloc(&memory, bytes);
    if (status == QL_OK) { status = ql_cuda_upload(memory, from, bytes); }
    *to = memory;
    return status;
}

static void weight_release(ql_weight *w) {
    if (w->packed != NULL) { ql_cuda_unpack(w); }
    const void *parts[] = {w->codes, w->scales, w->zeros, w->perm, w->scale_codes, w->scale_absmax, w->scale_map};
    for (const void *part : parts) { ql_cuda_free((void *)part); }
    memset(w, 0, sizeof *w);
}

static ql_status weight_upload(ql_weight *to, const ql_weight *from) {
    ql_weight_bytes bytes = ql_bytes_of_weight(from);
    *to = *from;
    to->packed = NULL;
    struct {
        const void **to;
        const void *from;
        size_t bytes;
    } parts[] = {
        {(const void **)&to->codes, from->codes, bytes.codes},
        {(const void **)&to->scales, from->scales, bytes.scales},
        {(const void **)&to->zeros, from->zeros, bytes.zeros},
        {(const void **)&to->perm, from->perm, bytes.perm},
        {(const void **)&to->scale_codes, from->scale_codes, bytes.scale_codes},
        {(const void **)&to->scale_absmax, from->scale_absmax, bytes.scale_absmax},
        {(const void **)&to->scale_map, from->scale_map, bytes.scale_map},
    };
    for (auto &part : parts) { *part.to = NULL; }
    ql_status status = QL_OK;
    for (auto &part : parts) {
        if (status == QL_OK) { status = upload_part(part.to, part.from, part.bytes); }
    }
    if (status != QL_OK) { weight_release(to); }
    return status;
}

void ql_cuda_fill_memory(ql_backend *table) {
    table->alloc = ql_cuda_alloc, table->release = ql_cuda_free;
    table->alloc_shared = alloc_shared, table->release_shared = release_shared;
    table->upload = ql_cuda_upload, table->download = ql_cuda_download, table->fill = fill, table->copy = copy, table->finish = ql_cuda_finish;
    table->weight_upload = weight_upload, table->weight_release = weight_release;
}
