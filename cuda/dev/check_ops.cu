/* check_ops.cu: the small ops on the device against the scalar reference (csrc/ops), and their share of the copy bandwidth.
 *
 *   for f in csrc/dispatch.c csrc/ops/*.c csrc/core/*.c csrc/quant/decode.c; do gcc -std=c11 -O2 -fopenmp -c $f; done
 *   nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -Xcompiler -fopenmp -o check_ops cuda/dev/check_ops.cu \
 *       cuda/{elementwise,rmsnorm,rope,cross_entropy,sample,gram,feedback}.cu *.o
 *   ./check_ops
 *
 * Some 5 s. */
#include "harness.cuh"

static const int64_t sizes[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33};

static std::vector<float> normals(int64_t count) {
    std::vector<float> x(count);
    for (float &value : x) { value = normal(); }
    return x;
}
template <typename T> static double distance(const std::vector<T> &a, const std::vector<T> &b) {
    double worst = 0.0;
    for (size_t i = 0; i < a.size(); i++) {
        double d = fabs((double)a[i] - (double)b[i]) / std::max(1.0, fabs((double)b[i]));
        worst = std::max(worst, isnan(d) ? INFINITY : d);
    }
    return worst;
}
/* `values` as the op left them on the device, against the reference; guards too */
template <typename T> static double compare(device_array<T> &device, const std::vector<T> &reference) {
    double d = distance(device.down(), reference);
    return device.guards() ? d : INFINITY;
}

static double check_rmsnorm(int64_t t, int64_t c) {
    std::vector<float> x = normals(t * c), gain = normals(c), out(t * c), inv(t);
    device_array<float> dx(x), dgain(gain), dout(t * c), dinv(t);
    ql_rmsnorm_forward_scalar(out.data(), inv.data(), x.data(), gain.data(), t, c, 1e-5f);
    ql_rmsnorm_forward_cuda(dout.get(), dinv.get(), dx.get(), dgain.get(), t, c, 1e-5f);
    double worst = std::max(compare(dout, out), compare(dinv, inv));
    device_array<__nv_bfloat16> rounded(t * c);
    ql_cuda_rmsnorm_bf16(rounded.get(), dx.get(), dgain.get(), t, c, 1e-5f);
    std::vector<__nv_bfloat16> &half = rounded.down();
    for (int64_t i = 0; i < t * c; i++) {
        double d = fabs(__bfloat162float(half[i]) - out[i]) - fabs(out[i]) * 0x1p-8; /* half a step of bf16, and some */
        worst = std::max(worst, isnan(d) ? INFINITY : d);
    }
    return rounded.guards() ? worst : INFINITY;
}

static double check_rope(int64_t t, int64_t heads, int64_t d) {
    std::vector<float> x = normals(t * heads * d), c = normals(50 * d / 2), s = normals(50 * d / 2);
    std::vector<int32_t> at(t);
    for (int32_t &p : at) { p = (int32_t)(uniform() * 50); }
    device_array<float> dx(x), dc(c), ds(s);
    device_array<int32_t> dat(at);
    ql_rope_forward_scalar(x.data(), c.data(), s.data(), at.data(), t, heads, d);
    ql_rope_forward_cuda(dx.get(), dc.get(), ds.get(), dat.get(), t, heads, d);
    return compare(dx, x);
}

static double check_maps(int64_t count) {
    std::vector<float> a = normals(count), b = normals(count), out(count);
    device_array<float> da(a), db(b), dout(count);
    ql_swiglu_forward_scalar(out.data(), a.data(), b.data(), count);
    ql_swiglu_forward_cuda(dout.get(), da.get(), db.get(), count);
    double worst = compare(dout, out);
    ql_add_forward_scalar(a.data(), b.data(), count);
    ql_add_forward_cuda(da.get(), db.get(), count);
    return std::max(worst, compare(da, a));
}

