/* sample.c: the choice of the next tokens, and the counters of a generation. */
#include "../core/keys.h"
#include "../core/random.h"
#include "../quantlab.h"

#include <math.h> /* exp */

typedef struct {
    int32_t *tokens;
    const float *logits;
    const int32_t *streams;
    const int64_t *step;
    int64_t v, top_k;
    float temperature, top_p;
    uint64_t seed;
} sample_context;

/* NaN counts as less than all */
static int32_t largest(const float *logits, int64_t v) {
    int64_t best = 0;
    for (int64_t j = 1; j < v; j++) {
        if (logits[j] > logits[best] || (logits[best] != logits[best] && logits[j] == logits[j])) { best = j; }
    }
    return (int32_t)best;
}

/* what is counted of the logits from `threshold` on: their number, or their share of the largest one's weight */
static double amount(const float *logits, int64_t v, float threshold, float best, float temperature, int weights) {
    double sum = 0;
    for (int64_t j = 0; j < v; j++) {
        if (logits[j] >= threshold) { sum += weights ? exp(((double)logits[j] - best) / temperature) : 1.0; }
    }
    return sum;
}

/* the highest threshold, at least `lowest`, whose amount reaches `wanted` */
static float threshold_of(const float *logits, int64_t v, float best, float temperature, int weights, float lowest, double wanted) {
    uint32_t low = QL_LOWEST_KEY, high = QL_HIGHEST_KEY;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2 + 1;
        float threshold = ql_float_of_key(middle);
        if (threshold <= lowest || amount(logits, v, threshold, best, temperature, weights) >= wanted) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return ql_float_of_key(low);
}

static int32_t draw(const sample_context *c, const float *logits, float uniform) {
    int64_t v = c->v;
    float best = logits[largest(logits, v)], threshold = ql_float_of_key(QL_LOWEST_KEY);
    if (c->top_k > 0 && c->top_k < v) { threshold = threshold_of(logits, v, best, c->temperature, 0, threshold, (double)c->top_k); }
    double total = amount(logits, v, threshold, best, c->temperature, 1);
    if (c->top_p < 1.0f) {
        threshold = threshold_of(logits, v, best, c->temperature, 1, threshold, c->top_p * total);
        total = amount(logits, v, threshold, best, c->temperature, 1);
    }
    double passed = 0, goal = uniform * total;
    for (int64_t j = 0; j < v; j++) {
        if (!(logits[j] >= threshold)) { continue; } /* NaN too */
        passed += exp(((double)logits[j] - best) / c->temperature);
        if (passed > goal) { return (int32_t)j; }
    }
    return largest(logits, v); /* the weights are not finite */
}

static void sample_task(void *context, int64_t i) {
    const sample_context *c = context;
    const float *logits = c->logits + i * c->v;
    float uniform = ql_uniform(c->seed, c->streams[i], c->step[0]);
    c->tokens[i] = c->temperature > 0 ? draw(c, logits, uniform) : largest(logits, c->v);
}

void ql_sample_forward_scalar(int32_t *tokens, const float *logits, const int32_t *streams, const int64_t *step, int64_t b,
                              int64_t v, float temperature, int64_t top_k, float top_p, uint64_t seed) {
    sample_context context = {tokens, logits, streams, step, v, top_k, temperature, top_p, seed};
    ql_parallel_for(b, sample_task, &context);
}

void ql_advance_forward_scalar(int32_t *history, int32_t *ids, int32_t *positions, int32_t *rows, int64_t *kv_len,
                               int64_t *step, const int32_t *tokens, int64_t b) {
    for (int64_t i = 0; i < b; i++) {
        history[step[0] * b + i] = tokens[i];
        ids[i] = tokens[i];
        positions[i]++;
        rows[i]++;
        kv_len[i]++;
    }
    step[0]++;
}
