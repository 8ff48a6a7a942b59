/* double_quant.c: block scales in 8 bits (QLoRA, section 3), equal to the last bit to bitsandbytes' CPU path:
 * offset = mean of the scales; each run of 256 differences from it has a nested absmax, and each difference over that
 * absmax takes a code of the dynamic map. */
#include "quantizers.h"

#include "../formats/dynamic_map.h"
#include "../formats/weight.h"

#include <math.h> /* fabsf */

enum { LEVELS = 4, ROWS = 4, MAX_LANES = 8, BLOCKS_PER_TASK = 16, GRID = 65535 };

/* The mean depends on the order of a float32 sum: this is PyTorch's. Vectors of `lanes` elements go round ROWS
 * accumulators, which are flushed into coarser ones every 2^p, 2^2p, 2^3p steps.
 * total (ROWS * lanes); x (steps * ROWS * lanes) */
static void cascade_sum(float *total, const float *x, int64_t steps, int lanes) {
    float level[LEVELS][ROWS * MAX_LANES] = {{0.0f}};
    int width = ROWS * lanes, log2_steps = 0;
    while (((int64_t)1 << log2_steps) < steps) { log2_steps++; }
    int p = log2_steps / LEVELS > 4 ? log2_steps / LEVELS : 4;
    int64_t period = (int64_t)1 << p, flushed = steps / period * period;
    for (int64_t i = 0; i < steps; i++) {
        for (int e = 0; e < width; e++) { level[0][e] += x[i * width + e]; }
        if (i + 1 > flushed || (i + 1) % period != 0) { continue; }
        for (int l = 1; l < LEVELS; l++) {
            for (int e = 0; e < width; e++) {
                level[l][e] += level[l - 1][e];
                level[l - 1][e] = 0.0f;
            }
            if (((i + 1) >> (l * p) & (period - 1)) != 0) { break; }
        }
    }
    for (int e = 0; e < width; e++) { total[e] = level[0][e] + level[1][e] + level[2][e] + level[3][e]; }
}

static float ordered_mean(const float *x, int64_t count) {
    int lanes = count < MAX_LANES ? 1 : MAX_LANES;
    int64_t vectors = count / lanes, steps = vectors / ROWS;
    float total[ROWS * MAX_LANES], sum = 0.0f;
    cascade_sum(total, x, steps, lanes);
    for (int64_t i = steps * ROWS * lanes; i < vectors * lanes; i++) { total[i % lanes] += x[i]; }
    for (int e = lanes; e < ROWS * lanes; e++) { total[e % lanes] += total[e]; }
    for (int64_t i = vectors * lanes; i < count; i++) { sum += x[i]; }
    for (int e = 0; e < lanes; e++) { sum += total[e]; }
    return sum / (float)count;
}

/* The unit is rounded to a grid of 2^16 points over [-1, 1] first, then to the nearest value of the map (a tie goes
 * down); midpoints (255,) are those of its neighbours. NaN (0 / 0 where the absmax is a denormal) gives code 0. */
static uint8_t encode_dynamic(float unit, const float *midpoints) {
    float clamped = unit > 1.0f ? 1.0f : unit < -1.0f ? -1.0f : unit;
    if (!(clamped == clamped)) { return 0; }
    int32_t point = (int32_t)(float)((double)((clamped + 1.0f) * 0.5f) * GRID + 0.5);
    float value = -1.0f + (2.0f * (float)point) / (float)GRID;
    int rank = 0; /* the number of midpoints below value */
    for (int bit = 128; bit > 0; bit >>= 1) { rank += midpoints[rank + bit - 1] < value ? bit : 0; }
    return (uint8_t)rank;
}

typedef struct {
    uint8_t *codes;
    float *absmax;
    const float *scales;
    float offset;
    int64_t blocks;
    float midpoints[255];
} double_context;

static void quantize_run(const double_context *c, int64_t run) {
    int64_t first = run * QL_SCALE_BLOCK, end = first + QL_SCALE_BLOCK < c->blocks ? first + QL_SCALE_BLOCK : c->blocks;
    float absmax = 0.0f;
    for (int64_t i = first; i < end; i++) {
        float distance = fabsf(c->scales[i] - c->offset);
        absmax = distance > absmax ? distance : absmax;
    }
    float inverse = 1.0f / absmax;
    for (int64_t i = first; i < end; i++) {
        c->codes[i] = absmax > 0.0f ? encode_dynamic((c->scales[i] - c->offset) * inverse, c->midpoints) : 0;
    }
    c->absmax[run] = absmax;
}

static void quantize_runs(void *context, int64_t task) {
    const double_context *c = context;
    int64_t runs = (c->blocks + QL_SCALE_BLOCK - 1) / QL_SCALE_BLOCK;
    int64_t end = (task + 1) * BLOCKS_PER_TASK < runs ? (task + 1) * BLOCKS_PER_TASK : runs;
    for (int64_t run = task * BLOCKS_PER_TASK; run < end; run++) { quantize_run(c, run); }
}

void ql_double_quantize(uint8_t *codes, float *absmax, float *offset, const float *scales, int64_t blocks) {
    double_context context = {codes, absmax, scales, *offset = ordered_mean(scales, blocks), blocks, {0.0f}};
    for (int i = 0; i < 255; i++) { context.midpoints[i] = 0.5f * (ql_dynamic_map[i] + ql_dynamic_map[i + 1]); }
    int64_t runs = (blocks + QL_SCALE_BLOCK - 1) / QL_SCALE_BLOCK;
    ql_parallel_for((runs + BLOCKS_PER_TASK - 1) / BLOCKS_PER_TASK, quantize_runs, &context);
}

const float *ql_double_quant_map(void) { return ql_dynamic_map; }