static double check_rows(int64_t t, int64_t c) {
    std::vector<float> x = normals(t * c), out = normals(3 * t * c), back(t * c);
    std::vector<int32_t> rows(t);
    for (int64_t i = 0; i < t; i++) { rows[i] = (int32_t)(3 * (t - 1 - i) + i % 3); }
    device_array<float> dx(x), dout(out), dback(t * c);
    device_array<int32_t> drows(rows);
    ql_scatter_rows_forward_scalar(out.data(), x.data(), rows.data(), t, c);
    ql_scatter_rows_forward_cuda(dout.get(), dx.get(), drows.get(), t, c);
    ql_gather_rows_forward_cuda(dback.get(), dout.get(), drows.get(), t, c);
    return std::max(compare(dout, out), compare(dback, x));
}

static double check_cross_entropy(int64_t t, int64_t v) {
    std::vector<float> x = normals(t * v), loss(t), gradient(t * v);
    for (float &value : x) { value *= 10; }
    std::vector<int32_t> target(t);
    for (int64_t i = 0; i < t; i++) { target[i] = i % 5 == 3 ? -100 : (int32_t)(uniform() * (double)v); }
    device_array<float> dx(x), dloss(t);
    device_array<int32_t> dtarget(target);
    ql_cross_entropy_forward_scalar(loss.data(), gradient.data(), x.data(), target.data(), t, v);
    ql_cross_entropy_forward_cuda(dloss.get(), NULL, dx.get(), dtarget.get(), t, v);
    double worst = compare(dloss, loss);
    ql_cross_entropy_forward_cuda(dloss.get(), dx.get(), dx.get(), dtarget.get(), t, v); /* in place */
    return std::max(worst, std::max(compare(dloss, loss), compare(dx, gradient)));
}

static double check_embedding(ql_format format, int bits, int64_t group, bool zeros) {
    int64_t n = 20, k = 33, blocks = n * ((k + group - 1) / group) + 2;
    std::vector<uint32_t> codes(n * k + 1);
    for (uint32_t &word : codes) { word = (uint32_t)(uniform() * 4294967296.0); }
    if (format == QL_F32 || format == QL_F16 || format == QL_BF16) { /* finite ones */
        for (uint32_t &word : codes) { word &= 0xbf7fbf7fu; }
    }
    std::vector<float> scales = normals(blocks);
    std::vector<uint8_t> zero(blocks);
    for (uint8_t &z : zero) { z = (uint8_t)(uniform() * (1 << bits)); }
    std::vector<int32_t> ids = {3, 19, 0, 3, 7};
    std::vector<float> out(5 * k);
    device_array<uint32_t> dcodes(codes);
    device_array<float> dscales(scales), dout(5 * k);
    device_array<uint8_t> dzero(zero);
    device_array<int32_t> dids(ids);
    ql_weight host = {}, device;
    host.format = format, host.bits = (uint8_t)bits, host.n = n, host.k = k, host.group = group;
    device = host;
    host.codes = codes.data(), host.scales = scales.data(), host.zeros = zeros ? zero.data() : NULL;
    device.codes = dcodes.get(), device.scales = dscales.get(), device.zeros = zeros ? dzero.get() : NULL;
    ql_embedding_forward_scalar(out.data(), ids.data(), &host, 5);
    ql_embedding_forward_cuda(dout.get(), dids.get(), &device, 5);
    return compare(dout, out);
}

static double check_gram(int64_t t, int64_t ka, int64_t kb, int lower) {
    std::vector<float> a = normals(t * ka), b = lower ? a : normals(t * kb), h = normals(ka * kb);
    device_array<float> da(a), db(b), dh(h);
    ql_gram_forward_scalar(h.data(), a.data(), b.data(), t, ka, kb, lower);
    ql_gram_forward_cuda(dh.get(), da.get(), db.get(), t, ka, kb, lower);
    return compare(dh, h);
}

static double check_feedback(int64_t rows, int64_t depth, int64_t width) {
    std::vector<double> z(rows * (width + 3)), e(rows * (depth + 1)), a(depth * (width + 2));
    for (std::vector<double> *x : {&z, &e, &a}) {
        for (double &value : *x) { value = normal(); }
    }
    device_array<double> dz(z), de(e), da(a);
    ql_feedback_forward_scalar(z.data(), e.data(), a.data(), rows, depth, width, width + 3, depth + 1, width + 2);
    ql_feedback_forward_cuda(dz.get(), de.get(), da.get(), rows, depth, width, width + 3, depth + 1, width + 2);
    return compare(dz, z);
}

