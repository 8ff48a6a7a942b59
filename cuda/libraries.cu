/* libraries.cu: cuBLAS and cuSOLVER, opened when they are first used: from the process (another package may hold them),
 * from the folders that Python names (the NVIDIA wheels), from the loader's places, from CUDA_HOME. Never closed. And the driver's tensor maps. */
#include "state.h"
#include "tensor_map.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BLAS_WORKSPACE = 32 << 20 }; /* what cuBLAS recommends for sm_90 */

typedef struct {
    const char *name;
    const char *files[3]; /* CUDA 13's name first */
    void *opened;
    char path[1024];
    char why_not[512];
    int tried;
} library;

static library blas = {"cublas", {"libcublas.so.13", "libcublas.so.12", NULL}, NULL, "", "", 0};
static library solver = {"cusolver", {"libcusolver.so.12", "libcusolver.so.11", NULL}, NULL, "", "", 0};
static char folders[8192];

void ql_cuda_set_folders(const char *text) { snprintf(folders, sizeof folders, "%s", text); }

static int open_at(library *l, const char *path, int flags) {
    l->opened = dlopen(path, RTLD_NOW | RTLD_LOCAL | flags);
    if (l->opened == NULL) {
        const char *message = dlerror(); /* the last one is told: that of the loader's own places */
        snprintf(l->why_not, sizeof l->why_not, "%s", message != NULL ? message : "dlopen failed");
        return 0;
    }
    snprintf(l->path, sizeof l->path, "%s", path);
    return 1;
}

static int open_in_folders(library *l, const char *list, const char *file) {
    char path[1024];
    while (*list != '\0') {
        size_t length = strcspn(list, ":");
        snprintf(path, sizeof path, "%.*s/%s", (int)length, list, file);
        FILE *there = fopen(path, "rb");
        if (there != NULL) {
            fclose(there);
            if (open_at(l, path, 0)) { return 1; }
        }
        list += length + (list[length] == ':');
    }
    return 0;
}

static int open_library(library *l) {
    if (l->tried) { return l->opened != NULL; }
    l->tried = 1;
    char home[1024] = "";
    const char *cuda_home = getenv("CUDA_HOME");
    if (cuda_home != NULL) { snprintf(home, sizeof home, "%s/lib64:%s/lib", cuda_home, cuda_home); }
    for (int i = 0; l->files[i] != NULL; i++) {
        if (open_at(l, l->files[i], RTLD_NOLOAD)) { break; }
    }
    for (int i = 0; l->opened == NULL && l->files[i] != NULL; i++) {
        if (open_in_folders(l, folders, l->files[i]) || open_in_folders(l, home, l->files[i])) { break; }
    }
    for (int i = 0; l->opened == NULL && l->files[i] != NULL; i++) {
        if (open_at(l, l->files[i], 0)) { break; }
    }
    return l->opened != NULL;
}

static ql_status missing(const library *l) {
    return ql_fail(QL_ECUDA, "%s was not found (pip install nvidia-%s, or set CUDA_HOME): %s", l->files[0], l->name, l->why_not);
}

const char *ql_cuda_library(const char *name) {
    library *l = strcmp(name, "cublas") == 0 ? &blas : strcmp(name, "cusolver") == 0 ? &solver : NULL;
    if (l == NULL) {
        ql_fail(QL_EVALUE, "library: got '%s', expected cublas or cusolver", name);
        return NULL;
    }
    if (open_library(l)) { return l->path; }
    missing(l);
    return NULL;
}

static int find(library *l, const char *symbol, void *pointer) {
    void *found = dlsym(l->opened, symbol);
    if (found == NULL) {
        ql_cuda_refuse(QL_ECUDA, "%s has no function %s", l->path, symbol);
        return 0;
    }
    memcpy(pointer, &found, sizeof found);
    return 1;
}

static int open_ready(library *l) {
    if (open_library(l)) { return 1; }
    missing(l);
    ql_cuda_refuse(QL_ECUDA, "%s", ql_status_detail());
    return 0;
}

/* ---- cuBLAS ------------------------------------------------------------------------------------------------------------ */

static int (*blas_set_workspace)(void *handle, void *workspace, size_t bytes);

static int make_blas(ql_cublas *b) {
    int (*create)(void **handle), (*set_stream)(void *handle, cudaStream_t stream);
    if (!open_ready(&blas) || !find(&blas, "cublasCreate_v2", &create) || !find(&blas, "cublasSetStream_v2", &set_stream) ||
        !find(&blas, "cublasSetWorkspace_v2", &blas_set_workspace) || !find(&blas, "cublasGemmEx", &b->gemm_ex) ||
        !find(&blas, "cublasGemmStridedBatchedEx", &b->gemm_strided_batched_ex) || !find(&blas, "cublasSgemm_v2", &b->sgemm) ||
        !find(&blas, "cublasDgemm_v2", &b->dgemm) || !find(&blas, "cublasDtrsm_v2", &b->dtrsm)) {
        return 0;
    }
    void *handle = NULL;
    if (!ql_cuda_check_library(create(&handle), "cublasCreate") ||
        !ql_cuda_check_library(set_stream(handle, ql_cuda_stream()), "cublasSetStream")) {
        return 0;
    }
    b->handle = handle;
    return 1;
}

