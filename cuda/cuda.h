/* cuda.h: what the CUDA files share: the device in use, its stream, scratch memory, launches, cuBLAS and cuSOLVER.
 *
 * A call of the backend runs between begin and end under one lock, so kernels never run beside those of another call, and
 * scratch memory belongs to the call. All is launched on ql_cuda_stream(); nothing here waits for the device but
 * ql_cuda_download and ql_cuda_finish. Failures are kept by ql_cuda_check and told by end: ops return nothing.
 *
 * Programmatic dependent launch (ql_cuda_launch with pdl): the kernel may start before the one ahead of it has ended. Each
 * such kernel must, in all of its threads, call ql_cuda_wait_previous() before it reads or writes anything that an earlier
 * kernel wrote or read (weights are free: nothing writes them), and may call ql_cuda_start_next() when the next one may
 * begin to start. A kernel that does not know the two is launched without pdl and then begins after all before it. */
#ifndef QL_CUDA_H
#define QL_CUDA_H

#include "../csrc/quantlab.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

/* ---- kernels of the table: a line here puts ql_<op>_cuda into it (backend.cu) -------------------------------- */

#define QL_CUDA_PLAIN_OPS(X)  \
    X(embedding_forward)      \
    X(linear_many_forward)    \
    X(rmsnorm_forward)        \
    X(rope_forward)           \
    X(attention_forward)      \
    X(swiglu_forward)         \
    X(add_forward)            \
    X(scatter_rows_forward)   \
    X(gather_rows_forward)    \
    X(sample_forward)         \
    X(advance_forward)        \
    X(cross_entropy_forward)  \
    X(rmsnorm_backward)       \
    X(attention_backward)     \
    X(swiglu_backward)        \
    X(dropout_forward)        \
    X(scale_forward)          \
    X(square_sum_forward)     \
    X(adamw_forward)          \
    X(gram_forward)           \
    X(feedback_forward)

/* ops of QL_FUSED_OPS */
#define QL_CUDA_FUSED_OPS(X)    \
    X(qkv_forward)              \
    X(attention_fused_forward)  \
    X(gate_up_forward)          \
    X(linear_residual_forward)  \
    X(norm_fused_forward)       \
    X(difference_forward)       \
    X(gram_fused_forward)       \
    X(adapted_forward)          \
    X(adapted_backward)         \
    X(attention_fused_backward) \
    X(rmsnorm_fused_backward)   \
    X(rope_fused_forward)       \
    X(swiglu_fused_forward)     \
    X(swiglu_fused_backward)    \
    X(round_forward)

/* ops of QL_FORMAT_OPS, one function for all formats */
#define QL_CUDA_FORMAT_OPS(X) \
    X(decode_forward)         \
    X(linear_forward)         \
    X(linear_backward_input)  \
    X(quantize_forward)

#define X(op, params) extern "C" void ql_##op##_cuda params;
QL_OPS(X)
QL_FUSED_OPS(X)
QL_FORMAT_OPS(X)
#undef X

/* Makes w->packed, where its layout is known, from the arrays on the device; unpack releases it. (cuda/pack.cu) */
ql_status ql_cuda_pack(ql_weight *w);
void ql_cuda_unpack(ql_weight *w);

/* takes_ordered of the table (cuda/linear_packed.cu) */
int ql_cuda_takes_ordered(const ql_weight *w, const ql_low_rank *l, int64_t t);

/* GPTQ (gptq_table.cu) */
extern "C" const struct ql_gptq_device ql_cuda_gptq;

/* ---- the device in use (backend.cu) --------------------------------------------------------------------------- */

cudaStream_t ql_cuda_stream(void);
int ql_cuda_multiprocessors(void);
int ql_cuda_capability(void); /* 80, 90, …: 10 major + minor, of the device or of the code that this build has for it, the lesser */
int ql_cuda_is_built(const void *kernel); /* whether this build has code of a kernel for sm_90a for the device: the kernel is empty otherwise */
int ql_cuda_recording(void);
int ql_cuda_max_clusters(int cluster); /* clusters of 1, 2, 4 or 8 blocks, of one block an SM, that run at the same time (sm_90) */

