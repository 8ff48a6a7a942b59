/* check_attention.cu: the attention kernels against a float64 loop on the host, and their times.
 *
 *   nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -o check_attention cuda/dev/check_attention.cu cuda/attention*.cu cuda/activations.cu
 *   ./check_attention
 *
 * Options: `check`, `time` or `decode` (times of one query a sequence) alone; default the first two, some 15 s. */

#include "harness.cuh"

#include "../attention.cuh"

static bool only_mma; /* the kernel for every architecture where another would be chosen */

static float to_host(bf16 x) { return __bfloat162float(x); }
static float to_host(float x) { return x; }
static float round_bf16(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }

template <typename T> struct problem {
    int64_t b, hq, hkv, d, t = 0, rows = 0, max_queries = 0, max_keys = 0;
    float scale;
    std::vector<int64_t> q_start{0}, kv_start, kv_len;
    std::vector<T> q, k, v;

    problem(const std::vector<int64_t> &queries, const std::vector<int64_t> &past, int64_t hq, int64_t hkv, int64_t d,
            bool cheap = false)
        : b((int64_t)queries.size()), hq(hq), hkv(hkv), d(d), scale(1.0f / sqrtf((float)d)) {
        for (size_t i = 0; i < queries.size(); i++) {
            q_start.push_back(t += queries[i]);
            kv_start.push_back(rows + 1), kv_len.push_back(queries[i] + past[i]);
            rows += queries[i] + past[i] + 2;
            max_queries = std::max(max_queries, queries[i]), max_keys = std::max(max_keys, kv_len.back());
        }
        fill(q, t * hq * d, cheap), fill(k, rows * hkv * d, cheap), fill(v, rows * hkv * d, cheap);
    }
    static void fill(std::vector<T> &to, int64_t count, bool cheap) {
        to.resize(count);
        int64_t distinct = cheap ? std::min<int64_t>(count, 1000003) : count;
        for (int64_t i = 0; i < distinct; i++) { to[i] = (T)normal(); }
        for (int64_t i = distinct; i < count; i++) { to[i] = to[i - distinct]; }
    }
    /* one query and head: exact (d,), and what rounding weights and result to bf16 makes of it */
    void oracle(int64_t sequence, int64_t row, int64_t head, std::vector<double> &exact, std::vector<double> &naive) const {
        int64_t queries = q_start[sequence + 1] - q_start[sequence], keys = kv_len[sequence] - queries + row + 1;
        const T *query = &q[((q_start[sequence] + row) * hq + head) * d];
        int64_t base = (kv_start[sequence] * hkv + head / (hq / hkv)) * d;
        std::vector<double> score(keys);
        double top = -INFINITY, sum = 0.0;
        for (int64_t s = 0; s < keys; s++) {
            double x = 0.0;
            for (int64_t i = 0; i < d; i++) { x += (double)to_host(query[i]) * to_host(k[base + s * hkv * d + i]); }
            top = std::max(top, score[s] = x * scale);
        }
        exact.assign(d, 0.0), naive.assign(d, 0.0);
        for (int64_t s = 0; s < keys; s++) {
            double weight = exp(score[s] - top), rounded = round_bf16((float)weight);
            sum += weight;
            for (int64_t i = 0; i < d; i++) {
                double value = to_host(v[base + s * hkv * d + i]);
                exact[i] += weight * value, naive[i] += rounded * value;
            }
        }
        for (int64_t i = 0; i < d; i++) { exact[i] /= sum, naive[i] = round_bf16((float)(naive[i] / sum)); }
    }
};

template <typename T> struct on_device {
    device_array<T> q, k, v, out;
    device_array<int64_t> q_start, kv_start, kv_len;
    on_device(const problem<T> &p)
        : q(p.q), k(p.k), v(p.v), out(p.q.size()), q_start(p.q_start), kv_start(p.kv_start), kv_len(p.kv_len) {}
    void run(const problem<bf16> &p) {
        if (only_mma) {
            ql_attention_prefill(attention_args<bf16>{out.get(), NULL, q.get(), k.get(), v.get(), q_start.get(), kv_start.get(),
                                                      kv_len.get(), (int)p.b, (int)p.hq, (int)p.hkv, (int)p.d, p.scale, 0},
                                 p.max_queries, p.max_keys);
            return;
        }
        ql_attention_fused_forward_cuda(out.get(), NULL, q.get(), k.get(), v.get(), q_start.get(), kv_start.get(), kv_len.get(), p.t,
                                        p.b, p.hq, p.hkv, p.d, p.max_queries, p.max_keys, p.scale, 0);
    }
    void run(const problem<float> &p) {
        ql_attention_forward_cuda(out.get(), NULL, q.get(), k.get(), v.get(), q_start.get(), kv_start.get(), kv_len.get(), p.b,
                                  p.hq, p.hkv, p.d, p.scale);
    }
};

