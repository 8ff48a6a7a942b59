/* pack.cu: a quantized weight into the records of units.cuh, on the device, beside the stored codes. */
#include "cuda.h"
#include "packed.h"
#include "units.cuh"
#include "weight.cuh"

#include <stdlib.h>

struct pack_args {
    ql_weight w;
    ql_packed p;
    uint8_t *records;
    float *factor;
};

/* what the sums lack beside the scales: INT8 has values of 1/127, FP4 is multiplied in twelfths (linear_packed.cu) */
static __device__ float format_factor(ql_format format) {
    return format == QL_INT8 ? QL_INT8_STEP : format == QL_FP4 ? 1.0f / 12.0f : 1.0f;
}

/* the scale of row i and stored column j */
static __device__ float scale_at(const ql_weight &w, int64_t i, int64_t j) {
    if (w.format == QL_INT8) { return w.scales[i]; }
    if (w.format == QL_AFFINE) { return w.scales[i * ((w.k + w.group - 1) / w.group) + j / w.group]; }
    return block_scale(w, (i * w.k + j) / w.group);
}

static __device__ float zero_at(const ql_weight &w, int64_t i, int64_t j) {
    if (w.zeros == NULL) { return (float)ql_affine_symmetric_zero(w.bits); }
    return w.zeros[i * ((w.k + w.group - 1) / w.group) + j / w.group];
}

static __device__ uint32_t code_at(const ql_weight &w, int64_t i, int64_t j) {
    if (i >= w.n || j >= w.k) { return 0; }
    if (w.format == QL_INT8) { return (uint32_t)(((const int8_t *)w.codes)[i * w.k + j] + 128); }
    if (w.format == QL_AFFINE) { return ql_code_get((const uint32_t *)w.codes + i * ql_words_per_row(w.k, w.bits), j, w.bits); }
    int64_t flat = i * w.k + j;
    uint8_t byte = ((const uint8_t *)w.codes)[flat >> 1];
    return flat & 1 ? byte & 15 : byte >> 4;
}

/* One block. The power of two that brings the largest scale to [2^14, 2^15); factor = its inverse times the format's. */
static __global__ void find_factor(const pack_args a, int64_t scales) {
    __shared__ float scratch[WARP];
    float largest = 0.0f;
    for (int64_t i = threadIdx.x; i < scales; i += blockDim.x) {
        float scale = a.w.format == QL_NF4 || a.w.format == QL_FP4 ? block_scale(a.w, i) : a.w.scales[i];
        largest = fmaxf(largest, fabsf(scale));
    }
    largest = block_max(largest, scratch);
    if (threadIdx.x == 0) {
        int exponent = 0;
        frexpf(largest, &exponent); /* largest in [2^(e - 1), 2^e) */
        exponent = largest > 0.0f ? min(max(15 - exponent, -100), 100) : 0;
        a.factor[0] = ldexpf(format_factor(a.w.format), -exponent);
        a.factor[1] = ldexpf(1.0f, exponent);
    }
}

/* the codes of step j, pair p, of lane's row, to where units.cuh has them */
static __device__ void put_pair(uint32_t *words, ql_units_kind kind, int j, int p, uint32_t first, uint32_t second) {
    int i4 = 2 * (j % 2) + p, i2 = 2 * (j % 4) + p, i3 = 2 * j + p - 2;
    uint32_t both = first | second << 16;
    switch (kind) {
    case QL_UNITS_4BIT: words[j / 2] |= both << (4 * i4); break;
    case QL_UNITS_TABLE: words[j / 2] |= (first | second << 4) << (8 * i4); break;
    case QL_UNITS_8BIT: words[j] |= (both ^ 0x00800080u) << (8 * p); break;
    case QL_UNITS_3BIT:
        for (int bit = 0; bit < 3 && i3 < 0; bit++) { words[3 * p + bit] |= (both >> bit & 0x00010001u) << 15; }
        if (i3 >= 0) { words[i3 / 5] |= both << (3 * (i3 % 5)); }
        break;
    default: words[j / 4] |= both << (2 * i2);
    }
}

