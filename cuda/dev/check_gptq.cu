/* check_gptq.cu: GPTQ's column loop on the device against the CPU's, given one and the same factor; the factor against a plain
 * Cholesky; times at the shapes of a 7B.
 *
 *   for f in csrc/*.c csrc/ops/*.c csrc/core/*.c csrc/quant/*.c; do gcc -std=c11 -O2 -DQL_BUILT_CUDA -c $f -o ${f//[\/]/_}.o; done
 *   nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -o check_gptq cuda/dev/check_gptq.cu cuda/gptq.cu \
 *       cuda/libraries.cu *.o -ldl
 *   ./check_gptq
 *
 * Some 15 s. */
#include "harness.cuh"

#include "../../csrc/core/bits.h"
#include "../gptq.cuh"
#include "../state.h"

#include <stdarg.h>
#include <time.h>

/* ---- what gptq.cu and libraries.cu find in backend.cu and memory.cu ------------------------------------------------- */

static ql_cuda_device only;
ql_cuda_device *ql_cuda_current(void) { return &only; }
int ql_cuda_recording(void) { return 0; }
ql_status ql_cuda_refuse(ql_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    printf("\n");
    return status;
}
int ql_cuda_check_library(int result, const char *what) {
    if (result != 0) { printf("%s: %d\n", what, result); }
    return result == 0;
}
ql_status ql_cuda_alloc(void **memory, size_t bytes) { return must(cudaMalloc(memory, bytes + 1), "memory"), QL_OK; }
void ql_cuda_free(void *memory) { must(cudaFree(memory), "memory"); }
ql_status ql_cuda_download(void *host, const void *memory, size_t bytes) {
    must(cudaMemcpyAsync(host, memory, bytes, cudaMemcpyDeviceToHost, harness_stream), "download");
    return must(cudaStreamSynchronize(harness_stream), "kernel"), QL_OK;
}

static void must(bool good, const char *what) {
    if (good) { return; }
    printf("%s: %s\n", what, ql_status_detail());
    exit(2);
}

template <typename T> struct memory {
    T *at = NULL;
    size_t count;
    memory(size_t count) : count(count) { must(cudaMalloc((void **)&at, count * sizeof(T)), "memory"); }
    memory(const std::vector<T> &values) : memory(values.size()) {
        must(cudaMemcpy(at, values.data(), count * sizeof(T), cudaMemcpyHostToDevice), "upload");
    }
    memory(const memory &) = delete;
    ~memory() { cudaFree(at); }
    std::vector<T> down() {
        std::vector<T> values(count);
        return ql_cuda_download(values.data(), at, count * sizeof(T)), values;
    }
};

/* ---- problems ------------------------------------------------------------------------------------------------------- */

/* a Hessian of correlated inputs, lower; column 3 has no input */
static std::vector<float> hessian(int64_t k) {
    std::vector<float> h(k * k, 0.0f), x(k);
    for (int64_t t = 0; t < 3 * k; t++) {
        float common = normal();
        for (int64_t j = 0; j < k; j++) { x[j] = j == 3 ? 0.0f : (normal() + 0.7f * common) * (1.0f + (float)(j % 7)); }
        for (int64_t i = 0; i < k; i++) {
            for (int64_t j = 0; j <= i; j++) { h[i * k + j] += x[i] * x[j]; }
        }
    }
    return h;
}

struct problem {
    int64_t n, k;
    std::vector<float> w;
    std::vector<double> feedback, diagonal, importance;
    std::vector<int32_t> order;
    std::vector<uint8_t> dead;
};

static void shuffle(std::vector<int32_t> &order, int64_t group) { /* groups, and columns in each */
    int64_t k = (int64_t)order.size(), whole = k / group;
    std::vector<int32_t> groups(whole);
    for (int64_t i = 0; i < whole; i++) { groups[i] = (int32_t)i; }
    for (int64_t i = whole - 1; i > 0; i--) { std::swap(groups[i], groups[(size_t)(fabs(normal()) * 1000) % (i + 1)]); }
    for (int64_t j = 0; j < whole * group; j++) { order[j] = (int32_t)(groups[j / group] * group + (j % group * 5 + 1) % group); }
}