template <typename T> static void check(const char *name, const problem<T> &p, int samples = 300) {
    on_device<T> device(p);
    device.run(p);
    std::vector<T> first = device.out.down();
    device.run(p);
    bool same = memcmp(first.data(), device.out.down().data(), first.size() * sizeof(T)) == 0;
    double worst = 0.0, bound = 0.0;
    std::vector<double> exact, naive;
    int64_t all = p.t * p.hq;
    for (int64_t i = 0; i < std::min<int64_t>(samples, all); i++) {
        int64_t pick = all <= samples ? i : i == 0 ? all - 1 : (int64_t)(uniform() * (double)all), query = pick / p.hq, sequence = 0;
        while (p.q_start[sequence + 1] <= query) { sequence++; }
        p.oracle(sequence, query - p.q_start[sequence], pick % p.hq, exact, naive);
        for (int64_t c = 0; c < p.d; c++) {
            double got = to_host(first[pick * p.d + c]);
            worst = std::max(worst, isnan(got) ? INFINITY : fabs(got - exact[c]));
            bound = std::max(bound, fabs(naive[c] - exact[c]));
        }
    }
    bound = sizeof(T) == 4 ? 2e-5 : 2 * bound; /* float32: some tens of roundings of values of some units */
    char text[160];
    snprintf(text, sizeof text, "%s hq %d hkv %d d %d%s%s", name, (int)p.hq, (int)p.hkv, (int)p.d,
             same ? "" : ", TWO RUNS DIFFER", device.out.guards() ? "" : ", GUARD OVERWRITTEN");
    expect(worst <= bound && same && device.out.guards(), text, worst, bound);
}

/* the last queries of a sequence alone give the bits that they have in the whole of it */
static void check_chunks() {
    problem<bf16> whole({300}, {0}, 4, 2, 128);
    problem<bf16> chunk = whole;
    chunk.t = chunk.max_queries = 77, chunk.q_start = {0, 77};
    chunk.q.assign(whole.q.end() - 77 * 4 * 128, whole.q.end());
    on_device<bf16> a(whole), b(chunk);
    a.run(whole), b.run(chunk);
    std::vector<bf16> x = a.out.down(), y = b.out.down();
    bool same = memcmp(x.data() + x.size() - y.size(), y.data(), y.size() * sizeof(bf16)) == 0;
    expect(same, "a chunk has the bits of the whole", !same, 0);
}

/* a recorded decode step replayed while the lengths grow; and the bits of each sequence alone */
static void check_replay(const std::vector<int64_t> &past, int64_t hq, int64_t hkv, int64_t d) {
    int64_t count = (int64_t)past.size(), width = hq * d;
    problem<bf16> p(std::vector<int64_t>(count, 1), past, hq, hkv, d);
    on_device<bf16> device(p);
    device.run(p);
    std::vector<bf16> full = device.out.down();
    std::vector<int64_t> lengths = p.kv_len;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    must(cudaStreamBeginCapture(harness_stream, cudaStreamCaptureModeThreadLocal), "capture");
    device.run(p);
    must(cudaStreamEndCapture(harness_stream, &graph), "capture");
    must(cudaGraphInstantiate(&exec, graph, 0), "graph");
    bool same = true;
    for (int64_t back : {59, 20, 1, 0}) {
        for (int64_t i = 0; i < count; i++) { p.kv_len[i] = device.kv_len.host[i] = std::max<int64_t>(lengths[i] - back, 1); }
        device.kv_len.up();
        must(cudaGraphLaunch(exec, harness_stream), "replay");
        std::vector<bf16> replayed = device.out.down();
        for (int64_t i = 0; i < count; i += count / 3) { /* alone, with its own bound */
            problem<bf16> alone = p;
            alone.b = alone.t = 1, alone.q_start = {0, 1}, alone.kv_start = {p.kv_start[i]}, alone.kv_len = {p.kv_len[i]};
            alone.max_keys = p.kv_len[i], alone.q.assign(p.q.begin() + i * width, p.q.begin() + (i + 1) * width);
            on_device<bf16> one(alone);
            one.run(alone);
            same = same && memcmp(one.out.down().data(), replayed.data() + i * width, width * sizeof(bf16)) == 0;
        }
    }
    same = same && memcmp(full.data(), device.out.host.data(), full.size() * sizeof(bf16)) == 0;
    expect(same, "replayed decode steps have the bits of each sequence alone", !same, 0);
}