/* keeps the first failure of this call; `what` names what was tried. 1 where there was none. */
int ql_cuda_check(cudaError_t error, const char *what);
ql_status ql_cuda_status(cudaError_t error, const char *what); /* the same as a status with a detail */
ql_status ql_cuda_refuse(ql_status status, const char *format, ...); /* keeps a failure of our own */

/* ---- memory (memory.cu): from the device's pool, in the order of the stream; 256-byte aligned -------------------- */

ql_status ql_cuda_alloc(void **memory, size_t bytes);
void ql_cuda_free(void *memory);
ql_status ql_cuda_upload(void *memory, const void *host, size_t bytes);
ql_status ql_cuda_download(void *host, const void *memory, size_t bytes);
ql_status ql_cuda_finish(void);

/* Grow-only scratch memory of the call, one a slot, contents kept only as long as no other op uses the slot. NULL (and the
 * failure is kept) where memory is out, or a recorded step would have to move it. An op that gets NULL returns at once. */
typedef enum {
    QL_SCRATCH_ACTIVATION, /* bf16 copies of float32 activations */
    QL_SCRATCH_OUTPUT,     /* results before they are converted or added */
    QL_SCRATCH_WEIGHT,     /* a dequantized weight or panel */
    QL_SCRATCH_PARTIAL,    /* sums of split products */
    QL_SCRATCH_NORM,       /* normed activations */
    QL_SCRATCH_FUSED,      /* what a fused op holds between its kernels */
    QL_SCRATCH_LOW_RANK,   /* products with the A of adapters */
    QL_SCRATCH_ATTENTION,  /* partial results of split attention */
    QL_SCRATCH_SAMPLE,
    QL_SCRATCH_GPTQ,
    QL_SCRATCH_BLAS,       /* cuBLAS' workspace */
    QL_SCRATCH_SOLVER,
    QL_SCRATCH_COUNTERS,   /* zeros: a kernel that counts here leaves zeros */
    QL_SCRATCH_COUNT
} ql_cuda_slot;
void *ql_cuda_scratch(ql_cuda_slot slot, size_t bytes);

/* ---- launches --------------------------------------------------------------------------------------------------- */

/* the launch of any kernel with its arguments as pointers; cluster 0 or 1: none */
void ql_cuda_launch_pointers(const void *kernel, dim3 grid, dim3 block, size_t shared, bool pdl, unsigned cluster,
                             void **arguments);

template <typename... Parameters>
static inline void ql_cuda_launch_exact(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, bool pdl,
                                        unsigned cluster, Parameters... values) {
    void *pointers[] = {(void *)&values..., nullptr};
    ql_cuda_launch_pointers((const void *)kernel, grid, block, shared, pdl, cluster, pointers);
}

/* clusters of `cluster` blocks along x (sm_90; the grid's x is a multiple of it) */
template <typename... Parameters, typename... Arguments>
static inline void ql_cuda_launch_cluster(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, bool pdl,
                                          unsigned cluster, Arguments... arguments) {
    static_assert(sizeof...(Parameters) == sizeof...(Arguments), "the kernel takes another number of arguments");
    ql_cuda_launch_exact(kernel, grid, block, shared, pdl, cluster, static_cast<Parameters>(arguments)...);
}

/* kernel<<<grid, block, shared, ql_cuda_stream()>>>(arguments...), with shared memory beyond 48 KB allowed */
template <typename... Parameters, typename... Arguments>
static inline void ql_cuda_launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, bool pdl,
                                  Arguments... arguments) {
    ql_cuda_launch_cluster(kernel, grid, block, shared, pdl, 0, arguments...);
}