static problem make(int64_t n, int64_t k, int64_t group, bool ordered) {
    problem p = {n, k, std::vector<float>(n * k), {}, std::vector<double>(k), std::vector<double>(k), std::vector<int32_t>(k),
                 std::vector<uint8_t>(k, 0)};
    std::vector<float> h = hessian(k);
    double damp = 0.0, factor = 2.0 / (3.0 * (double)k);
    for (float &x : p.w) { x = normal() * 0.02f; }
    for (int64_t j = 0; j < k; j++) { p.order[j] = (int32_t)j, damp += 0.01 * factor * h[j * k + j] / (double)k; }
    if (ordered && group % 5 != 0) { shuffle(p.order, group); } /* steps of 5 meet every column */
    p.dead[3] = 1;
    for (int64_t j = 0; j < k; j++) { p.importance[j] = (j == 3 ? 1.0 : factor * h[j * k + j]) + damp; }
    p.feedback.resize(k * k);
    must(ql_gptq_matrix(p.feedback.data(), h.data(), p.order.data(), k, factor, damp) == QL_OK, "matrix");
    for (int64_t i = 0; i < k; i++) { /* Cholesky, lower, row-major, in place */
        for (int64_t j = 0; j <= i; j++) {
            double sum = p.feedback[i * k + j];
            for (int64_t l = 0; l < j; l++) { sum -= p.feedback[i * k + l] * p.feedback[j * k + l]; }
            p.feedback[i * k + j] = i == j ? sqrt(sum) : sum / p.feedback[j * k + j];
        }
    }
    ql_gptq_feedback(p.feedback.data(), p.diagonal.data(), k);

    memory<float> dh(h);
    memory<int32_t> dorder(p.order);
    memory<double> matrix(k * k), feedback(k * k), diagonal(k);
    int info = -1;
    must(ql_cuda_gptq_matrix(matrix.at, dh.at, dorder.at, k, factor, damp) == QL_OK, "matrix");
    must(ql_cuda_gptq_factor(feedback.at, diagonal.at, matrix.at, k, &info) == QL_OK, "factor");
    std::vector<double> f = feedback.down(), d = diagonal.down();
    double worst = info != 0;
    for (int64_t i = 0; i < k; i++) {
        worst = std::max(worst, fabs(d[i] / p.diagonal[i] - 1.0));
        for (int64_t j = i + 1; j < k; j++) { worst = std::max(worst, fabs(f[i * k + j] - p.feedback[i * k + j])); }
    }
    if (!(worst < 1e-10)) { printf("FAIL factor of %d columns: %g\n", (int)k, worst), harness_failures++; }
    return p;
}

static void check(const problem &p, int64_t group, const ql_gptq_options &options) {
    int64_t n = p.n, k = p.k, groups = (k + group - 1) / group, words = ql_words_per_row(k, options.bits);
    std::vector<uint32_t> codes(n * words, 0);
    std::vector<float> scales(n * groups);
    std::vector<uint8_t> zeros(n * groups), work(ql_gptq_work_bytes(k) + 64);
    std::vector<double> loss(n, 0.0);
    ql_gptq_problem host = {p.w.data(),          p.feedback.data(), p.diagonal.data(), p.order.data(),
                            p.importance.data(), p.dead.data(),     n, k, group};
    ql_gptq_result result = {codes.data(), scales.data(), zeros.data(), loss.data()};
    void *aligned = (void *)(((uintptr_t)work.data() + 63) / 64 * 64);
    ql_gptq_quantize(&result, &host, &options, aligned, ql_gptq_work_bytes(k));

    memory<float> w(p.w), dscales(scales.size());
    memory<double> feedback(p.feedback), diagonal(p.diagonal), importance(p.importance), dloss(n);
    memory<int32_t> order(p.order);
    memory<uint8_t> dead(p.dead), dzeros(zeros.size());
    memory<uint32_t> dcodes(codes.size());
    ql_gptq_problem there = {w.at, feedback.at, diagonal.at, order.at, importance.at, dead.at, n, k, group};
    ql_gptq_result got = {dcodes.at, dscales.at, dzeros.at, dloss.at};
    if (!ql_cuda_gptq_supports(&there, &options)) { return; }
    must(ql_cuda_gptq_quantize(&got, &there, &options, p.order.data()) == QL_OK, "quantize");
    double lost[2] = {0.0, 0.0};
    std::vector<double> losses = dloss.down();
    for (int64_t r = 0; r < n; r++) { lost[0] += loss[r], lost[1] += losses[r]; }
    bool same = dcodes.down() == codes && dscales.down() == scales && dzeros.down() == zeros;
    if (same && fabs(lost[0] - lost[1]) <= 1e-9 * lost[0]) { return; }
    int64_t differ = 0;
    std::vector<uint32_t> there_codes = dcodes.down();
    for (int64_t i = 0; i < n * words; i++) { differ += there_codes[i] != codes[i]; }
    printf("FAIL %d x %d group %d bits %d sym %d search %d fixed %d stale %d: %d of %d words differ, scales %s, loss %g %g\n", (int)n,
           (int)k, (int)group, options.bits, options.symmetric, options.search, options.fixed_scales, options.stale_scales,
           (int)differ, (int)(n * words), dscales.down() == scales ? "equal" : "differ", lost[0], lost[1]);
    harness_failures++;
}