/* share of rows whose token differs */
static double check_sample(int64_t b, int64_t v, float temperature, int64_t top_k, float top_p) {
    std::vector<float> logits = normals(b * v);
    for (float &value : logits) { value = roundf(value * 30) / 10; } /* many ties */
    std::vector<int32_t> streams(b), tokens(b);
    for (int64_t i = 0; i < b; i++) { streams[i] = (int32_t)i; }
    device_array<float> dlogits(logits);
    device_array<int32_t> dstreams(streams), dtokens(b);
    device_array<int64_t> step(std::vector<int64_t>{5});
    ql_sample_forward_scalar(tokens.data(), logits.data(), streams.data(), step.host.data(), b, v, temperature, top_k, top_p, 42);
    ql_sample_forward_cuda(dtokens.get(), dlogits.get(), dstreams.get(), step.get(), b, v, temperature, top_k, top_p, 42);
    std::vector<int32_t> &got = dtokens.down();
    int64_t differ = 0;
    for (int64_t i = 0; i < b; i++) { differ += got[i] != tokens[i]; }
    return dtokens.guards() ? (double)differ / (double)b : INFINITY;
}

static void check_all() {
    double norm = 0, rope = 0, maps = 0, rows = 0, entropy = 0, gram = 0, lower = 0, feedback = 0, greedy = 0, drawn = 0, large = 0;
    for (int64_t n : sizes) {
        norm = std::max({norm, check_rmsnorm(3, n), check_rmsnorm(n, 4 * n), check_rmsnorm(70, 8 * n)});
        rope = std::max({rope, check_rope(n, 3, 2 * n), check_rope(3, n, 8), check_rope(5, 9, 64)});
        maps = std::max({maps, check_maps(n), check_maps(1000 * n)});
        rows = std::max({rows, check_rows(n, 5), check_rows(4, n), check_rows(3, 4 * n)});
        entropy = std::max({entropy, check_cross_entropy(7, n), check_cross_entropy(n, 1000 * n)});
        gram = std::max({gram, check_gram(n, 17, 33, 0), check_gram(33, n, 200, 0)});
        lower = std::max({lower, check_gram(33, n, n, 1), check_gram(n, 150, 150, 1)});
        feedback = std::max({feedback, check_feedback(n, 33, 17), check_feedback(33, n, 70), check_feedback(130, 40, n)});
        greedy = std::max({greedy, check_sample(3, n, 0, 0, 1), check_sample(n, 5000, 0, 0, 1)});
        drawn = std::max({drawn, check_sample(200, n, 0.8f, 0, 1), check_sample(200, 1000 * n, 1.0f, 50, 1),
                          check_sample(200, 100 * n, 0.7f, 0, 0.9f), check_sample(200, 100 * n, 1.3f, 20, 0.5f)});
        large = std::max({large, check_sample(4, 2000 * n + 1, 1.0f, 40, 0.8f), check_sample(4, 2000 * n, 0, 0, 1)});
    }
    norm = std::max({norm, check_rmsnorm(2, 4096), check_rmsnorm(100, 4096), check_rmsnorm(2, 20000)});
    expect(norm < 1e-6, "rmsnorm", norm, 1e-6);
    expect(rope < 1e-6, "rope", rope, 1e-6);
    expect(maps < 1e-6, "swiglu, add", maps, 1e-6);
    expect(rows == 0, "scatter, gather rows", rows, 0);
    expect(entropy < 2e-6, "cross-entropy", entropy, 2e-6);
    /* two sums of 33 products of some units, each off by some sqrt(33) roundings of its largest part */
    expect(gram < 1e-5, "gram", gram, 1e-5);
    expect(lower < 1e-5, "gram, lower", lower, 1e-5);
    expect(feedback < 1e-14, "feedback", feedback, 1e-14);
    expect(greedy == 0, "greedy tokens", greedy, 0);
    expect(drawn <= 0.01, "drawn tokens that differ (a share on the edge of a weight)", drawn, 0.01);
    expect(large == 0, "tokens of rows of up to 66000", large, 0);
    double embedding = 0;
    for (int f = 0; f < QL_FORMAT_COUNT; f++) {
        for (int bits = 2; bits <= 8; bits++) {
            embedding = std::max({embedding, check_embedding((ql_format)f, bits, 16, false), check_embedding((ql_format)f, bits, 8, true)});
        }
    }
    expect(embedding == 0, "embedding, every format", embedding, 0);
}

