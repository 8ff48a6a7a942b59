/* 01_linear_small.cu: the kernels of linear_small.cuh and linear_group.cuh at 4 bits, group 128, on the shapes of LLaMA-2-7B: every variant against a
 * float64 product, timed by graph replay over rotating weights beyond L2, beside a kernel that only reads as many bytes.
 *
 *   nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -o /tmp/small cuda/dev/01_linear_small.cu && /tmp/small [all.csv [tokens ...]]
 *
 * Prints the best variants of each shape and number of tokens, then the time of a chain of all four shapes (8 layers of distinct
 * weights), each with its best variant. all.csv: every measurement. -DQL_ONLY_GROUPS: linear_group.cuh alone. */
#include "../linear_group.cuh"
#include "../linear_small.cuh"
#include "maps.cuh"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#define CHECK(call)                                                                                  \
    do {                                                                                             \
        cudaError_t error_ = (call);                                                                 \
        if (error_ != cudaSuccess) {                                                                 \
            printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error_));        \
            exit(1);                                                                                 \
        }                                                                                            \
    } while (0)

#ifndef QL_CODES /* another kind is only timed: tests/cuda/test_linear.py checks it */
#define QL_CODES codes_4bit
#define QL_PARTS 1
#define QL_CHECKED 1
#endif
#ifdef QL_RACECHECK /* one small matrix, every variant once: compute-sanitizer --tool racecheck */
static const bool timed = false;
#else
static const bool timed = true;
#endif
using Codes = QL_CODES;
static const int GROUP_PARTS = QL_PARTS, RECORD = record_bytes<Codes>(GROUP_PARTS, 0), COLUMNS = Codes::columns;
static int sms;
static cudaStream_t stream;

/* ---- variants -------------------------------------------------------------------------------------------------- */

typedef small_layout (*layout_function)(int stages, int record, int units, int cluster, int owned);
struct variant {
    const void *kernel;
    layout_function layout; /* NULL: the register kernel, or where there are groups: that of linear_group.cuh */
    int tokens8, single, warps, units, finishers, blocks;
    uint32_t (*bytes)(int stages, int record, int units, int slots);
    int groups, slots; /* slots: of activations that go by, or 0 */
};
template <int Tokens8, int Groups> static uint32_t group_bytes_of(int stages, int record, int units, int slots) {
    return group_layout_of<Codes, Tokens8, Groups>(stages, record, units, slots).bytes;
}

#define RING(T8, S, W, U, F, B)                                                                                                    \
    variant { (const void *)small_ring<Codes, T8, S, GROUP_PARTS, W, U, F, B>, small_ring_layout<Codes, T8, S, W, U>, T8, S, W, U, F, B, NULL, 0, 0 }
#define REGISTER(T8, S, U, W, B) \
    variant { (const void *)small_register<Codes, T8, S, GROUP_PARTS, U, W, B>, NULL, T8, S, W, U, 0, B, NULL, 0, 0 }
#define GROUP_OF(T8, G, STREAMS, SLOTS)                                                                                                      \
    variant {                                                                                                                                \
        (const void *)small_group<Codes, T8, GROUP_PARTS, G, STREAMS>, NULL, T8, 0, 4 * (G) + 4, 1, 0, 1, group_bytes_of<T8, G>, G, SLOTS    \
    }
#define GROUP(T8, G) GROUP_OF(T8, G, false, 0), GROUP_OF(T8, G, true, 4)

static const variant variants[] = {
#ifndef QL_ONLY_GROUPS
    /* one token */
    RING(1, true, 16, 1, 1, 2), RING(1, true, 8, 1, 1, 3), RING(1, true, 8, 2, 2, 2), RING(1, true, 12, 1, 1, 2), REGISTER(1, true, 2, 16, 2),
    /* 2 to 8 */
    RING(1, false, 8, 1, 2, 2), RING(1, false, 8, 2, 2, 2), RING(1, false, 4, 2, 2, 4), RING(1, false, 16, 1, 2, 1),
    /* 9 to 16 */
    RING(2, false, 16, 1, 2, 1), RING(2, false, 16, 1, 4, 1), RING(2, false, 24, 1, 4, 1), RING(2, false, 8, 2, 2, 1), RING(2, false, 8, 2, 4, 1),
#endif
    GROUP(2, 4),
    /* 17 to 32 */
    GROUP(4, 4), GROUP(4, 3),
    /* 33 to 48, to 64 */
    GROUP(6, 2), GROUP(8, 3), GROUP(8, 2),
};

