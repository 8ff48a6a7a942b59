/* gptq.cu: GPTQ (csrc/quant/gptq.h) on the device, float64 like the CPU's: the matrix, its factor, the column loop. All
 * pointers are of the device unless said.
 *
 * The column loop goes by blocks of up to 128 steps. One product (cuBLAS) brings the block up to date with all finished
 * columns; then a kernel runs the block's steps: 8 lanes own a row, a lane 16 of its columns in registers, 2 neighbours every 16. Each
 * step the owner's value goes to the 8 lanes, all of them round it, and each hands the error to its own columns. Where a group
 * begins with the block, its scales are fitted first, to what the same steps leave without rounding.
 *
 *   shared: A (128, 128) double, the block's feedback with zeros on and below the diagonal | diagonal, importance (128) each */
#include "gptq.cuh"

#include "../csrc/core/bits.h"
#include "../csrc/quant/scale.h"
#include "cuda.h"
#include "device.cuh"

#include <stdlib.h> /* malloc: cuSOLVER asks for host memory */

enum { QL_FILL_LOWER = 0 };
enum { BLOCK = 128, LANES = 8, OWN = BLOCK / LANES, THREADS = 256, ROWS = THREADS / LANES, TILE = 32, TRIALS = 80 };

/* ---- matrix and factor ------------------------------------------------------------------------------------------ */

/* out[j, i], j <= i: element (i, j) of the reversed, permuted, damped Hessian: what a column-major solver calls lower */
static __global__ void matrix_kernel(double *out, const float *h, const int32_t *order, int64_t k, double factor, double damp,
                                     int *not_finite) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, j = blockIdx.y;
    ql_cuda_wait_previous();
    if (i >= k || j > i) { return; }
    int64_t row = order[k - 1 - i], column = order[k - 1 - j];
    double value = row >= column ? h[row * k + column] : h[column * k + row];
    if (!isfinite(value)) { *not_finite = 1; }
    value *= factor;
    out[j * k + i] = i == j ? (value == 0.0 ? 1.0 : value) + damp : value;
}

static __global__ void diagonal_kernel(double *diagonal, const double *l, int64_t k) {
    int64_t j = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    ql_cuda_wait_previous();
    if (j < k) { diagonal[j] = l[(k - 1 - j) * k + (k - 1 - j)]; }
}

/* feedback[a, b] = l[k - 1 - b, k - 1 - a] / diagonal[b] for b > a, tiles through shared memory; grid (b tiles, a tiles) */
static __global__ void feedback_kernel(double *feedback, const double *l, const double *diagonal, int64_t k) {
    __shared__ double tile[TILE][TILE + 1];
    ql_cuda_wait_previous();
    int64_t a0 = (int64_t)blockIdx.y * TILE, b0 = (int64_t)blockIdx.x * TILE;
    if (b0 + TILE <= a0) { return; }
    for (int y = threadIdx.y; y < TILE; y += blockDim.y) { /* row k - 1 - b, column k - 1 - a */
        int64_t b = b0 + y, a = a0 + threadIdx.x;
        tile[y][threadIdx.x] = a < k && b < k ? l[(k - 1 - b) * k + (k - 1 - a)] : 0.0;
    }
    __syncthreads();
    for (int y = threadIdx.y; y < TILE; y += blockDim.y) {
        int64_t a = a0 + y, b = b0 + threadIdx.x;
        if (a < k && b < k && b > a) { feedback[a * k + b] = tile[threadIdx.x][y] / diagonal[b]; }
    }
}

ql_status ql_cuda_gptq_matrix(double *out, const float *h, const int32_t *order, int64_t k, double factor, double damp) {
    int *flag = (int *)ql_cuda_scratch(QL_SCRATCH_GPTQ, 256), not_finite = 0;
    if (flag == NULL) { return QL_ENOMEM; }
    ql_cuda_check(cudaMemsetAsync(flag, 0, sizeof *flag, ql_cuda_stream()), "GPTQ matrix");
    ql_cuda_launch(matrix_kernel, dim3((unsigned)((k + 255) / 256), (unsigned)k), dim3(256), 0, false, out, h, order, k, factor,
                   damp, flag);
    ql_status status = ql_cuda_download(&not_finite, flag, sizeof not_finite);
    if (status != QL_OK) { return status; }
    return not_finite ? ql_fail(QL_ENUMERIC, "the Hessian is not finite: the inputs hold NaN or infinity") : QL_OK;
}

