/* backend.cu: opens a device, fills its table of ops, keeps the first failure of a call, records and replays steps. */
#include "state.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static ql_cuda_device devices[QL_CUDA_DEVICES];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of every call on every device */
static pthread_once_t lock_once = PTHREAD_ONCE_INIT;
static ql_cuda_device *current; /* the rest: of the call that holds the lock */
static int depth;
static ql_status failure;
static char failure_detail[512];

static void make_lock_recursive(void) {
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&lock, &attributes);
    pthread_mutexattr_destroy(&attributes);
}

static void take_lock(void) {
    pthread_once(&lock_once, make_lock_recursive);
    pthread_mutex_lock(&lock);
}

/* ---- failures ---------------------------------------------------------------------------------------------------- */

ql_status ql_cuda_refuse(ql_status status, const char *format, ...) {
    char detail[sizeof failure_detail];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(detail, sizeof detail, format, arguments);
    va_end(arguments);
    if (failure == QL_OK) {
        failure = status;
        memcpy(failure_detail, detail, sizeof detail);
    }
    return ql_fail(status, "%s", detail);
}

int ql_cuda_check(cudaError_t error, const char *what) {
    if (error == cudaSuccess) { return 1; }
    (void)cudaGetLastError(); /* it is ours now; one that stays with the context comes back at the next call */
    ql_cuda_refuse(QL_ECUDA, "%s: %s (%s)", what, cudaGetErrorString(error), cudaGetErrorName(error));
    return 0;
}

ql_status ql_cuda_status(cudaError_t error, const char *what) {
    if (error == cudaSuccess) { return QL_OK; }
    (void)cudaGetLastError();
    return ql_fail(QL_ECUDA, "%s: %s (%s)", what, cudaGetErrorString(error), cudaGetErrorName(error));
}

int ql_cuda_check_library(int result, const char *what) {
    if (result == 0) { return 1; }
    ql_cuda_refuse(QL_ECUDA, "%s: the library answered with status %d", what, result);
    return 0;
}

/* ---- calls ------------------------------------------------------------------------------------------------------- */

static ql_status call_begin(int index) {
    take_lock();
    ql_cuda_device *device = &devices[index];
    ql_status status = QL_OK;
    if (depth > 0 && current != device) {
        status = ql_fail(QL_EVALUE, "device: cuda:%d was asked for within a call on cuda:%d", index, current->index);
    } else if (depth == 0) {
        failure = QL_OK;
        current = device;
        status = ql_cuda_status(cudaSetDevice(index), "cudaSetDevice");
    }
    if (status != QL_OK) {
        pthread_mutex_unlock(&lock);
        return status;
    }
    depth++;
    return QL_OK;
}

static ql_status call_end(void) {
    ql_cuda_check(cudaGetLastError(), "a launch");
    ql_status status = failure == QL_OK ? QL_OK : ql_fail(failure, "%s", failure_detail);
    depth--;
    pthread_mutex_unlock(&lock);
    return status;
}

ql_cuda_device *ql_cuda_current(void) { return current; }
cudaStream_t ql_cuda_stream(void) { return current->stream; }
int ql_cuda_multiprocessors(void) { return current->properties.multiProcessorCount; }
int ql_cuda_capability(void) { return current->capability; }
int ql_cuda_recording(void) { return current->recording; }

int ql_cuda_is_built(const void *kernel) {
    enum { EMPTY = 32 /* registers that an empty kernel does not need */ };
    cudaFuncAttributes attributes;
    return current->capability == 90 && cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.numRegs > EMPTY;
}

static __global__ void nothing(void) {}

int ql_cuda_max_clusters(int cluster) {
    int *known = &current->clusters[cluster == 1 ? 0 : cluster == 2 ? 1 : cluster == 4 ? 2 : 3];
    if (*known == 0) {
        cudaLaunchAttribute attribute;
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = (unsigned)cluster, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3((unsigned)(64 * cluster)), config.blockDim = dim3(1024), config.dynamicSmemBytes = 200 << 10;
        config.attrs = &attribute, config.numAttrs = 1;
        ql_cuda_check(cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)config.dynamicSmemBytes),
                      "cudaFuncSetAttribute");
        ql_cuda_check(cudaOccupancyMaxActiveClusters(known, nothing, &config), "cudaOccupancyMaxActiveClusters");
    }
    return *known;
}

/* ---- launches ------------------------------------------------------------------------------------------------------ */

/* Lets kernel have `bytes` of shared memory. What was asked for is kept: asking takes a third of a launch's time. */
static bool allow_shared(const void *kernel, size_t bytes) {
    if (bytes <= 48 << 10) { return true; }
    auto *allowed = &current->allowed[(uintptr_t)kernel / 16 % QL_KERNELS]; /* another kernel of the same place is asked for again */
    if (allowed->kernel == kernel && allowed->bytes >= bytes) { return true; }
    if (!ql_cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes), "cudaFuncSetAttribute")) { return false; }
    allowed->kernel = kernel, allowed->bytes = bytes;
    return true;
}