/* ---- problems --------------------------------------------------------------------------------------------------- */

struct shape {
    int n, k;
    int copies;
    size_t bytes;
    uint8_t *weights; /* copies of `bytes` */
};
struct problem {
    shape *s;
    int m;
    bf16 *x, *ordered; /* ordered: each column at its ordered_column, as linear_group.cuh takes them */
    float *y;          /* (m, n) */
    float *factor;
    std::vector<int> rows;   /* checked */
    std::vector<double> ref; /* (rows, m) */
    double scale;
};

__global__ void fill_weights(uint8_t *records, size_t count, int record, uint32_t seed) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count * (record / 4)) { return; }
    uint32_t h = (uint32_t)i * 2654435761u + seed;
    h ^= h >> 16, h *= 0x7feb352du, h ^= h >> 15, h *= 0x846ca68bu, h ^= h >> 16;
    size_t place = i % (record / 4) * 4;
    if (place >= (size_t)Codes::bytes) { /* two scales of 2^-6 to 2^-5 */
        h = (h & 0x03ff03ffu) | 0x24002400u;
    }
    *(uint32_t *)(records + i * 4) = h;
}

__global__ void read_only(const uint4 *data, size_t count, uint32_t *sink) {
    uint32_t sum = 0;
    size_t step = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += 8 * step) {
        uint4 v[8];
#pragma unroll
        for (int u = 0; u < 8; u++) { v[u] = i + u * step < count ? __ldcs(data + i + u * step) : make_uint4(0, 0, 0, 0); }
#pragma unroll
        for (int u = 0; u < 8; u++) { sum ^= v[u].x ^ v[u].y ^ v[u].z ^ v[u].w; }
    }
    if (sum == 0x12345678u) { *sink = sum; }
}

static uint16_t to_bf16(float v) {
    uint32_t b;
    memcpy(&b, &v, 4);
    return (uint16_t)((b + 0x7fff + (b >> 16 & 1)) >> 16);
}
static float from_bf16(uint16_t h) {
    uint32_t b = (uint32_t)h << 16;
    float v;
    memcpy(&v, &b, 4);
    return v;
}
static double from_half(uint16_t h) { return (h >> 10 & 31) ? ldexp(1024 + (h & 1023), (h >> 10 & 31) - 25) : ldexp(h & 1023, -24); }

static double weight_at(const uint8_t *records, int units, int row, int column) {
    const uint8_t *r = records + ((size_t)(row / 8) * units + column / 128) * RECORD;
    int in = column % 128, j = in / 32 * 2 + in % 8 / 4, t = in % 32 / 8, pair = in % 4 / 2, high = in % 2, i = 2 * (j % 2) + pair;
    uint32_t word;
    uint16_t scale;
    memcpy(&word, r + (row % 8 * 4 + t) * 16 + j / 2 * 4, 4);
    memcpy(&scale, r + CHUNK + row % 8 * 2, 2);
    return ((int)(word >> (4 * i + 16 * high) & 15) - 8) * from_half(scale);
}

/* sums of 48 rows in float64 */
static void make_reference(problem &p, const std::vector<float> &x) {
    int units = p.s->k / 128;
    std::vector<uint8_t> w(p.s->bytes);
    CHECK(cudaMemcpy(w.data(), p.s->weights, p.s->bytes, cudaMemcpyDeviceToHost));
    double squares = 0;
    for (int i = 0; i < 48; i++) {
        int row = i < 8 ? i : i < 16 ? p.s->n - 1 - (i - 8) : rand() % p.s->n;
        std::vector<double> line(p.s->k);
        for (int k = 0; k < p.s->k; k++) { line[k] = weight_at(w.data(), units, row, k); }
        p.rows.push_back(row);
        for (int t = 0; t < p.m; t++) {
            double sum = 0;
            for (int k = 0; k < p.s->k; k++) { sum += line[k] * x[(size_t)t * p.s->k + k]; }
            p.ref.push_back(sum);
            squares += sum * sum;
        }
    }
    p.scale = sqrt(squares / p.ref.size());
}

