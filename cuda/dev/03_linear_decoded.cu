/* 03_linear_decoded.cu: the kernel of linear_decoded.cuh on the shapes of LLaMA-2-7B: against float64 sums of the values that it
 * decoded, and timed by graph replay beside cuBLAS' product of these.
 *
 *   nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -o /tmp/decoded cuda/dev/03_linear_decoded.cu && /tmp/decoded [tokens ...]
 *
 * cuBLAS is found through LD_LIBRARY_PATH. Without tokens the products are checked, no more (compute-sanitizer). -DQL_RACECHECK: as README.md of the folder above says. */
#include "../linear_decoded.cuh"
#include "wide.cuh"

#include <dlfcn.h>

/* what is used of cuBLAS */
struct cublas {
    void *handle;
    int (*create)(void **handle), (*set_stream)(void *handle, cudaStream_t stream), (*set_workspace)(void *handle, void *memory, size_t bytes);
    int (*gemm_ex)(void *handle, int op_a, int op_b, int m, int n, int k, const void *alpha, const void *a, int type_a, int ld_a, const void *b, int type_b,
                   int ld_b, const void *beta, void *c, int type_c, int ld_c, int compute, int algorithm);
    cublas() {
        enum { WORKSPACE = 32 << 20 };
        void *library = dlopen("libcublas.so.13", RTLD_NOW), *workspace;
        if (library == NULL) { printf("%s\n", dlerror()), exit(2); }
        *(void **)&create = dlsym(library, "cublasCreate_v2"), *(void **)&set_stream = dlsym(library, "cublasSetStream_v2");
        *(void **)&set_workspace = dlsym(library, "cublasSetWorkspace_v2"), *(void **)&gemm_ex = dlsym(library, "cublasGemmEx");
        must(cudaMalloc(&workspace, WORKSPACE), "workspace");
        create(&handle), set_stream(handle, harness_stream), set_workspace(handle, workspace, WORKSPACE);
    }
};

/* y (m, n) in float64; a warp an output */
static __global__ void reference(double *y, const bf16 *w, const bf16 *x, int n, int k) {
    int row = blockIdx.x, token = blockIdx.y;
    double sum = 0.0;
    for (int j = threadIdx.x; j < k; j += WARP) { sum += (double)__bfloat162float(w[(int64_t)row * k + j]) * __bfloat162float(x[(int64_t)token * k + j]); }
    sum = warp_sum(sum);
    if (threadIdx.x == 0) { y[(int64_t)token * n + row] = sum; }
}

struct problem {
    int n, k, m;
    device_array<uint8_t> records;
    device_array<bf16> x, values, y;
    device_array<float> one;
    device_array<uint32_t> counters;
    ql_tensor_map x_map, values_map;
    problem(int n, int k, int m)
        : n(n), k(k), m(m), records((size_t)n / UNIT_ROWS * (k / COLUMNS) * RECORD), x((size_t)m * k), values((size_t)n * k), y((size_t)m * n),
          one(std::vector<float>{1.0f}), counters(std::vector<uint32_t>(2 + (n / DECODED_ROWS + 1) * (k / DECODED_CHUNK + 1))) {
        fill_records<<<1024, 256, 0, harness_stream>>>((uint32_t *)records.get(), records.host.size() / 4);
        fill_x<<<1024, 256, 0, harness_stream>>>(x.get(), (int64_t)m * k);
        values_map = map_of(values.get(), n, k, DECODED_ROWS), x_map = map_of(x.get(), m, k, 8 * DECODED_TOKENS8 / DECODED_BLOCKS);
    }
    void launch() {
        small_args a = arguments_of(records.get(), y.get(), one.get(), n, k, m, SMALL_BF16);
        int across = (m + 255) / 256, pairs = ((a.tiles + WIDE_TILES - 1) / WIDE_TILES + 1) / 2, most = ql_cuda_multiprocessors() / DECODED_BLOCKS;
        int clusters = std::min(pairs * across, most), width = std::min<int>(across, DECODED_BAND);
        decoded_work work = {values.get(), counters.get(), counters.get() + 1, counters.get() + 2, (int)counters.host.size(),
                             (clusters + width - 1) / width * DECODED_BLOCKS * WIDE_TILES};
        void *arguments[] = {&a, &work, &x_map, &values_map};
        ql_cuda_launch_pointers((const void *)small_decoded<codes_4bit>, dim3(clusters * DECODED_BLOCKS), dim3(WIDE_THREADS), DECODED_BYTES, true,
                                DECODED_BLOCKS, arguments);
    }
};

static void run(int n, int k, int m, bool timed) {
    problem of(n, k, m);
    if (timed) {
        static cublas blas;
        double us[2][3];
        for (int i = 0; i < 3; i++) {
            for (int kind = 0; kind < 2; kind++) {
                us[kind][i] = time_us(4, [&](int) {
                    float alpha = 1.0f, beta = 0.0f;
                    if (kind == 0) { return of.launch(); }
                    blas.gemm_ex(blas.handle, 1, 0, n, m, k, &alpha, of.values.get(), CUDA_R_16BF, k, of.x.get(), CUDA_R_16BF, k, &beta, of.y.get(),
                                 CUDA_R_16BF, n, 68 /* COMPUTE_32F */, -1);
                }, 8);
            }
        }
        for (auto &each : us) { std::sort(each, each + 3); }
        printf("%6d x %5d, %4d tokens: %6.1f us (%3.0f TFLOP/s), cuBLAS of the decoded weight %6.1f (%3.0f %%)\n", n, k, m, us[0][1],
               2e-6 * n * k * m / us[0][1], us[1][1], 100 * us[1][1] / us[0][1]);
        return;
    }
    device_array<double> exact((size_t)m * n);
    char what[100];
    for (int again = 0; again < 2; again++) { /* counters were left as they were */
        must(cudaMemsetAsync(of.values.get(), 0xff, of.values.host.size() * sizeof(bf16), harness_stream), "values"); /* NaN */
        of.launch();
        reference<<<dim3(n, m), WARP, 0, harness_stream>>>(exact.get(), of.values.get(), of.x.get(), n, k);
        of.y.down(), exact.down();
        double error = 0.0, all = 0.0;
        for (size_t i = 0; i < of.y.host.size(); i++) { error += pow(__bfloat162float(of.y.host[i]) - exact.host[i], 2), all += pow(exact.host[i], 2); }
        snprintf(what, sizeof what, "%d x %d, %d tokens: relative error", n, k, m);
        expect(sqrt(error / all) < 0x1p-9 && of.y.guards() && of.values.guards(), what, sqrt(error / all), 0x1p-9); /* rounded once */
    }
}

int main(int count, char **argument) {
    const struct {
        int n, k;
    } shapes[] = {{12288, 4096}, {4096, 4096}, {22016, 4096}, {4096, 11008}};
    harness_begin();
    run(400, 1024, 200, false), run(256, 128, 256, false), run(144, 384, 1, false), run(4096, 512, 300, false), run(2048, 640, 2300, false);
    for (auto shape : shapes) {
        for (int i = 1; i < count; i++) { run(shape.n, shape.k, atoi(argument[i]), true); }
    }
    return harness_end();
}
