/* wide.cuh: what the programs for many tokens share: a weight of 4 bits, group 128, activations, and the arguments of a kernel. */
#ifndef QL_CUDA_DEV_WIDE_CUH
#define QL_CUDA_DEV_WIDE_CUH

#include "../linear_wide.cuh"
#include "harness.cuh"
#include "maps.cuh"

static const int RECORD = record_bytes<codes_4bit>(1, 0), COLUMNS = codes_4bit::columns;

/* codes: any bits; scales: float16 from 1 to 1.25 */
static __global__ void fill_records(uint32_t *words, int64_t count) {
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        uint32_t bits = (uint32_t)ql_random_bits(1, i);
        words[i] = i * 4 % RECORD < codes_4bit::bytes ? bits * 2654435761u : 0x3c003c00u + (bits & 0x00ff00ffu);
    }
}
static __global__ void fill_x(bf16 *x, int64_t count) {
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) { x[i] = __float2bfloat16_rn(2.0f * ql_uniform(2, i, 0) - 1.0f); }
}

/* one part: y (m, n), rows in order */
static small_args arguments_of(const uint8_t *records, void *y, const float *one, int n, int k, int m, int output) {
    small_args a;
    memset(&a, 0, sizeof a);
    a.tiles = n / TILE_ROWS, a.units = k / COLUMNS, a.k = a.x_line = k, a.record = RECORD, a.parts = 1, a.m = m;
    small_part &part = a.part[0];
    part.upper = records, part.lower = records + (int64_t)a.units * RECORD, part.factor = part.factor_lower = one, part.out = y;
    part.tiles = a.tiles, part.divisor = 1, part.multiplier = 2, part.lower_rows = UNIT_ROWS, part.n = n, part.output = output;
    return a;
}

#endif