static problem make_problem(shape *s, int m) {
    problem p;
    p.s = s, p.m = m;
    std::vector<float> x((size_t)m * s->k);
    std::vector<uint16_t> halves(x.size()), ordered(x.size());
    srand(m + s->n);
    for (size_t i = 0; i < x.size(); i++) { x[i] = from_bf16(halves[i] = to_bf16(rand() / (float)RAND_MAX * 2 - 1)); }
    CHECK(cudaMalloc(&p.x, halves.size() * 2));
    CHECK(cudaMemcpy(p.x, halves.data(), halves.size() * 2, cudaMemcpyHostToDevice));
    for (size_t i = 0; i < x.size(); i++) { ordered[i & ~31 | (i & 6) << 2 | (i >> 2 & 6) | i & 1] = halves[i]; } /* as norm_ahead.cuh says */
    CHECK(cudaMalloc(&p.ordered, halves.size() * 2));
    CHECK(cudaMemcpy(p.ordered, ordered.data(), halves.size() * 2, cudaMemcpyHostToDevice));
    CHECK(cudaMalloc(&p.y, (size_t)m * s->n * 4));
    float one = 1.0f;
    CHECK(cudaMalloc(&p.factor, 4));
    CHECK(cudaMemcpy(p.factor, &one, 4, cudaMemcpyHostToDevice));
    make_reference(p, x);
    return p;
}

static double error_of(const problem &p) {
    std::vector<float> y((size_t)p.m * p.s->n);
    CHECK(cudaMemcpy(y.data(), p.y, y.size() * 4, cudaMemcpyDeviceToHost));
    double worst = 0;
    for (size_t i = 0; i < p.rows.size(); i++) {
        for (int t = 0; t < p.m; t++) {
            double e = fabs(y[(size_t)t * p.s->n + p.rows[i]] - p.ref[i * p.m + t]) / p.scale;
            worst = e >= worst ? e : worst;
            if (!(e == e)) { return INFINITY; }
        }
    }
    return worst;
}

/* ---- launches --------------------------------------------------------------------------------------------------- */

struct setting {
    int index, per_sm, resident, cluster, grid, stages; /* blocks of this kernel an SM; of this and the next */
    size_t shared;
    double us, error;
};

static small_args arguments(const problem &p, int copy) {
    small_args a;
    memset(&a, 0, sizeof a);
    int units = p.s->k / COLUMNS;
    small_part &q = a.part[0];
    q.upper = p.s->weights + (size_t)copy * p.s->bytes, q.lower = q.upper + (size_t)units * RECORD;
    q.factor = q.factor_lower = p.factor;
    q.out = p.y, q.tiles = p.s->n / 16, q.divisor = 1, q.multiplier = 2, q.lower_rows = 8, q.n = p.s->n, q.output = SMALL_FLOAT;
    for (int i = 0; i < 16; i++) { a.values[i] = 0x3f80 + i; } /* of a table: any */
    a.x = p.x, a.tiles = q.tiles, a.units = units, a.k = a.x_line = p.s->k, a.record = RECORD, a.parts = GROUP_PARTS, a.m = p.m;
    return a;
}

static int clusters_at_once(const variant &v, int cluster, size_t shared) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(64 * cluster), config.blockDim = dim3((v.groups + 1) * GROUP_THREADS), config.dynamicSmemBytes = shared;
    config.attrs = &attribute, config.numAttrs = 1;
    int count = 0;
    CHECK(cudaOccupancyMaxActiveClusters(&count, v.kernel, &config));
    return count;
}

static bool configure_group(setting &c, const variant &v, int units, int tiles) {
    int most = (units + c.cluster - 1) / c.cluster, items = (tiles + GROUP_WARPS - 1) / GROUP_WARPS, room = 227 * 1024;
    if (c.per_sm > 1 || c.resident > 1 || c.cluster < 2 || c.cluster > units) { return false; }
    int without = (int)v.bytes(0, RECORD, most, v.slots), stage = (int)v.bytes(1, RECORD, most, v.slots) - without;
    if (without + 2 * stage > room) { return false; }
    c.stages = std::min((room - without) / stage, v.slots > 0 ? 2 : (int)GROUP_MAX_STAGES);
    c.shared = without + (size_t)c.stages * stage;
    c.grid = std::min(clusters_at_once(v, c.cluster, c.shared), items) * c.cluster;
    return v.slots == 0 || c.grid == items * c.cluster;
}