ql_status ql_cuda_gptq_factor(double *feedback, double *diagonal, double *matrix, int64_t k, int *info) {
    const ql_cusolver *solver = ql_cuda_cusolver();
    size_t device_bytes = 0, host_bytes = 0;
    if (solver == NULL) { return QL_ECUDA; }
    if (!ql_cuda_check_library(solver->potrf_sizes(solver->handle, solver->parameters, QL_FILL_LOWER, k, CUDA_R_64F, matrix, k,
                                                   CUDA_R_64F, &device_bytes, &host_bytes),
                               "cusolverDnXpotrf_bufferSize")) {
        return QL_ECUDA;
    }
    char *work = (char *)ql_cuda_scratch(QL_SCRATCH_SOLVER, device_bytes + 256), *host = (char *)malloc(host_bytes + 1);
    if (work == NULL || host == NULL) { return free(host), QL_ENOMEM; }
    int *device_info = (int *)work;
    int result = solver->potrf(solver->handle, solver->parameters, QL_FILL_LOWER, k, CUDA_R_64F, matrix, k, CUDA_R_64F,
                               work + 256, device_bytes, host, host_bytes, device_info);
    ql_status status = ql_cuda_check_library(result, "cusolverDnXpotrf") ? QL_OK : QL_ECUDA;
    if (status == QL_OK) { status = ql_cuda_download(info, device_info, sizeof *info); }
    free(host);
    if (status != QL_OK || *info != 0) { return status; }
    unsigned tiles = (unsigned)((k + TILE - 1) / TILE);
    ql_cuda_launch(diagonal_kernel, dim3((unsigned)((k + 255) / 256)), dim3(256), 0, false, diagonal, matrix, k);
    ql_cuda_launch(feedback_kernel, dim3(tiles, tiles), dim3(TILE, 8), 0, false, feedback, matrix, diagonal, k);
    return QL_OK;
}

/* ---- scales: 8 lanes a group of one row ----------------------------------------------------------------------------- */

static __device__ __forceinline__ double lanes_sum(double x) {
#pragma unroll
    for (int i = LANES / 2; i > 0; i /= 2) { x += __shfl_xor_sync(QL_FULL_WARP, x, i); }
    return x;
}

/* The error of a grid; own(f) calls f(x, importance) for each of the lane's columns. `exact` false: powers in float32. */
template <typename Own>
static __device__ __forceinline__ double grid_error(ql_steps grid, double maxq, bool by_hessian, bool exact, Own own) {
    double sum = 0.0;
    own([&](double x, double importance) {
        double error = grid.scale * (ql_steps_code(grid, x, maxq) - grid.zero) - x;
        if (by_hessian) {
            sum += importance * error * error;
        } else {
            sum += exact ? pow(fabs(error), 2.4) : (double)exp2f(2.4f * log2f(fabsf((float)error)));
        }
    });
    return lanes_sum(sum);
}

/* The grid of one group by 8 lanes (csrc/quant/scale.h). The search of the least |error|^2.4 first looks with float32 powers,
 * whose sums are right to 1e-5, and then compares exactly those that come near the least; of equal ones the first wins. */