static void report(const char *name, double us, double bytes) {
    printf("%-44s %10.2f us %8.1f GB/s\n", name, us, bytes / us * 1e-3);
    fflush(stdout);
}

static void time_all() {
    const int64_t t = 8192, c = 4096, f = 11008;
    float *x, *y, *z;
    int32_t *ids;
    must(cudaMalloc((void **)&x, t * f * 4), "memory"), must(cudaMalloc((void **)&y, t * f * 4), "memory");
    must(cudaMalloc((void **)&z, t * f * 4), "memory"), must(cudaMalloc((void **)&ids, t * 4), "memory");
    cudaMemset(x, 0, t * f * 4), cudaMemset(y, 0, t * f * 4), cudaMemset(ids, 0, t * 4);
    int64_t *step;
    must(cudaMalloc((void **)&step, 8), "memory"), cudaMemset(step, 0, 8);
    report("copy 360 MB", time_us(3, [&](int) { cudaMemcpyAsync(y, x, t * f * 4, cudaMemcpyDeviceToDevice, harness_stream); }), 8.0 * t * f);
    report("swiglu 8192 x 11008", time_us(3, [&](int) { ql_swiglu_forward_cuda(z, x, y, t * f); }), 12.0 * t * f);
    report("add 8192 x 11008", time_us(3, [&](int) { ql_add_forward_cuda(y, x, t * f); }), 12.0 * t * f);
    report("rmsnorm 8192 x 4096", time_us(3, [&](int) { ql_rmsnorm_forward_cuda(y, NULL, x, z, t, c, 1e-5f); }), 8.0 * t * c);
    report("rmsnorm 8192 x 4096 to bf16", time_us(3, [&](int) { ql_cuda_rmsnorm_bf16((__nv_bfloat16 *)y, x, z, t, c, 1e-5f); }), 6.0 * t * c);
    report("rmsnorm 1 x 4096 to bf16", time_us(50, [&](int) { ql_cuda_rmsnorm_bf16((__nv_bfloat16 *)y, x, z, 1, c, 1e-5f); }), 6.0 * c);
    report("rope 8192 x 32 x 128", time_us(3, [&](int) { ql_rope_forward_cuda(x, y, z, ids, t, 32, 128); }), 8.0 * t * c);
    report("scatter rows 8192 x 4096", time_us(3, [&](int) { ql_gather_rows_forward_cuda(y, x, ids, t, c); }), 8.0 * t * c);
    report("cross-entropy 2048 x 32000", time_us(3, [&](int) { ql_cross_entropy_forward_cuda(y, NULL, x, ids, 2048, 32000); }), 4.0 * 2048 * 32000);
    report("greedy 1 x 32000", time_us(50, [&](int) { ql_sample_forward_cuda(ids, x, ids, step, 1, 32000, 0, 0, 1, 1); }), 4.0 * 32000);
    std::vector<float> logits = normals(32 * 32000);
    cudaMemcpy(x, logits.data(), logits.size() * 4, cudaMemcpyHostToDevice);
    for (int64_t b : {1, 32}) {
        printf("b = %d:\n", (int)b);
        report("draw v = 32000", time_us(20, [&](int) { ql_sample_forward_cuda(ids, x, ids, step, b, 32000, 1, 0, 1, 1); }), 4.0 * b * 32000);
        report("draw, top-k 50", time_us(20, [&](int) { ql_sample_forward_cuda(ids, x, ids, step, b, 32000, 1, 50, 1, 1); }), 4.0 * b * 32000);
        report("draw, top-p 0.9", time_us(20, [&](int) { ql_sample_forward_cuda(ids, x, ids, step, b, 32000, 1, 0, 0.9f, 1); }), 4.0 * b * 32000);
    }
    double us = time_us(2, [&](int) { ql_gram_forward_cuda(z, x, x, 4096, c, c, 1); });
    printf("gram, lower, 4096 tokens of 4096: %.1f us, %.1f TFLOP/s of the half\n", us, 1.0 * 4096 * c * c / us * 1e-6);
}

int main(void) {
    harness_begin();
    check_all();
    time_all();
    return harness_end();
}