/* more (sequence, kv head) than blocks, sequences of many lengths and without a query among them */
static void check_many() {
    std::vector<int64_t> queries, past, short_past;
    for (int64_t i = 0; i < 90; i++) {
        queries.push_back(i % 7 != 3 && i != 89), past.push_back(i * i * 31 % 1024), short_past.push_back(i * 31 % 70);
    }
    for (int64_t d : {64, 80, 96, 128}) {
        check("many decode", problem<bf16>(queries, past, 8, 8, d), 1000);
        check("many decode, short", problem<bf16>(queries, short_past, 8, 8, d), 1000);
        check("many decode", problem<bf16>(queries, past, 16, 4, d), 1000);
        check("many decode, group of 16", problem<bf16>(queries, past, 64, 4, d), 1000);
        check("many decode, two stages", problem<bf16>(queries, short_past, 16, 16, d), 1000);
        check("many decode, two stages, group of 16", problem<bf16>(queries, short_past, 144, 9, d), 1000);
    }
    std::vector<int64_t> lengths;
    for (int64_t i = 0; i < 40; i++) { lengths.push_back(i * 97 % 1000); }
    check_replay(lengths, 8, 8, 128), check_replay(lengths, 32, 8, 64);
    check_replay({500, 60, 1100}, 8, 2, 128);
}

static void check_all() {
    for (int64_t length : {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 200, 1000}) {
        char name[64];
        snprintf(name, sizeof name, "prefill %d", (int)length);
        check(name, problem<bf16>({length}, {0}, 4, 2, 128));
        if (length % 2) { check(name, problem<bf16>({length}, {0}, 3, 1, 64)); }
        if (length > 64) {
            only_mma = true, check("mma", problem<bf16>({length}, {0}, 3, 1, length % 2 ? 64 : 128)), only_mma = false;
        }
    }
    for (int64_t d : {64, 128}) { /* more items than SMs, and tiles whose first keys are not the first */
        problem<bf16> many({130, 1, 300, 256, 0, 127, 513, 90, 200, 64}, {0, 7, 1, 128, 9, 400, 33, 0, 61, 1000}, 8, 2, d);
        check("many sequences", many, 1000);
        only_mma = true, check("many sequences, mma", many), only_mma = false;
    }
    for (int64_t d : {64, 80, 96, 128, 32, 40, 256, 7, 130}) {
        check("ragged prefill", problem<bf16>({70, 0, 130, 1, 64, 300}, {0, 5, 33, 80, 64, 700}, 6, 2, d));
        check("ragged decode", problem<bf16>({1, 1, 0, 1, 1}, {0, 5, 33, 63, 1700}, 6, 2, d));
        check("ragged decode, short", problem<bf16>({1, 1, 0, 1, 1}, {0, 5, 333, 64, 450}, 6, 2, d));
        check("float32", problem<float>({20, 3, 0, 1, 65}, {0, 70, 4, 900, 0}, 6, 2, d));
    }
    for (int64_t keys : {1, 16, 63, 64, 65, 128, 129, 200, 300, 384, 500, 512, 513, 1023, 1024, 1025, 4096, 4097, 9000, 20000}) {
        char name[64];
        snprintf(name, sizeof name, "decode over %d keys", (int)keys);
        check(name, problem<bf16>({1}, {keys - 1}, 8, 8, 128));
        check(name, problem<bf16>({1, 1}, {keys - 1, keys / 2}, 32, 2, 64));
    }
    check("decode, group of 20", problem<bf16>({1, 1}, {30, 300}, 20, 1, 128));
    check("prefill 8192", problem<bf16>({8192}, {0}, 2, 1, 128));
    check_chunks();
    check_many();
}