/* a warp a unit */
static __global__ void pack_units(const pack_args a) {
    const ql_packed &p = a.p;
    int64_t unit = (int64_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    if (unit >= (int64_t)p.rows8 * p.units) { return; }
    int64_t row = unit / p.units * UNIT_ROWS + g, column = unit % p.units * p.columns;
    uint8_t *record = a.records + unit * p.record;
    uint32_t words[8] = {};
    for (int j = 0; j < p.columns / STEP; j++) {
        for (int pair = 0; pair < 2; pair++) {
            int64_t at = column + j / 2 * TWO_STEPS + 8 * t + 4 * (j % 2) + 2 * pair;
            put_pair(words, p.kind, j, pair, code_at(a.w, row, at), code_at(a.w, row, at + 1));
        }
    }
    uint4 *chunks = (uint4 *)record;
    chunks[lane] = make_uint4(words[0], words[1], words[2], words[3]);
    if (p.kind == QL_UNITS_8BIT) { chunks[WARP + lane] = make_uint4(words[4], words[5], words[6], words[7]); }
    if (p.kind == QL_UNITS_3BIT) { ((uint2 *)(record + CHUNK))[lane] = make_uint2(words[4], words[5]); }
    uint8_t *scales = record + p.record - 16 * p.parts * (p.zeros ? 2 : 1);
    for (int part = t; part < p.parts; part += 4) {
        int64_t at = column + part * (p.columns / p.parts);
        bool inside = row < a.w.n && at < a.w.k;
        ((__half *)(scales + 16 * part))[g] = __float2half_rn(inside ? scale_at(a.w, row, at) * a.factor[1] : 0.0f);
        if (p.zeros) {
            float zero = inside ? zero_at(a.w, row, at) : 0.0f;
            ((bf16 *)(scales + 16 * (p.parts + part)))[g] = __float2bfloat16_rn(p.kind == QL_UNITS_8BIT ? zero : 128.0f + zero);
        }
    }
}

static int gcd(int64_t a, int64_t b) { return (int)(b == 0 ? a : gcd(b, a % b)); }

/* 0 where the small kernels do not know the weight */
static int describe(ql_packed *p, const ql_weight *w) {
    static const int columns[] = {256, 256, 128, 128, 128}, bytes[] = {CHUNK, CHUNK + CHUNK / 2, CHUNK, 2 * CHUNK, CHUNK};
    int64_t group = w->format == QL_INT8 ? w->k : w->group;
    switch (w->format) {
    case QL_AFFINE:
        p->kind = w->bits == 2 ? QL_UNITS_2BIT : w->bits == 3 ? QL_UNITS_3BIT : w->bits == 4 ? QL_UNITS_4BIT : QL_UNITS_8BIT;
        break;
    case QL_INT8: p->kind = QL_UNITS_8BIT; break;
    case QL_NF4: case QL_FP4:
        if (w->k % w->group != 0) { return 0; } /* a block would go over the end of a row */
        p->kind = QL_UNITS_TABLE;
        break;
    default: return 0;
    }
    p->columns = columns[p->kind];
    int step = group >= w->k ? p->columns : gcd(group, p->columns);
    if (step % TWO_STEPS != 0 || w->n == 0 || w->k == 0 || w->n > 1 << 28 || w->k > 1 << 28) { return 0; }
    p->parts = p->columns / step, p->zeros = w->zeros != NULL || (w->format == QL_AFFINE && w->bits > 4 && w->bits < 8);
    p->record = bytes[p->kind] + 16 * p->parts * (p->zeros ? 2 : 1);
    p->rows8 = (int)((w->n + TILE_ROWS - 1) / TILE_ROWS * 2), p->units = (int)((w->k + p->columns - 1) / p->columns);
    return 1;
}

static int64_t scale_count(const ql_weight *w) {
    if (w->format == QL_INT8) { return w->n; }
    if (w->format == QL_AFFINE) { return w->n * ((w->k + w->group - 1) / w->group); }
    return (w->n * w->k + w->group - 1) / w->group;
}

/* 0 where the kernel for float rows does not know the weight */
static int describe_rows(ql_packed *p, const ql_weight *w) {
    int bytes = w->format == QL_F32 ? 4 : 2;
    bool floats = w->format == QL_F32 || w->format == QL_F16 || w->format == QL_BF16;
    if (!floats || w->n == 0 || w->k == 0 || w->n % TILE_ROWS != 0 || w->k % 8 != 0 || w->n > 1 << 28 || w->k > 1 << 24 || (uintptr_t)w->codes % 16 != 0) {
        return 0;
    }
    p->kind = w->format == QL_F32 ? QL_ROWS_F32 : w->format == QL_F16 ? QL_ROWS_F16 : QL_ROWS_BF16;
    p->records = (const uint8_t *)w->codes;
    p->columns = (int)w->k, p->record = (int)(UNIT_ROWS * w->k * bytes), p->rows8 = (int)(w->n / UNIT_ROWS), p->units = 1;
    return 1;
}

/* a float weight: its factor alone is new */
static ql_status pack_rows(ql_weight *w) {
    static const float one = 1.0f;
    ql_packed p = {};
    if (!describe_rows(&p, w)) { return QL_OK; }
    ql_packed *packed = (ql_packed *)malloc(sizeof *packed);
    if (packed == NULL) { return ql_cuda_refuse(QL_ENOMEM, "out of memory"); }
    ql_status status = ql_cuda_alloc(&p.memory, sizeof one);
    if (status == QL_OK) { status = ql_cuda_upload(p.memory, &one, sizeof one); }
    if (status != QL_OK) {
        ql_cuda_free(p.memory);
        free(packed);
        return status;
    }
    p.factor = (const float *)p.memory;
    *packed = p;
    w->packed = packed;
    return QL_OK;
}

ql_status ql_cuda_pack(ql_weight *w) {
    pack_args a = {};
    w->packed = NULL;
    if (!describe(&a.p, w)) { return pack_rows(w); }
    ql_packed *packed = (ql_packed *)malloc(sizeof *packed);
    if (packed == NULL) { return ql_cuda_refuse(QL_ENOMEM, "out of memory"); }
    size_t records = (size_t)a.p.rows8 * (size_t)a.p.units * (size_t)a.p.record, start = (records + 255) / 256 * 256;
    void *memory = NULL;
    ql_status status = ql_cuda_alloc(&memory, start + 16);
    if (status != QL_OK) {
        free(packed);
        return status;
    }
    a.w = *w, a.records = (uint8_t *)memory, a.factor = (float *)(a.records + start);
    a.p.records = a.records, a.p.factor = a.factor, a.p.memory = memory;
    *packed = a.p;
    w->packed = packed;
    unsigned warps = 8, blocks = (unsigned)(((int64_t)a.p.rows8 * a.p.units + warps - 1) / warps);
    ql_cuda_launch(find_factor, dim3(1), dim3(1024), 0, false, a, scale_count(w));
    ql_cuda_launch(pack_units, dim3(blocks), dim3(warps * WARP), 0, false, a);
    return QL_OK;
}

void ql_cuda_unpack(ql_weight *w) {
    if (w->packed == NULL) { return; }
    ql_cuda_free(ql_packed_of(w)->memory);
    free(w->packed);
    w->packed = NULL;
}
