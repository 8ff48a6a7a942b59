/* sample_body.h: the choice of the next tokens by vectors. Weights are float32, the scalar reference's are float64: a token whose share
 * ends within 1e-6 of the number drawn may differ from its. Thresholds of top-k and top-p are found as there, by halving the range of
 * floats; sums are float64, in a fixed order. */
#include "../core/keys.h"
#include "../core/random.h"
#include "../core/sizes.h"
#include "../quantlab.h"
#include "places.h"

#include <math.h> /* INFINITY */

typedef struct {
    int32_t *tokens;
    const float *logits;
    const int32_t *streams;
    const int64_t *step;
    int64_t v, top_k;
    float temperature, top_p;
    uint64_t seed;
    float *weights; /* (workers, v) */
    places workers;
} sample_context;

/* lanes [j, j + VL) of a row, those beyond it -infinity, which no choice takes */
static inline vf row_lanes(const float *row, int64_t j, int64_t v) {
    if (j + VL <= v) { return v_load(row + j); }
    return v_select(vm_first(v - j), v_load_tail(row + j, v - j), v_set1(-INFINITY));
}

static float largest_value(const float *row, int64_t v) {
    vf best[4] = {v_set1(-INFINITY), v_set1(-INFINITY), v_set1(-INFINITY), v_set1(-INFINITY)};
    int64_t j = 0;
    for (; j + 4 * VL <= v; j += 4 * VL) {
        for (int q = 0; q < 4; q++) { best[q] = v_max(v_load(row + j + q * VL), best[q]); } /* the second where the first is NaN */
    }
    for (; j < v; j += VL) { best[0] = v_max(row_lanes(row, j, v), best[0]); }
    return v_hmax(v_max(v_max(best[0], best[1]), v_max(best[2], best[3])));
}

/* the first of the largest; NaN counts as less than all */
static int32_t largest(const float *row, int64_t v) {
    float best = largest_value(row, v);
    for (int64_t j = 0; j < v; j += VL) {
        vm hits = v_eq(row_lanes(row, j, v), v_set1(best));
        for (int64_t i = 0; vm_any(hits) && i < at_most(VL, v - j); i++) {
            if (row[j + i] == best) { return (int32_t)(j + i); }
        }
    }
    return 0;
}

/* The sum, over logits from `threshold` on, of their weights, or of ones: weights NULL */
static double amount(const float *row, const float *weights, int64_t v, float threshold) {
    vd low = vd_zero(), high = vd_zero();
    for (int64_t j = 0; j < v; j += VL) {
        vf taken = weights == NULL ? v_set1(1.0f) : j + VL <= v ? v_load(weights + j) : v_load_tail(weights + j, v - j);
        taken = v_select(v_ge(row_lanes(row, j, v), v_set1(threshold)), taken, v_zero());
        low = vd_add(low, vd_low(taken));
        high = vd_add(high, vd_high(taken));
    }
    return vd_sum(vd_add(low, high));
}

/* the highest threshold, at least `lowest`, whose amount reaches `wanted` */
static float threshold_of(const float *row, const float *weights, int64_t v, float lowest, double wanted) {
    uint32_t low = QL_LOWEST_KEY, high = QL_HIGHEST_KEY;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2 + 1;
        float threshold = ql_float_of_key(middle);
        if (threshold <= lowest || amount(row, weights, v, threshold) >= wanted) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return ql_float_of_key(low);
}

/* the first token at which the weights, of those from `threshold` on, pass `goal`; -1: none, since they are not finite */
static int32_t walk(const float *row, const float *weights, int64_t v, float threshold, double goal) {
    double passed = 0;
    for (int64_t j = 0; j < v; j += VL) {
        int64_t count = at_most(VL, v - j);
        double after = passed + amount(row + j, weights + j, count, threshold);
        for (int64_t i = 0; after > goal && i < count; i++) {
            if (!(row[j + i] >= threshold)) { continue; }
            passed += (double)weights[j + i];
            if (passed > goal) { return (int32_t)(j + i); }
        }
        passed = after;
    }
    return -1;
}

static void weigh(float *weights, const float *row, int64_t v, float best, float temperature) {
    for (int64_t j = 0; j < v; j += VL) {
        vf x = row_lanes(row, j, v), weight = v_exp(v_div(v_sub(x, v_set1(best)), v_set1(temperature)));
        v_store_tail(weights + j, v_select(v_eq(x, x), weight, v_zero()), at_most(VL, v - j));
    }
}

static int32_t draw(const sample_context *c, const float *row, float *weights, float uniform) {
    int64_t v = c->v;
    float threshold = ql_float_of_key(QL_LOWEST_KEY);
    weigh(weights, row, v, largest_value(row, v), c->temperature);
    if (c->top_k > 0 && c->top_k < v) { threshold = threshold_of(row, NULL, v, threshold, (double)c->top_k); }
    double total = amount(row, weights, v, threshold);
    if (c->top_p < 1.0f) {
        threshold = threshold_of(row, weights, v, threshold, c->top_p * total);
        total = amount(row, weights, v, threshold);
    }
    int32_t token = walk(row, weights, v, threshold, uniform * total);
    return token >= 0 ? token : largest(row, v);
}

static void sample_task(void *context, int64_t i) {
    const sample_context *c = context;
    const float *row = c->logits + i * c->v;
    if (c->temperature > 0) {
        int64_t worker = take_place(&c->workers);
        c->tokens[i] = draw(c, row, c->weights + worker * c->v, ql_uniform(c->seed, c->streams[i], c->step[0]));
        leave_place(&c->workers, worker);
    } else {
        c->tokens[i] = largest(row, c->v);
    }
}

void V_NAME(sample_forward)(int32_t *tokens, const float *logits, const int32_t *streams, const int64_t *step, int64_t b, int64_t v,
                            float temperature, int64_t top_k, float top_p, uint64_t seed) {
    int64_t workers = at_most(ql_threads(), b), size = temperature > 0 ? workers * v : 0;
    float *weights = ql_scratch((size_t)size * sizeof *weights + (size_t)workers * sizeof(atomic_int));
    if (weights == NULL) {
        ql_sample_forward_scalar(tokens, logits, streams, step, b, v, temperature, top_k, top_p, seed);
        return;
    }
    sample_context context = {tokens, logits, streams, step, v, top_k, temperature, top_p, seed, weights,
                              make_places((atomic_int *)(void *)(weights + size), workers)};
    ql_parallel_for(b, sample_task, &context);
}