#ifdef __CUDACC__
static __device__ __forceinline__ void ql_cuda_wait_previous(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

static __device__ __forceinline__ void ql_cuda_start_next(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#endif

/* ---- cuBLAS and cuSOLVER, opened at first use (libraries.cu) ----------------------------------------------------- */

/* The few functions in use, declared by hand: the libraries' headers are not needed to build. Matrices are column-major.
 * Operations: 0 as it is, 1 transposed. Compute types: 68 float32; fill 0 lower, 1 upper. All return 0 where well. */
typedef struct {
    void *handle; /* bound to ql_cuda_stream() and to scratch memory as workspace */
    int (*gemm_ex)(void *handle, int op_a, int op_b, int m, int n, int k, const void *alpha, const void *a, cudaDataType type_a,
                   int lda, const void *b, cudaDataType type_b, int ldb, const void *beta, void *c, cudaDataType type_c,
                   int ldc, int compute, int algorithm);
    int (*gemm_strided_batched_ex)(void *handle, int op_a, int op_b, int m, int n, int k, const void *alpha, const void *a,
                                   cudaDataType type_a, int lda, long long stride_a, const void *b, cudaDataType type_b,
                                   int ldb, long long stride_b, const void *beta, void *c, cudaDataType type_c, int ldc,
                                   long long stride_c, int batch, int compute, int algorithm);
    int (*sgemm)(void *handle, int op_a, int op_b, int m, int n, int k, const float *alpha, const float *a, int lda,
                 const float *b, int ldb, const float *beta, float *c, int ldc);
    int (*dgemm)(void *handle, int op_a, int op_b, int m, int n, int k, const double *alpha, const double *a, int lda,
                 const double *b, int ldb, const double *beta, double *c, int ldc);
    int (*dtrsm)(void *handle, int side, int fill, int op, int unit, int m, int n, const double *alpha, const double *a, int lda,
                 double *b, int ldb);
} ql_cublas;

typedef struct {
    void *handle; /* bound to ql_cuda_stream() */
    void *parameters;
    int (*potrf_sizes)(void *handle, void *parameters, int fill, int64_t n, cudaDataType type, const void *a, int64_t lda,
                       cudaDataType compute, size_t *device_bytes, size_t *host_bytes);
    int (*potrf)(void *handle, void *parameters, int fill, int64_t n, cudaDataType type, void *a, int64_t lda,
                 cudaDataType compute, void *device, size_t device_bytes, void *host, size_t host_bytes, int *info);
} ql_cusolver;

enum { QL_CUBLAS_N = 0, QL_CUBLAS_T = 1, QL_CUBLAS_COMPUTE_32F = 68, QL_CUBLAS_ALGORITHM = -1 };

/* of the device in use; NULL where the library is not there (the failure is kept) */
const ql_cublas *ql_cuda_cublas(void);
const ql_cusolver *ql_cuda_cusolver(void);
int ql_cuda_check_library(int result, const char *what); /* as ql_cuda_check, for their results */

/* y (m, n) = or += x (m, k) W^T in bf16 with float32 sums, row-major: w (n, k) and x bf16, y bf16 or float32 */
void ql_cuda_matmul(void *y, cudaDataType type_y, const __nv_bfloat16 *x, const __nv_bfloat16 *w, int64_t m, int64_t n,
                    int64_t k, int accumulate);
/* dx (m, k) = or += dy (m, n) W */
void ql_cuda_matmul_backward(void *dx, cudaDataType type_dx, const __nv_bfloat16 *dy, const __nv_bfloat16 *w, int64_t m,
                             int64_t n, int64_t k, int accumulate);

/* ---- pieces of fused ops ------------------------------------------------------------------------------------------ */

/* out (t, c) bf16 = rmsnorm(x (t, c), gain) (rmsnorm.cu) */
void ql_cuda_rmsnorm_bf16(__nv_bfloat16 *out, const float *x, const float *gain, int64_t t, int64_t c, float eps);

#endif
