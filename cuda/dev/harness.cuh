/* harness.cuh: what a stand-alone check program needs in place of backend.cu: one stream, scratch memory, launches; and
 * random values, guarded device arrays, times by replay of a recorded graph. One source of a program includes it. */
#ifndef QL_CUDA_HARNESS_CUH
#define QL_CUDA_HARNESS_CUH

#include "../cuda.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <functional>
#include <vector>

static cudaStream_t harness_stream;
static int harness_failures;

static void must(cudaError_t error, const char *what) {
    if (error == cudaSuccess) { return; }
    printf("%s: %s\n", what, cudaGetErrorString(error));
    exit(2);
}
static void expect(bool condition, const char *what, double value, double bound) {
    printf("%-4s %-72s %.3g (bound %.3g)\n", condition ? "ok" : "FAIL", what, value, bound);
    harness_failures += !condition;
    fflush(stdout);
}

cudaStream_t ql_cuda_stream(void) { return harness_stream; }
int ql_cuda_multiprocessors(void) {
    int count = 0;
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0);
    return count;
}
int ql_cuda_capability(void) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0);
    return 10 * major + minor;
}
int ql_cuda_is_built(const void *) { return ql_cuda_capability() == 90; } /* programs are built for the device at hand */
int ql_cuda_check(cudaError_t error, const char *what) { return must(error, what), 1; }

void *ql_cuda_scratch(ql_cuda_slot slot, size_t bytes) {
    static void *memory[QL_SCRATCH_COUNT];
    static size_t held[QL_SCRATCH_COUNT];
    if (bytes > held[slot]) { /* the old block stays: work may still use it */
        must(cudaMalloc(&memory[slot], held[slot] = bytes), "scratch");
    }
    return memory[slot];
}

void ql_cuda_launch_pointers(const void *kernel, dim3 grid, dim3 block, size_t shared, bool pdl, unsigned cluster,
                             void **arguments) {
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared, config.stream = harness_stream;
    config.attrs = attributes;
    if (pdl && ql_cuda_capability() >= 90) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs].val.clusterDim.x = cluster;
        attributes[config.numAttrs].val.clusterDim.y = attributes[config.numAttrs].val.clusterDim.z = 1;
        config.numAttrs++;
    }
    if (shared > 48 * 1024) {
        must(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared), "shared memory");
    }
    must(cudaLaunchKernelExC(&config, kernel, arguments), "launch");
}

/* ---- values ---------------------------------------------------------------------------------------------------- */

static uint64_t harness_state = 0x9e3779b97f4a7c15u;
static double uniform() { /* splitmix64 */
    uint64_t z = (harness_state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (double)((z ^ (z >> 31)) >> 11) * 0x1p-53;
}
static float normal() { return (float)(sqrt(-2.0 * log(uniform() + 1e-300)) * cos(6.283185307179586 * uniform())); }

/* ---- device arrays, with 256 bytes of guard before and after ------------------------------------------------------ */

enum { GUARD = 256 };
template <typename T> struct device_array {
    std::vector<T> host;
    char *memory;
    device_array(size_t count) : host(count) {
        must(cudaMalloc((void **)&memory, count * sizeof(T) + 2 * GUARD), "memory");
        must(cudaMemset(memory, 0xa5, count * sizeof(T) + 2 * GUARD), "memory");
    }
    device_array(const std::vector<T> &values) : device_array(values.size()) { host = values, up(); }
    device_array(const device_array &) = delete;
    ~device_array() { cudaFree(memory); }
    T *get() { return (T *)(memory + GUARD); }
    void up() { must(cudaMemcpy(get(), host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), "upload"); }
    std::vector<T> &down() {
        must(cudaStreamSynchronize(harness_stream), "kernel");
        must(cudaMemcpy(host.data(), get(), host.size() * sizeof(T), cudaMemcpyDeviceToHost), "download");
        return host;
    }
    bool guards() {
        unsigned char around[2 * GUARD];
        must(cudaMemcpy(around, memory, GUARD, cudaMemcpyDeviceToHost), "guard");
        must(cudaMemcpy(around + GUARD, memory + GUARD + host.size() * sizeof(T), GUARD, cudaMemcpyDeviceToHost), "guard");
        for (unsigned char byte : around) {
            if (byte != 0xa5) { return false; }
        }
        return true;
    }
};

/* ---- times ------------------------------------------------------------------------------------------------------ */

/* microseconds of issue(i), i = 0 .. count - 1, each: the median of `repeats` replays of one graph of all */
static double time_us(int count, const std::function<void(int)> &issue, int repeats = 15) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaEvent_t begin, end;
    issue(0);
    must(cudaStreamSynchronize(harness_stream), "kernel");
    must(cudaStreamBeginCapture(harness_stream, cudaStreamCaptureModeThreadLocal), "capture");
    for (int i = 0; i < count; i++) { issue(i); }
    must(cudaStreamEndCapture(harness_stream, &graph), "capture");
    must(cudaGraphInstantiate(&exec, graph, 0), "graph");
    cudaEventCreate(&begin), cudaEventCreate(&end);
    std::vector<float> times;
    for (int i = 0; i < repeats + 3; i++) {
        cudaEventRecord(begin, harness_stream);
        must(cudaGraphLaunch(exec, harness_stream), "replay");
        cudaEventRecord(end, harness_stream);
        must(cudaStreamSynchronize(harness_stream), "replay");
        float ms;
        cudaEventElapsedTime(&ms, begin, end);
        if (i >= 3) { times.push_back(ms); }
    }
    std::sort(times.begin(), times.end());
    cudaGraphExecDestroy(exec), cudaGraphDestroy(graph), cudaEventDestroy(begin), cudaEventDestroy(end);
    return 1e3 * times[times.size() / 2] / count;
}

static int harness_begin() {
    must(cudaStreamCreateWithFlags(&harness_stream, cudaStreamNonBlocking), "device");
    cudaDeviceProp properties;
    must(cudaGetDeviceProperties(&properties, 0), "device");
    printf("%s, compute capability %d.%d\n", properties.name, properties.major, properties.minor);
    return 0;
}
static int harness_end() {
    must(cudaStreamSynchronize(harness_stream), "kernel");
    printf(harness_failures ? "%d FAILED\n" : "all passed\n", harness_failures);
    return harness_failures != 0;
}

#endif