/* false where the variant does not fit */
static bool configure(setting &c, const problem &p) {
    const variant &v = variants[c.index];
    int units = p.s->k / COLUMNS, tiles = p.s->n / 16;
    if (v.tokens8 != (p.m + 7) / 8 || v.single != (p.m == 1)) { return false; }
    if (v.groups > 0) { return configure_group(c, v, units, tiles); }
    if (v.layout == NULL) {
        int warps = (units + v.units - 1) / v.units;
        if (c.cluster != 1 || warps > v.warps || warps * 2 <= v.warps || c.resident != c.per_sm || c.per_sm > 2) { return false; }
        c.shared = 2 * (size_t)warps * v.tokens8 * CHUNK + (Codes::table ? TABLE_BYTES : 0);
        c.grid = c.per_sm == 1 ? tiles : std::min(tiles, sms * v.blocks);
        return c.per_sm == 1 || c.grid < tiles;
    }
    int most = (units + c.cluster - 1) / c.cluster, stage = 2 * v.warps * v.units * RECORD;
    if (c.per_sm > v.blocks || c.resident < c.per_sm || c.resident > 2 * c.per_sm + 1 || c.cluster > units) { return false; }
    c.grid = std::min(sms * c.per_sm / c.cluster, tiles) * c.cluster;
    int owned = c.cluster > 1 ? ((tiles + c.grid / c.cluster - 1) / (c.grid / c.cluster) + c.cluster - 1) / c.cluster : 0;
    if (owned > SMALL_MAX_OWNED) { return false; }
    int room = 227 * 1024 / c.resident - 1024, without = (int)v.layout(0, RECORD, most, c.cluster, owned).bytes;
    if (without + 2 * stage > room) { return false; }
    c.stages = std::min((room - without) / stage, (int)SMALL_MAX_STAGES);
    c.shared = without + c.stages * stage;
    return true;
}

static void launch(const setting &c, const problem &p, int copy) {
    const variant &v = variants[c.index];
    small_args a = arguments(p, copy);
    a.stages = c.stages, a.slots = v.slots, a.ahead = v.slots > 0 ? 1 : (c.stages + 1) / 2;
    cudaLaunchConfig_t config;
    memset(&config, 0, sizeof config);
    int units = p.s->k / COLUMNS, warps = v.groups > 0 ? (v.groups + 1) * GROUP_WARPS : v.layout == NULL ? (units + v.units - 1) / v.units : v.warps + 1 + v.finishers;
    config.gridDim = dim3(c.grid), config.blockDim = dim3(warps * 32), config.dynamicSmemBytes = c.shared, config.stream = stream;
    cudaLaunchAttribute attribute[2];
    attribute[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute[0].val.programmaticStreamSerializationAllowed = 1;
    attribute[1].id = cudaLaunchAttributeClusterDimension;
    attribute[1].val.clusterDim.x = c.cluster, attribute[1].val.clusterDim.y = 1, attribute[1].val.clusterDim.z = 1;
    config.attrs = attribute, config.numAttrs = c.cluster > 1 ? 2 : 1;
    ql_tensor_map map = {};
    if (v.groups > 0) { a.x = p.ordered, a.ordered = 1, map = map_of(p.ordered, p.m, p.s->k, 8 * v.tokens8); }
    void *pointers[] = {&a, &map};
    CHECK(cudaLaunchKernelExC(&config, v.kernel, pointers));
}

/* seconds a replay, best of `repeats` */
template <typename Body> static double time_graph(int repeats, Body body) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    body();
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    cudaEvent_t from, to;
    CHECK(cudaEventCreate(&from));
    CHECK(cudaEventCreate(&to));
    double best = 1e9;
    for (int i = 0; i < repeats + 1; i++) {
        CHECK(cudaEventRecord(from, stream));
        CHECK(cudaGraphLaunch(exec, stream));
        CHECK(cudaEventRecord(to, stream));
        CHECK(cudaEventSynchronize(to));
        float ms;
        CHECK(cudaEventElapsedTime(&ms, from, to));
        if (i > 0) { best = std::min(best, ms * 1e-3); }
    }
    CHECK(cudaGraphExecDestroy(exec));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaEventDestroy(from));
    CHECK(cudaEventDestroy(to));
    return best;
}

