/* rope.c: rotary position embedding (Su et al. 2021), half-split layout: element i turns with element i + d/2. */
#include "../quantlab.h"

typedef struct {
    float *x;
    const float *cos, *sin;
    const int32_t *positions;
    int64_t heads, d;
} rope_context;

static void rope_token(void *context, int64_t s) {
    const rope_context *r = context;
    int64_t half = r->d / 2;
    const float *cos = r->cos + r->positions[s] * half, *sin = r->sin + r->positions[s] * half;
    for (int64_t h = 0; h < r->heads; h++) {
        float *x = r->x + (s * r->heads + h) * r->d;
        for (int64_t i = 0; i < half; i++) {
            float a = x[i], b = x[i + half];
            x[i] = a * cos[i] - b * sin[i];
            x[i + half] = b * cos[i] + a * sin[i];
        }
    }
}

void ql_rope_forward_scalar(float *x, const float *cos, const float *sin, const int32_t *positions, int64_t t,
                            int64_t heads, int64_t d) {
    rope_context context = {x, cos, sin, positions, heads, d};
    ql_parallel_for(t, rope_token, &context);
}