template <typename Own>
static __device__ __forceinline__ ql_steps fit_grid(const ql_gptq_options *options, float *trial_errors, Own own) {
    double maxq = (double)((1 << options->bits) - 1), low = 0.0, high = 0.0;
    bool by_hessian = options->search == QL_SEARCH_HESSIAN;
    own([&](double x, double) { low = fmin(low, x), high = fmax(high, x); });
#pragma unroll
    for (int i = LANES / 2; i > 0; i /= 2) {
        low = fmin(low, __shfl_xor_sync(QL_FULL_WARP, low, i)), high = fmax(high, __shfl_xor_sync(QL_FULL_WARP, high, i));
    }
    ql_widen_range(&low, &high, options);
    ql_steps best = ql_steps_of_range(low, high, 1.0, maxq, options);
    if (options->search == QL_SEARCH_NONE) { return best; }
    int trials = by_hessian ? 11 : TRIALS;
    double least = INFINITY;
    float near = INFINITY;
    for (int trial = 0; !by_hessian && trial < trials; trial++) {
        ql_steps grid = ql_steps_of_range(low, high, 1.0 - trial / 100.0, maxq, options);
        float error = (float)grid_error(grid, maxq, false, false, own);
        trial_errors[trial] = error; /* the 8 lanes write the same */
        near = fminf(near, error);
    }
    __syncwarp();
    for (int trial = 0; trial < trials; trial++) {
        bool wanted = by_hessian || trial_errors[trial] <= near * 1.0001f;
        if (!__any_sync(QL_FULL_WARP, wanted)) { continue; }
        double p = by_hessian ? (20 - trial) / 20.0 : 1.0 - trial / 100.0;
        ql_steps grid = ql_steps_of_range(low, high, p, maxq, options);
        double error = grid_error(grid, maxq, by_hessian, true, own);
        if (wanted && error < least) { least = error, best = grid; }
    }
    return best;
}

/* scales of all groups from W itself; grid (groups, row blocks) */
static __global__ void __launch_bounds__(THREADS) fixed_scales_kernel(gptq_args g) {
    __shared__ float trial_errors[ROWS][TRIALS];
    ql_cuda_wait_previous();
    int64_t row = (int64_t)blockIdx.y * ROWS + threadIdx.x / LANES, first = (int64_t)blockIdx.x * g.p.group;
    int64_t end = min(first + g.p.group, g.p.k), line = min(row, g.p.n - 1);
    auto own = [&](auto f) {
        for (int64_t j = first + threadIdx.x % LANES; j < end; j += LANES) {
            f(g.p.dead[j] && !g.options.keep_dead ? 0.0 : (double)g.p.w[line * g.p.k + j], g.p.importance[j]);
        }
    };
    ql_steps grid = fit_grid(&g.options, trial_errors[threadIdx.x / LANES], own);
    if (row < g.p.n && threadIdx.x % LANES == 0) {
        g.r.scales[row * gridDim.x + blockIdx.x] = (float)grid.scale;
        g.r.zeros[row * gridDim.x + blockIdx.x] = (uint8_t)grid.zero;
    }
}

/* ---- one block of steps ----------------------------------------------------------------------------------------------- */

struct block_shared {
    double a[BLOCK][BLOCK], diagonal[BLOCK], importance[BLOCK];
    int32_t column[BLOCK], group[BLOCK]; /* of W; place of the scale in its row */
    float trial_errors[ROWS][TRIALS];
};

/* column in the block of the lane's i'th value */
static __device__ __forceinline__ int own_column(int i) { return i / 2 * 16 + threadIdx.x % LANES * 2 + i % 2; }

static __device__ void load_block(block_shared &s, const gptq_args &g, int64_t begin, int width) {
    for (int i = threadIdx.x; i < BLOCK * BLOCK; i += THREADS) {
        int row = i / BLOCK, column = i % BLOCK;
        s.a[row][column] = column > row && column < width ? g.p.feedback[(begin + row) * g.p.k + begin + column] : 0.0;
    }
    for (int i = threadIdx.x; i < BLOCK; i += THREADS) {
        int column = i < width ? g.p.order[begin + i] : 0;
        s.column[i] = column;
        s.group[i] = (int32_t)((g.options.store_ordered ? begin + i : column) / g.p.group);
        s.diagonal[i] = i < width ? g.p.diagonal[begin + i] : 0.0;
        s.importance[i] = i < width ? g.p.importance[column] : 0.0;
    }
    __syncthreads();
}

/* Runs the steps on z. each(i, step, z of the step, w of the step) gives the error that the step leaves. */
template <typename Each>
static __device__ __forceinline__ void run_steps(double (&z)[OWN], const float (&w)[OWN], const block_shared &s, int width,
                                                 Each each) {
    int lane = threadIdx.x % LANES;
#pragma unroll
    for (int pair = 0; pair < OWN / 2; pair++) {
        for (int owner = 0; owner < LANES && 16 * pair + 2 * owner < width; owner++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                int i = 2 * pair + e, step = 16 * pair + 2 * owner + e;
                double value = __shfl_sync(QL_FULL_WARP, z[i], owner, LANES);
                double error = each(i, owner, step, value, (double)__shfl_sync(QL_FULL_WARP, w[i], owner, LANES));
#pragma unroll
                for (int j = pair; j < OWN / 2; j++) {
                    double2 a = *(const double2 *)&s.a[step][16 * j + 2 * lane];
                    z[2 * j] = fma(error, a.x, z[2 * j]), z[2 * j + 1] = fma(error, a.y, z[2 * j + 1]);
                }
            }
        }
    }
}