static double roof_us(const shape &s, uint32_t *sink) {
    double best = 1e9;
    int launches = std::max(s.copies, 24);
    if (!timed) { return 1.0; }
    for (int grid : {1, 2, 4, 8}) {
        for (int block : {256, 512, 1024}) {
            if (grid * block > 2048) { continue; }
            double t = time_graph(3, [&] {
                for (int i = 0; i < launches; i++) {
                    read_only<<<sms * grid, block, 0, stream>>>((const uint4 *)(s.weights + (size_t)(i % s.copies) * s.bytes), s.bytes / 16, sink);
                }
            });
            best = std::min(best, t / launches * 1e6);
        }
    }
    return best;
}

static std::string describe(const setting &c) {
    const variant &v = variants[c.index];
    char text[200];
    snprintf(text, sizeof text, "%s warps %2d units %d finishers %d blocks %d | an SM %d of %d cluster %d grid %4d stages %2d shared %6zu",
             v.groups ? "group   " : v.layout ? "ring    " : "register", v.warps, v.units, v.finishers, v.blocks, c.per_sm, c.resident, c.cluster, c.grid,
             c.stages, c.shared);
    return std::string(text) + (v.slots > 0 ? " slots " + std::to_string(v.slots) : "");
}

static std::vector<shape> make_shapes(std::vector<double> &roof) {
    std::vector<shape> shapes = {{12288, 4096}, {4096, 4096}, {22016, 4096}, {4096, 11008}};
#ifdef QL_RACECHECK
    shapes = {{512, 1024}, {64, 8192}}; /* the second: activations go by in more turns than one */
#endif
    uint32_t *sink;
    CHECK(cudaMalloc(&sink, 4));
    for (size_t i = 0; i < shapes.size(); i++) {
        shape &s = shapes[i];
        s.bytes = (size_t)s.n / 8 * (s.k / COLUMNS) * RECORD;
        s.copies = timed ? std::max(8, (int)(220000000 / s.bytes)) : 1;
        CHECK(cudaMalloc(&s.weights, s.bytes * s.copies));
        size_t count = s.bytes * s.copies / RECORD, threads = count * (RECORD / 4);
        fill_weights<<<(unsigned)((threads + 255) / 256), 256, 0, stream>>>(s.weights, count, RECORD, (uint32_t)(77 * i));
        CHECK(cudaStreamSynchronize(stream));
        roof.push_back(roof_us(s, sink));
        printf("%5d x %5d: %5.1f MB, read roof %6.2f us, %.2f TB/s\n", s.n, s.k, s.bytes * 1e-6, roof[i], s.bytes / roof[i] * 1e-6);
    }
    return shapes;
}

/* one setting, run and timed: false where it does not fit or is wrong */
static bool measure(setting &c, const problem &p, double roof, FILE *csv, int &bad) {
    int launches = std::max(p.s->copies, 24);
    if (!configure(c, p)) { return false; }
    CHECK(cudaMemset(p.y, 0xff, (size_t)p.m * p.s->n * 4));
    launch(c, p, 0);
    cudaError_t error = cudaStreamSynchronize(stream);
    if (error != cudaSuccess) {
        printf("M %d %d x %d %s: %s\n", p.m, p.s->n, p.s->k, describe(c).c_str(), cudaGetErrorString(error));
        exit(1);
    }
#ifdef QL_CHECKED
    c.error = error_of(p);
#endif
    c.us = !timed ? 1.0 : time_graph(3, [&] {
               for (int l = 0; l < launches; l++) { launch(c, p, l % p.s->copies); }
           }) / launches * 1e6;
    if (csv) { fprintf(csv, "%d,%d,%d,%.2f,%.3f,%.1e,%s\n", p.m, p.s->n, p.s->k, c.us, roof / c.us, c.error, describe(c).c_str()); }
    if (c.error <= 1e-4) { return true; }
    if (bad++ < 3) { printf("WRONG (error %.1e): %s\n", c.error, describe(c).c_str()); }
    return false;
}

