/* 02_linear_wide.cu: the kernels of linear_wide.cuh at 4 bits, group 128, on the shapes of LLaMA-2-7B: against float64 sums of the same values, and
 * timed by graph replay over rotating weights beyond L2, for each number of blocks that split K.
 *
 *   nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -o /tmp/wide cuda/dev/02_linear_wide.cu && /tmp/wide [tokens ...]
 *
 * Without tokens the products are checked, no more (compute-sanitizer). -DQL_RACECHECK: as README.md of the folder above says. */
#include "wide.cuh"

enum { SHARED_MEMORY = 227 << 10 };

/* y (m, n) in float64; a warp an output, a lane the units u = lane, lane + 32, ... of K */
static __global__ void reference(double *y, const uint8_t *records, const bf16 *x, int units, int n, int k) {
    int row = blockIdx.x, token = blockIdx.y;
    double sum = 0.0;
    for (int u = threadIdx.x; u < units; u += WARP) {
        const uint8_t *record = records + ((int64_t)(row / UNIT_ROWS) * units + u) * RECORD;
        double part = 0.0;
        for (int t = 0; t < 4; t++) { /* the lanes that hold the row */
            uint4 v = *(const uint4 *)(record + (row % UNIT_ROWS * 4 + t) * 16);
            uint32_t words[] = {v.x, v.y, v.z, v.w};
            for (int step = 0; step < COLUMNS / STEP; step++) {
                for (int p = 0; p < 2; p++) {
                    float2 w = unpack_bf16(codes_4bit::pair(words, step, p, codes_4bit::symmetric, 0));
                    const bf16 *at = x + (int64_t)token * k + u * COLUMNS + ordered_column(step / 2 * 32 + t * 8 + step % 2 * 4 + 2 * p);
                    part += (double)w.x * __bfloat162float(at[0]) + (double)w.y * __bfloat162float(at[1]);
                }
            }
        }
        sum += part * half_bits_to_float(*(const uint16_t *)(record + codes_4bit::bytes + row % UNIT_ROWS * 2));
    }
    sum = warp_sum(sum);
    if (threadIdx.x == 0) { y[(int64_t)token * n + row] = sum; }
}

template <int Tokens8> static void launch(small_args &a, const ql_tensor_map &map, int cluster) {
    int items = (a.tiles + WIDE_TILES - 1) / WIDE_TILES * ((a.m + 8 * Tokens8 - 1) / (8 * Tokens8)), most = ql_cuda_multiprocessors() / cluster;
    if (cluster == 4) { most = 30; } /* of an H100: its parts have 16 or 18 multiprocessors */
    a.alone = cluster > 1 ? items / (most * cluster) : 0;
    uint32_t without = wide_layout_of<codes_4bit, Tokens8>(0, RECORD).bytes, stage = wide_layout_of<codes_4bit, Tokens8>(1, RECORD).bytes - without;
    a.stages = std::min<int>(WIDE_MAX_STAGES, (SHARED_MEMORY - without) / stage);
    void *arguments[] = {&a, (void *)&map};
    ql_cuda_launch_pointers((const void *)small_wide<codes_4bit, Tokens8>, dim3((a.alone > 0 ? most : std::min(items, most)) * cluster), dim3(WIDE_THREADS), without + a.stages * stage, true,
                            cluster, arguments);
}

template <int Tokens8> static void run(int n, int k, int m, int cluster, bool timed) {
    int64_t bytes = (int64_t)n / UNIT_ROWS * (k / COLUMNS) * RECORD;
    int copies = timed ? (int)(120000000 / bytes + 2) : 1;
    device_array<uint8_t> records(bytes * copies);
    device_array<bf16> x((size_t)m * k);
    device_array<float> y((size_t)m * n), one(std::vector<float>{1.0f});
    fill_records<<<1024, 256, 0, harness_stream>>>((uint32_t *)records.get(), bytes * copies / 4);
    fill_x<<<1024, 256, 0, harness_stream>>>(x.get(), (int64_t)m * k);
    ql_tensor_map map = map_of(x.get(), m, k, 8 * Tokens8);
    if (timed) {
        double us = time_us(copies, [&](int i) {
            small_args a = arguments_of(records.get() + bytes * i, y.get(), one.get(), n, k, m, SMALL_FLOAT);
            launch<Tokens8>(a, map, cluster);
        });
        printf("%6d x %5d, %4d tokens, items of %3d, clusters of %d: %6.1f us, %3.0f TFLOP/s\n", n, k, m, 8 * Tokens8, cluster, us, 2e-6 * n * k * m / us);
        return;
    }
    device_array<double> exact((size_t)m * n);
    small_args a = arguments_of(records.get(), y.get(), one.get(), n, k, m, SMALL_FLOAT);
    launch<Tokens8>(a, map, cluster);
    reference<<<dim3(n, m), WARP, 0, harness_stream>>>(exact.get(), records.get(), x.get(), k / COLUMNS, n, k);
    y.down(), exact.down();
    double error = 0.0, all = 0.0;
    for (size_t i = 0; i < y.host.size(); i++) { error += pow(y.host[i] - exact.host[i], 2), all += pow(exact.host[i], 2); }
    char what[100];
    snprintf(what, sizeof what, "%d x %d, %d tokens, items of %d, clusters of %d: relative error", n, k, m, 8 * Tokens8, cluster);
    expect(sqrt(error / all) < 0x1p-8 && y.guards(), what, sqrt(error / all), 0x1p-8); /* values are rounded to bfloat16 */
}

int main(int count, char **argument) {
    const struct {
        int n, k;
    } shapes[] = {{12288, 4096}, {4096, 4096}, {22016, 4096}, {4096, 11008}};
    harness_begin();
    for (int cluster = 1; cluster <= 4; cluster *= 2) {
        run<16>(400, 1024, 200, cluster, false), run<32>(400, 1024, 300, cluster, false);
        if (count > 1) { run<16>(40960, 512, 70, cluster, false), run<32>(20480, 512, 300, cluster, false); }
    }
    for (auto shape : shapes) {
        for (int i = 1; i < count; i++) {
            for (int cluster = 1; cluster <= 4; cluster *= 2) {
                run<16>(shape.n, shape.k, atoi(argument[i]), cluster, true), run<32>(shape.n, shape.k, atoi(argument[i]), cluster, true);
            }
        }
    }
    return harness_end();
}