/* scales of the groups of this block, from what its steps leave without rounding */
static __device__ __forceinline__ void fit_groups(const gptq_args &g, block_shared &s, const double (&z)[OWN],
                                                  const float (&w)[OWN], int64_t row, int width, int64_t groups) {
    double x[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) { x[i] = z[i]; }
    run_steps(x, w, s, width, [](int, int, int, double value, double weight) { return weight - value; });
    for (int first = 0, end; first < width; first = end) {
        end = first + 1;
        while (end < width && s.group[end] == s.group[first]) { end++; }
        auto own = [&](auto f) {
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                int column = own_column(i);
                if (column >= first && column < end) { f(x[i], s.importance[column]); }
            }
        };
        ql_steps grid = fit_grid(&g.options, s.trial_errors[threadIdx.x / LANES], own);
        if (row < g.p.n && threadIdx.x % LANES == 0) {
            g.r.scales[row * groups + s.group[first]] = (float)grid.scale;
            g.r.zeros[row * groups + s.group[first]] = (uint8_t)grid.zero;
        }
    }
    __syncwarp(); /* the other lanes of the row read them */
}

/* steps begin .. begin + width of 32 rows; update (n, BLOCK): what finished steps add to their weights, NULL: nothing */
static __global__ void __launch_bounds__(THREADS) block_kernel(gptq_args g, const double *update, int64_t begin, int width) {
    extern __shared__ __align__(16) char gptq_shared[];
    block_shared &s = *(block_shared *)gptq_shared;
    ql_cuda_wait_previous();
    load_block(s, g, begin, width);
    int64_t row = (int64_t)blockIdx.x * ROWS + threadIdx.x / LANES, line = min(row, g.p.n - 1), k = g.p.k;
    int64_t groups = (k + g.p.group - 1) / g.p.group;
    double z[OWN], maxq = (double)((1 << g.options.bits) - 1), loss = 0.0;
    float w[OWN], scale[OWN], zero[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        int column = own_column(i);
        bool there = column < width && !g.p.dead[s.column[column]];
        w[i] = there ? g.p.w[line * k + s.column[column]] : 0.0f;
        z[i] = column >= width ? 0.0 : w[i] + (update != NULL ? update[line * BLOCK + column] : 0.0);
    }
    if (!g.options.fixed_scales) { fit_groups(g, s, z, w, row, width, groups); }
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        int64_t place = line * groups + s.group[own_column(i)];
        scale[i] = own_column(i) < width ? *(volatile float *)&g.r.scales[place] : 1.0f;
        zero[i] = own_column(i) < width ? (float)*(volatile uint8_t *)&g.r.zeros[place] : 0.0f;
    }
    run_steps(z, w, s, width, [&](int i, int owner, int step, double value, double weight) {
        ql_steps grid = {__shfl_sync(QL_FULL_WARP, scale[i], owner, LANES), __shfl_sync(QL_FULL_WARP, zero[i], owner, LANES)};
        double code = ql_steps_code(grid, value, maxq), q = grid.scale * (code - grid.zero);
        loss += (value - q) * (value - q) * (0.5 * s.diagonal[step] * s.diagonal[step]);
        if ((int)threadIdx.x % LANES == owner) { z[i] = weight - q, scale[i] = (float)code; } /* a finished step keeps them */
        return weight - q;
    });
    if (row >= g.p.n) { return; }
    if (threadIdx.x % LANES == 0) { g.r.loss[row] += loss; }
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        int column = own_column(i);
        if (column >= width) { continue; }
        g.error[row * k + begin + column] = z[i];
        g.codes[row * k + (g.options.store_ordered ? begin + column : s.column[column])] = (uint8_t)scale[i];
    }
}