/* every setting of every variant, best first */
static std::vector<setting> sweep(const problem &p, double roof, FILE *csv) {
    std::vector<setting> done;
    int bad = 0, rings = 0, registers = 0;
    for (int index = 0; index < (int)(sizeof variants / sizeof *variants); index++) {
        for (int i = 0; i < 4 * 4 * 4; i++) { /* blocks an SM, of this and the next kernel, cluster */
            setting c = {index, i / 16 + 1, i / 4 % 4 + 1, 1 << i % 4, 0, 0, 0, 0.0, 0.0};
            if (measure(c, p, roof, csv, bad)) { done.push_back(c); }
        }
    }
    std::sort(done.begin(), done.end(), [](const setting &a, const setting &b) { return a.us < b.us; });
    printf("M %2d  %5d x %5d, roof %.2f us, %d variants, %d wrong\n", p.m, p.s->n, p.s->k, roof, (int)done.size() + bad, bad);
    for (const setting &c : done) {
        bool ring = variants[c.index].layout != NULL || variants[c.index].groups > 0;
        if ((ring ? rings++ : registers++) < (ring ? 5 : 2)) {
            printf("  %6.2f us %5.1f %%  error %.0e  %s\n", c.us, 100 * roof / c.us, c.error, describe(c).c_str());
        }
    }
    return done;
}

static void time_chain(const std::vector<setting> &s, const std::vector<problem> &problems, const char *what) {
    double chain = time_graph(5, [&] {
        for (int i = 0; i < 32 * 4; i++) { launch(s[i % 4], problems[i % 4], i / 4 % 8); }
    });
    printf("  %.3f ms  %s\n", chain * 1e3, what);
}

/* chains of one setting for all shapes, of those with the least sum of times; and with the best cluster for each shape */
static void time_uniform_chains(const std::vector<std::vector<setting>> &done, const std::vector<problem> &problems) {
    std::vector<std::pair<double, std::vector<setting>>> chains;
    for (const setting &c : done[0]) {
        std::vector<setting> same;
        double sum = 0;
        for (const std::vector<setting> &list : done) { /* best first, so the best cluster is found */
            for (const setting &d : list) {
                if (d.index != c.index || d.per_sm != c.per_sm || d.resident != c.resident) { continue; }
                same.push_back(d), sum += d.us;
                break;
            }
        }
        bool seen = false;
        for (auto &chain : chains) { seen = seen || (chain.second[0].index == c.index && chain.second[0].per_sm == c.per_sm && chain.second[0].resident == c.resident); }
        if (same.size() == 4 && !seen) { chains.push_back({sum, same}); }
    }
    std::sort(chains.begin(), chains.end(), [](const auto &a, const auto &b) { return a.first < b.first; });
    for (size_t i = 0; i < chains.size() && i < 8; i++) {
        std::string what = "sum " + std::to_string(chains[i].first) + " us:";
        for (const setting &c : chains[i].second) { what += " c" + std::to_string(c.cluster); }
        time_chain(chains[i].second, problems, (what + " " + describe(chains[i].second[0])).c_str());
    }
}

int main(int argc, char **argv) {
    cudaDeviceProp properties;
    CHECK(cudaGetDeviceProperties(&properties, 0));
    CHECK(cudaStreamCreate(&stream));
    sms = properties.multiProcessorCount;
    printf("%s, %d SMs\n", properties.name, sms);
    for (const variant &v : variants) {
        CHECK(cudaFuncSetAttribute(v.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 * 1024));
    }
    std::vector<double> roof;
    std::vector<shape> shapes = make_shapes(roof);
    FILE *csv = argc > 1 ? fopen(argv[1], "w") : NULL;
    std::vector<int> tokens = {1, 8, 16, 32, 64};
    if (argc > 2) { tokens.clear(); }
    for (int i = 2; i < argc; i++) { tokens.push_back(atoi(argv[i])); }
    for (int m : tokens) {
        std::vector<problem> problems;
        std::vector<std::vector<setting>> done;
        for (size_t i = 0; i < shapes.size(); i++) {
            problems.push_back(make_problem(&shapes[i], m));
            done.push_back(sweep(problems[i], roof[i], csv));
            if (done[i].empty()) { return 1; }
        }
        if (!timed) { continue; }
        printf("M %2d  chains of 128 kernels; sum of the roofs %.3f ms\n", m, 32e-3 * (roof[0] + roof[1] + roof[2] + roof[3]));
        time_chain({done[0][0], done[1][0], done[2][0], done[3][0]}, problems, "the best of each shape");
        time_uniform_chains(done, problems);
        fflush(stdout);
    }
    if (csv) { fclose(csv); }
    return 0;
}
