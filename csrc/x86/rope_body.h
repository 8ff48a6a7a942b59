/* rope_body.h: rotary position embedding by vectors, in place, half-split layout. */
#include "../quantlab.h"

enum { ELEMENTS_PER_TASK = 16384 };

typedef struct {
    float *x;
    const float *cos, *sin;
    const int32_t *positions;
    int64_t t, heads, d, tokens_per_task;
} rope_context;

/* (low[i], high[i]) turned by the angle of (cos[i], sin[i]), i < half */
static void rotate(float *low, float *high, const float *cos, const float *sin, int64_t half) {
    int64_t i = 0;
    for (; i + VL <= half; i += VL) {
        vf a = v_load(low + i), b = v_load(high + i), c = v_load(cos + i), s = v_load(sin + i);
        v_store(low + i, v_fnma(b, s, v_mul(a, c)));
        v_store(high + i, v_fma(a, s, v_mul(b, c)));
    }
    if (i < half) {
        int64_t n = half - i;
        vf a = v_load_tail(low + i, n), b = v_load_tail(high + i, n);
        vf c = v_load_tail(cos + i, n), s = v_load_tail(sin + i, n);
        v_store_tail(low + i, v_fnma(b, s, v_mul(a, c)), n);
        v_store_tail(high + i, v_fma(a, s, v_mul(b, c)), n);
    }
}

static void rope_tokens(void *context, int64_t task) {
    const rope_context *r = context;
    int64_t half = r->d / 2;
    int64_t first = task * r->tokens_per_task;
    int64_t last = first + r->tokens_per_task < r->t ? first + r->tokens_per_task : r->t;
    for (int64_t s = first; s < last; s++) {
        const float *cos = r->cos + r->positions[s] * half, *sin = r->sin + r->positions[s] * half;
        for (int64_t h = 0; h < r->heads; h++) {
            float *x = r->x + (s * r->heads + h) * r->d;
            rotate(x, x + half, cos, sin, half);
        }
    }
}

void V_NAME(rope_forward)(float *x, const float *cos, const float *sin, const int32_t *positions, int64_t t, int64_t heads,
                          int64_t d) {
    int64_t tokens = ELEMENTS_PER_TASK / (heads * d + 1) + 1;
    rope_context context = {x, cos, sin, positions, t, heads, d, tokens};
    ql_parallel_for((t + tokens - 1) / tokens, rope_tokens, &context);
}