static void check_all() {
    int cases = 0;
    for (int64_t k : {128, 200, 384}) {
        for (int64_t group : {(int64_t)16, (int64_t)64, (int64_t)128, k}) {
            for (int ordered = 0; ordered < 2; ordered++) {
                problem p = make(k == 128 ? 20 : k == 200 ? 33 : 70, k, group, ordered);
                for (int mode = cases % 2; mode < 24; mode += 2) {
                    ql_gptq_options o = {};
                    o.bits = (int[]){4, 3, 8, 2}[mode / 2 % 4], o.symmetric = mode / 6 % 2, o.search = (ql_scale_search)(mode / 8);
                    o.half_scales = mode % 3 != 1, o.fixed_scales = group == k, o.stale_scales = !o.fixed_scales && mode % 5 == 1;
                    if (o.search == QL_SEARCH_MSE && (k != 128 || mode > 11)) { continue; } /* slow on the CPU */
                    check(p, group, o), cases++;
                }
            }
        }
        printf("%d columns: %d cases, %d failures so far\n", (int)k, cases, harness_failures);
    }
}

static double seconds() {
    struct timespec t;
    must(cudaStreamSynchronize(harness_stream), "kernel");
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void time_shape(int64_t n, int64_t k) {
    std::vector<float> w(n * k), h(k * k);
    std::vector<int32_t> order(k);
    for (size_t i = 0; i < w.size(); i++) { w[i] = i < 1000003 ? normal() : w[i - 1000003]; }
    for (int64_t i = 0; i < k; i++) {
        order[i] = (int32_t)i;
        for (int64_t j = 0; j <= i; j++) { h[i * k + j] = i == j ? 3.0f : 0.3f * (float)((i * 7 + j * 13) % 11) / (float)(i - j + 10); }
    }
    std::vector<double> ones(k, 1.0);
    memory<float> dw(w), dh(h), scales(n * ((k + 127) / 128));
    memory<int32_t> dorder(order);
    memory<double> importance(ones), matrix(k * k), feedback(k * k), diagonal(k), loss(n);
    memory<uint8_t> dead(std::vector<uint8_t>(k, 0)), zeros(n * ((k + 127) / 128));
    memory<uint32_t> codes(n * ql_words_per_row(k, 4));
    ql_gptq_problem p = {dw.at, feedback.at, diagonal.at, dorder.at, importance.at, dead.at, n, k, 128};
    ql_gptq_result result = {codes.at, scales.at, zeros.at, loss.at};
    for (int search = 0; search < 3; search++) {
        ql_gptq_options options = {};
        options.bits = 4, options.symmetric = 1, options.half_scales = 1, options.search = (ql_scale_search)search;
        int info = 0;
        double at[4];
        for (int round = 0; round < 2; round++) { /* the first one opens libraries */
            at[0] = seconds();
            must(ql_cuda_gptq_matrix(matrix.at, dh.at, dorder.at, k, 1.0, 1.0) == QL_OK, "matrix"), at[1] = seconds();
            must(ql_cuda_gptq_factor(feedback.at, diagonal.at, matrix.at, k, &info) == QL_OK && info == 0, "factor"), at[2] = seconds();
            must(ql_cuda_gptq_quantize(&result, &p, &options, order.data()) == QL_OK, "quantize"), at[3] = seconds();
        }
        printf("%5d x %5d search %d: matrix %.2f ms, factor %.2f ms, column loop %.2f ms\n", (int)n, (int)k, search,
               1e3 * (at[1] - at[0]), 1e3 * (at[2] - at[1]), 1e3 * (at[3] - at[2]));
        fflush(stdout);
    }
}

int main(void) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    harness_begin();
    only.stream = harness_stream;
    ql_cuda_set_folders("/usr/local/cuda/lib64");
    check_all();
    time_shape(4096, 4096);
    time_shape(11008, 4096);
    time_shape(4096, 11008);
    return harness_end();
}