void ql_cuda_launch_pointers(const void *kernel, dim3 grid, dim3 block, size_t shared, bool pdl, unsigned cluster,
                             void **arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || failure != QL_OK) { return; }
    if (!allow_shared(kernel, shared)) { return; }
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared, config.stream = current->stream;
    config.attrs = attributes;
    if (pdl && current->capability >= 90) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs].val.clusterDim.x = cluster;
        attributes[config.numAttrs].val.clusterDim.y = 1;
        attributes[config.numAttrs++].val.clusterDim.z = 1;
    }
    ql_cuda_check(cudaLaunchKernelExC(&config, kernel, arguments), "a kernel's launch");
}

/* ---- recorded steps -------------------------------------------------------------------------------------------------- */

struct ql_step {
    cudaGraphExec_t graph;
    int64_t scratch_moves;
};

static ql_status step_record(void) {
    if (current->recording) { return ql_cuda_refuse(QL_EVALUE, "a step is being recorded already"); }
    if (!ql_cuda_check(cudaStreamBeginCapture(current->stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture")) {
        return failure;
    }
    current->recording = 1;
    return QL_OK;
}

static ql_status step_record_end(ql_step **step) {
    cudaGraph_t graph = NULL;
    *step = NULL;
    current->recording = 0;
    if (!ql_cuda_check(cudaStreamEndCapture(current->stream, &graph), "cudaStreamEndCapture")) { return failure; }
    ql_step *made = failure == QL_OK ? (ql_step *)calloc(1, sizeof *made) : NULL;
    if (made != NULL && !ql_cuda_check(cudaGraphInstantiate(&made->graph, graph, 0), "cudaGraphInstantiate")) {
        free(made);
        made = NULL;
    }
    if (made != NULL) { made->scratch_moves = current->scratch_moves; }
    cudaGraphDestroy(graph);
    *step = made;
    return made != NULL ? QL_OK : ql_fail(failure, "%s", failure_detail);
}

static int step_valid(const ql_step *step) { return step != NULL && step->scratch_moves == current->scratch_moves; }

static ql_status step_replay(ql_step *step) {
    if (!step_valid(step)) { return ql_cuda_refuse(QL_EVALUE, "the step was recorded over scratch memory that has moved"); }
    return ql_cuda_check(cudaGraphLaunch(step->graph, current->stream), "cudaGraphLaunch") ? QL_OK : failure;
}

static void step_release(ql_step *step) {
    if (step == NULL) { return; }
    cudaGraphExecDestroy(step->graph); /* a launched one ends first */
    free(step);
}

static ql_status mark_set(int i) {
    return ql_cuda_check(cudaEventRecord(current->marks[i], current->stream), "cudaEventRecord") ? QL_OK : failure;
}

static ql_status mark_wait(int i) {
    return ql_cuda_check(cudaEventSynchronize(current->marks[i]), "a kernel") ? QL_OK : failure;
}

/* ---- opening ---------------------------------------------------------------------------------------------------------- */

static void fill_table(ql_backend *table, int index) {
    table->name = "cuda";
    table->device = index;
    table->records = 1;
    table->gptq = &ql_cuda_gptq;
#define X(op) table->op = ql_##op##_cuda;
    QL_CUDA_PLAIN_OPS(X)
    QL_CUDA_FUSED_OPS(X)
#undef X
    for (int f = 0; f < QL_FORMAT_COUNT; f++) {
#define X(op) table->op[f] = ql_##op##_cuda;
        QL_CUDA_FORMAT_OPS(X)
#undef X
    }
    table->kv_bytes = table->qkv_forward != NULL ? sizeof(__nv_bfloat16) : sizeof(float);
    ql_cuda_fill_memory(table);
    table->begin = call_begin, table->end = call_end;
    table->record = step_record, table->record_end = step_record_end, table->replay = step_replay;
    table->step_valid = step_valid, table->step_release = step_release;
    table->mark = mark_set, table->wait = mark_wait;
    table->takes_ordered = ql_cuda_takes_ordered;
}

/* what the driver's refusals mean to the user */
static ql_status explain(cudaError_t error) {
    (void)cudaGetLastError();
    switch (error) {
    case cudaErrorInsufficientDriver: {
        int driver = 0, runtime = 0;
        cudaDriverGetVersion(&driver);
        cudaRuntimeGetVersion(&runtime);
        if (driver == 0) { return ql_fail(QL_ECUDA, "no NVIDIA driver is installed (libcuda.so.1 was not found)"); }
        return ql_fail(QL_ECUDA, "the NVIDIA driver is too old: it knows CUDA %d.%d, this build needs %d.%d", driver / 1000,
                       driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    }
    case cudaErrorNoDevice: return ql_fail(QL_ECUDA, "no CUDA device is visible (is CUDA_VISIBLE_DEVICES set?)");
    default: return ql_fail(QL_ECUDA, "%s (%s)", cudaGetErrorString(error), cudaGetErrorName(error));
    }
}

static ql_status open_device(ql_cuda_device *device, int index) {
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) { return explain(error); }
    if (index < 0 || index >= count || index >= QL_CUDA_DEVICES) {
        return ql_fail(QL_ECUDA, "there is no device %d: this machine has %d", index, count);
    }
    if ((error = cudaSetDevice(index)) != cudaSuccess ||
        (error = cudaGetDeviceProperties(&device->properties, index)) != cudaSuccess) {
        return explain(error);
    }
    if (device->properties.major < 8) {
        return ql_fail(QL_ECUDA, "%s has compute capability %d.%d, at least 8.0 is needed", device->properties.name,
                       device->properties.major, device->properties.minor);
    }
    int capability = 10 * device->properties.major + device->properties.minor;
    cudaFuncAttributes attributes; /* of any kernel: what it was compiled for */
    error = cudaFuncGetAttributes(&attributes, nothing);
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
        (void)cudaGetLastError();
        return ql_fail(QL_ECUDA, "this build has no code for %s: build again with QL_CUDA_ARCHS=%d", device->properties.name, capability);
    }
    if (error != cudaSuccess) { return explain(error); }
    device->capability = capability < attributes.ptxVersion ? capability : attributes.ptxVersion;
    device->index = index;
    if ((error = cudaStreamCreateWithFlags(&device->stream, cudaStreamNonBlocking)) != cudaSuccess) { return explain(error); }
    for (int i = 0; i < QL_MARKS; i++) {
        if ((error = cudaEventCreateWithFlags(&device->marks[i], cudaEventDisableTiming)) != cudaSuccess) { return explain(error); }
    }
    ql_status status = ql_cuda_open_memory(device);
    if (status != QL_OK) { return status; }
    fill_table(&device->table, index);
    device->opened = 1;
    return QL_OK;
}

int ql_cuda_built(void) { return 1; }

const ql_backend *ql_cuda(int index) {
    if (index < 0 || index >= QL_CUDA_DEVICES) {
        ql_fail(QL_ECUDA, "there is no device %d", index);
        return NULL;
    }
    take_lock();
    ql_cuda_device *device = &devices[index];
    ql_status status = device->opened ? QL_OK : open_device(device, index);
    pthread_mutex_unlock(&lock);
    return status == QL_OK ? &device->table : NULL;
}

ql_status ql_cuda_get_info(ql_cuda_info *info, int index) {
    const ql_backend *table = ql_cuda(index);
    if (table == NULL) { return QL_ECUDA; }
    ql_status status = table->begin(index);
    if (status != QL_OK) { return status; }
    const cudaDeviceProp *p = &current->properties;
    memset(info, 0, sizeof *info);
    snprintf(info->name, sizeof info->name, "%s", p->name);
    info->major = p->major, info->minor = p->minor, info->multiprocessors = p->multiProcessorCount;
    ql_cuda_check(cudaGetDeviceCount(&info->count), "cudaGetDeviceCount");
    ql_cuda_check(cudaDriverGetVersion(&info->driver), "cudaDriverGetVersion");
    ql_cuda_check(cudaRuntimeGetVersion(&info->runtime), "cudaRuntimeGetVersion");
    size_t free_bytes = 0, total = 0;
    ql_cuda_check(cudaMemGetInfo(&free_bytes, &total), "cudaMemGetInfo");
    info->free = (int64_t)free_bytes, info->total = (int64_t)total;
    const cudaMemPoolAttr attributes[] = {cudaMemPoolAttrUsedMemCurrent, cudaMemPoolAttrUsedMemHigh, cudaMemPoolAttrReservedMemCurrent};
    int64_t *const places[] = {&info->current, &info->peak, &info->held};
    for (int i = 0; i < 3; i++) {
        ql_cuda_check(cudaMemPoolGetAttribute(current->pool, attributes[i], places[i]), "cudaMemPoolGetAttribute");
    }
    return table->end();
}

ql_status ql_cuda_fetch(void *host, const void *memory, size_t bytes) {
    cudaPointerAttributes where = {};
    ql_status status = ql_cuda_status(cudaPointerGetAttributes(&where, memory), "cudaPointerGetAttributes");
    if (status != QL_OK) { return status; }
    if (where.type != cudaMemoryTypeDevice && where.type != cudaMemoryTypeManaged) {
        return ql_fail(QL_ECUDA, "the array's address is not on a CUDA device");
    }
    const ql_backend *table = ql_cuda(where.device);
    if (table == NULL) { return QL_ECUDA; }
    status = table->begin(where.device);
    if (status != QL_OK) { return status; }
    ql_cuda_check(cudaDeviceSynchronize(), "work of another library");
    ql_cuda_check(cudaMemcpy(host, memory, bytes, cudaMemcpyDeviceToHost), "a download");
    return table->end();
}

ql_status ql_cuda_reset_peak(int index) {
    const ql_backend *table = ql_cuda(index);
    if (table == NULL) { return QL_ECUDA; }
    ql_status status = table->begin(index);
    if (status != QL_OK) { return status; }
    uint64_t zero = 0;
    ql_cuda_check(cudaMemPoolSetAttribute(current->pool, cudaMemPoolAttrUsedMemHigh, &zero), "cudaMemPoolSetAttribute");
    return table->end();
}