static void time_prefill(const char *name, std::vector<int64_t> queries, int64_t hq, int64_t hkv, int64_t d) {
    problem<bf16> p(queries, std::vector<int64_t>(queries.size(), 0), hq, hkv, d, true);
    on_device<bf16> device(p);
    double us = time_us(4, [&](int) { device.run(p); }), flop = 0.0;
    only_mma = true;
    double mma = time_us(4, [&](int) { device.run(p); });
    only_mma = false;
    for (int64_t n : queries) { flop += 2.0 * (double)n * (double)n * (double)(d * hq); } /* half of the square, as is the custom */
    printf("prefill %-20s d %3d hq %2d hkv %2d %10.1f us %7.1f TFLOP/s; by mma %10.1f us %7.1f TFLOP/s\n", name, (int)d, (int)hq,
           (int)hkv, us, flop / us * 1e-6, mma, flop / mma * 1e-6);
    fflush(stdout);
}

/* 32 layers with keys and values of their own, so that they come from memory */
static void time_decode(int64_t b, int64_t context, int64_t hq, int64_t hkv, int64_t d) {
    problem<bf16> p(std::vector<int64_t>(b, 1), std::vector<int64_t>(b, context - 1), hq, hkv, d, true);
    on_device<bf16> device(p);
    int64_t layer = (int64_t)p.k.size();
    int layers = (int)std::min<int64_t>(32, (int64_t)8e9 / (layer * 4));
    device_array<bf16> k(1), v(1);
    cudaFree(k.memory), cudaFree(v.memory);
    must(cudaMalloc((void **)&k.memory, layer * layers * 2), "keys"), must(cudaMalloc((void **)&v.memory, layer * layers * 2), "values");
    for (int i = 0; i < layers; i++) {
        cudaMemcpy(k.memory + i * layer * 2, device.k.get(), layer * 2, cudaMemcpyDeviceToDevice);
        cudaMemcpy(v.memory + i * layer * 2, device.v.get(), layer * 2, cudaMemcpyDeviceToDevice);
    }
    double us = time_us(layers, [&](int i) {
        ql_attention_fused_forward_cuda(device.out.get(), NULL, device.q.get(), k.memory + i * layer * 2, v.memory + i * layer * 2,
                                        device.q_start.get(), device.kv_start.get(), device.kv_len.get(), p.t, p.b, hq, hkv, d, 1,
                                        p.max_keys, p.scale, 0);
    });
    double bytes = 4.0 * (double)(b * context * hkv * d);
    printf("decode b %3d context %6d d %3d hq %2d hkv %2d %9.2f us %8.1f GB/s\n", (int)b, (int)context, (int)d, (int)hq, (int)hkv, us,
           bytes / us * 1e-3);
    fflush(stdout);
}

static void time_prefills() {
    time_prefill("8 x 2048", std::vector<int64_t>(8, 2048), 16, 16, 128);
    time_prefill("2 x 8192", std::vector<int64_t>(2, 8192), 16, 16, 128);
    time_prefill("1 x 2048", {2048}, 32, 32, 128);
    time_prefill("1 x 8192", {8192}, 32, 32, 128);
    time_prefill("1 x 512", {512}, 32, 32, 128);
    time_prefill("1 x 32", {32}, 32, 32, 128);
    time_prefill("64 x 64", std::vector<int64_t>(64, 64), 32, 32, 128);
    time_prefill("128 x 2048 GQA", std::vector<int64_t>(8, 2048), 32, 8, 128);
    time_prefill("8 x 2048", std::vector<int64_t>(8, 2048), 32, 32, 64);
    time_prefill("8 x 2048", std::vector<int64_t>(8, 2048), 16, 16, 96);
}

static void time_decodes() {
    for (int64_t context : {32, 64, 128, 256, 512, 1024, 2048, 4096, 16384}) {
        time_decode(1, context, 32, 32, 128);
        time_decode(1, context, 32, 8, 128);
    }
    for (int64_t context : {32, 48, 64, 110, 160, 256, 512, 1024}) {
        for (int64_t b : {8, 16, 32, 64}) { time_decode(b, context, 32, 32, 128); }
        time_decode(32, context, 32, 8, 128), time_decode(64, context, 32, 8, 128);
    }
}

int main(int argc, char **argv) {
    harness_begin();
    const char *only = argc > 1 ? argv[1] : "";
    if (*only == 0 || strcmp(only, "check") == 0) { check_all(); }
    if (*only == 0 || strcmp(only, "time") == 0) { time_prefills(); }
    if (strcmp(only, "check") != 0) { time_decodes(); }
    return harness_end();
}