/* a thread a word of 32 bits: 32 codes are `bits` words */
static __global__ void pack_codes_kernel(uint32_t *words, const uint8_t *codes, int64_t n, int64_t k, int bits) {
    int64_t per_row = ql_words_per_row(k, bits), i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    ql_cuda_wait_previous();
    if (i >= n * per_row) { return; }
    int64_t row = i / per_row, first_bit = i % per_row * 32;
    uint32_t word = 0;
    for (int64_t j = first_bit / bits; j < k && j * bits < first_bit + 32; j++) {
        int64_t shift = j * bits - first_bit;
        uint32_t code = codes[row * k + j];
        word |= shift >= 0 ? code << shift : code >> -shift;
    }
    words[i] = word;
}

/* ---- the column loop ------------------------------------------------------------------------------------------------- */

bool ql_cuda_gptq_supports(const ql_gptq_problem *p, const ql_gptq_options *options) {
    return options->fixed_scales || (p->group <= BLOCK && (!options->stale_scales || BLOCK % p->group == 0));
}

/* The blocks of csrc/quant/gptq.c where scales are fixed or stale; else a block is a group, or as many steps. */
static int block_width(const ql_gptq_problem *p, const ql_gptq_options *options, const int32_t *order, int64_t begin) {
    int64_t left = p->k - begin, most = BLOCK, width = left < most ? left : most;
    if (options->fixed_scales || options->stale_scales) { return (int)width; }
    int64_t end = 1, group = (options->store_ordered ? begin : order[begin]) / p->group;
    while (end < width && (options->store_ordered ? begin + end : order[begin + end]) / p->group == group) { end++; }
    return (int)end;
}

ql_status ql_cuda_gptq_quantize(const ql_gptq_result *result, const ql_gptq_problem *p, const ql_gptq_options *options,
                                const int32_t *host_order) {
    const ql_cublas *blas = ql_cuda_cublas();
    int64_t n = p->n, k = p->k, groups = (k + p->group - 1) / p->group;
    double one = 1.0, none = 0.0;
    gptq_args g = {*result, *p, *options, NULL, NULL};
    if (blas == NULL) { return QL_ECUDA; }
    char *work = NULL;
    size_t error_bytes = (size_t)(n * k) * sizeof(double), update_bytes = (size_t)(n * BLOCK) * sizeof(double);
    ql_status status = ql_cuda_alloc((void **)&work, error_bytes + update_bytes + (size_t)(n * k));
    if (status != QL_OK) { return status; }
    double *update = (double *)(work + error_bytes);
    g.error = (double *)work, g.codes = (uint8_t *)(work + error_bytes + update_bytes);
    unsigned row_blocks = (unsigned)((n + ROWS - 1) / ROWS);
    ql_cuda_check(cudaMemsetAsync(result->loss, 0, (size_t)n * sizeof(double), ql_cuda_stream()), "GPTQ");
    if (options->fixed_scales) {
        ql_cuda_launch(fixed_scales_kernel, dim3((unsigned)groups, row_blocks), dim3(THREADS), 0, false, g);
    }
    for (int64_t begin = 0; begin < k && status == QL_OK;) {
        int width = block_width(p, options, host_order, begin), failed = 0;
        if (begin > 0) { /* update (n, width) = error (n, begin) feedback[:begin, begin : begin + width] */
            failed = blas->dgemm(blas->handle, QL_CUBLAS_N, QL_CUBLAS_N, width, (int)n, (int)begin, &one, p->feedback + begin,
                                 (int)k, g.error, (int)k, &none, update, BLOCK);
        }
        status = ql_cuda_check_library(failed, "cublasDgemm") ? QL_OK : QL_ECUDA;
        ql_cuda_launch(block_kernel, dim3(row_blocks), dim3(THREADS), sizeof(block_shared), false, g,
                       begin > 0 ? update : (double *)NULL, begin, width);
        begin += width;
    }
    int64_t words = n * ql_words_per_row(k, options->bits);
    ql_cuda_launch(pack_codes_kernel, dim3((unsigned)((words + 255) / 256)), dim3(256), 0, false, result->codes, g.codes, n, k,
                   options->bits);
    ql_cuda_free(work);
    return status;
}