/* The workspace is ours and of one size: cuBLAS then chooses the same kernels each time, and a recorded step can be kept. */
const ql_cublas *ql_cuda_cublas(void) {
    ql_cublas *b = &ql_cuda_current()->cublas;
    if (b->handle != NULL) { return b; }
    if (ql_cuda_recording()) {
        ql_cuda_refuse(QL_EVALUE, "cuBLAS was first asked for within a recorded step");
        return NULL;
    }
    ql_cublas made = {};
    if (!make_blas(&made)) { return NULL; }
    void *workspace = ql_cuda_scratch(QL_SCRATCH_BLAS, BLAS_WORKSPACE);
    if (workspace == NULL || !ql_cuda_check_library(blas_set_workspace(made.handle, workspace, BLAS_WORKSPACE), "cublasSetWorkspace")) {
        return NULL;
    }
    *b = made;
    return b;
}

static int size_of(int64_t value) { return (int)value; } /* sizes of a weight and of a batch are below 2^31 */

/* Row-major y = x W^T is column-major y^T = W x^T: W^T (k, n) transposed, x^T (k, m) as it is. */
void ql_cuda_matmul(void *y, cudaDataType type_y, const __nv_bfloat16 *x, const __nv_bfloat16 *w, int64_t m, int64_t n,
                    int64_t k, int accumulate) {
    const ql_cublas *b = ql_cuda_cublas();
    if (b == NULL || m == 0) { return; }
    float one = 1.0f, beta = accumulate ? 1.0f : 0.0f;
    ql_cuda_check_library(b->gemm_ex(b->handle, QL_CUBLAS_T, QL_CUBLAS_N, size_of(n), size_of(m), size_of(k), &one, w, CUDA_R_16BF,
                                     size_of(k), x, CUDA_R_16BF, size_of(k), &beta, y, type_y, size_of(n),
                                     QL_CUBLAS_COMPUTE_32F, QL_CUBLAS_ALGORITHM), "cublasGemmEx");
}

void ql_cuda_matmul_backward(void *dx, cudaDataType type_dx, const __nv_bfloat16 *dy, const __nv_bfloat16 *w, int64_t m,
                             int64_t n, int64_t k, int accumulate) {
    const ql_cublas *b = ql_cuda_cublas();
    if (b == NULL || m == 0) { return; }
    float one = 1.0f, beta = accumulate ? 1.0f : 0.0f;
    ql_cuda_check_library(b->gemm_ex(b->handle, QL_CUBLAS_N, QL_CUBLAS_N, size_of(k), size_of(m), size_of(n), &one, w, CUDA_R_16BF,
                                     size_of(k), dy, CUDA_R_16BF, size_of(n), &beta, dx, type_dx, size_of(k),
                                     QL_CUBLAS_COMPUTE_32F, QL_CUBLAS_ALGORITHM), "cublasGemmEx");
}

/* ---- tensor maps: the driver's function, found through the runtime ------------------------------------------------------- */

/* cuTensorMapEncodeTiled (cuda.h of the driver; types and modes by number, declared by hand as above) */
typedef int (*encode_tiled)(ql_tensor_map *map, int type, uint32_t rank, void *memory, const uint64_t *sizes, const uint64_t *strides,
                            const uint32_t *box, const uint32_t *steps, int interleave, int swizzle, int promotion, int fill);

int ql_cuda_tensor_map(ql_tensor_map *map, const __nv_bfloat16 *x, int64_t rows, int64_t columns, int64_t line, int box_rows) {
    enum { BFLOAT16 = 9, SWIZZLE_128 = 3, PROMOTE_256 = 3, VERSION = 12000 };
    static encode_tiled encode;
    if (encode == NULL) {
        void *found = NULL;
        cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
        cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, VERSION, cudaEnableDefault, &result);
#else
        cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
        if (!ql_cuda_check(error, "cuTensorMapEncodeTiled")) { return 0; }
        memcpy(&encode, &found, sizeof encode);
    }
    uint64_t sizes[] = {(uint64_t)columns, (uint64_t)rows}, strides[] = {(uint64_t)line * sizeof(__nv_bfloat16)};
    uint32_t box[] = {64, (uint32_t)box_rows}, steps[] = {1, 1};
    if (encode != NULL && encode(map, BFLOAT16, 2, (void *)x, sizes, strides, box, steps, 0, SWIZZLE_128, PROMOTE_256, 0) == 0) { return 1; }
    ql_cuda_refuse(QL_ECUDA, "cuTensorMapEncodeTiled failed");
    return 0;
}

/* ---- cuSOLVER ---------------------------------------------------------------------------------------------------------- */

static int make_solver(ql_cusolver *s) {
    int (*create)(void **handle), (*set_stream)(void *handle, cudaStream_t stream), (*create_parameters)(void **parameters);
    if (!open_ready(&solver) || !find(&solver, "cusolverDnCreate", &create) || !find(&solver, "cusolverDnSetStream", &set_stream) ||
        !find(&solver, "cusolverDnCreateParams", &create_parameters) ||
        !find(&solver, "cusolverDnXpotrf_bufferSize", &s->potrf_sizes) || !find(&solver, "cusolverDnXpotrf", &s->potrf)) {
        return 0;
    }
    return ql_cuda_check_library(create(&s->handle), "cusolverDnCreate") &&
           ql_cuda_check_library(set_stream(s->handle, ql_cuda_stream()), "cusolverDnSetStream") &&
           ql_cuda_check_library(create_parameters(&s->parameters), "cusolverDnCreateParams");
}

const ql_cusolver *ql_cuda_cusolver(void) {
    ql_cusolver *s = &ql_cuda_current()->cusolver;
    if (s->parameters != NULL) { return s; }
    ql_cusolver made = {};
    if (!make_solver(&made)) { return NULL; }
    *s = made;
    return s;
}
