/* vec_math.h: functions built from the vector vocabulary; included at the end of vec_<isa>.h only. */
#ifndef QL_VEC_MATH_H
#define QL_VEC_MATH_H

/* the compiler must have the value in a register here */
#if V_AVX512
#define KEEP(a) __asm__ volatile("" : "+v"(a))
#else
#define KEEP(a) __asm__ volatile("" : "+x"(a))
#endif

/* exp(x) to about 1 unit in the last place: x = q ln 2 + r with |r| <= ln(2)/2, exp(r) by its series up to r^7 / 7!
 * (the rest is below 6e-9). Below -104 gives 0, above 88.73 infinity, NaN stays NaN. */
static inline vf v_exp(vf x) {
    x = v_max(v_set1(-104.0f), v_min(v_set1(89.0f), x)); /* the second operand is kept where it is NaN */
    vf q = v_round(v_mul(x, v_set1(0x1.715476p+0f)));    /* 1 / ln 2 */
    vf r = v_fnma(q, v_set1(0x1.62e430p-1f), x);         /* ln 2 = 0x1.62e430p-1 - 0x1.05c610p-29 */
    r = v_fma(q, v_set1(0x1.05c610p-29f), r);
    vf p = v_set1(1.0f / 5040.0f);
    p = v_fma(p, r, v_set1(1.0f / 720.0f));
    p = v_fma(p, r, v_set1(1.0f / 120.0f));
    p = v_fma(p, r, v_set1(1.0f / 24.0f));
    p = v_fma(p, r, v_set1(1.0f / 6.0f));
    p = v_fma(p, r, v_set1(0.5f));
    p = v_fma(v_mul(p, r), r, r);
    p = v_add(p, v_set1(1.0f));
    return v_ldexp(p, q);
}

/* 1 / (1 + exp(-x)) */
static inline vf v_sigmoid(vf x) {
    return v_div(v_set1(1.0f), v_add(v_set1(1.0f), v_exp(v_sub(v_zero(), x))));
}

/* the sum of a[i] b[i], i < d */
static inline float v_dot(const float *a, const float *b, int64_t d) {
    vf sum = v_zero();
    int64_t i = 0;
    for (; i + VL <= d; i += VL) { sum = v_fma(v_load(a + i), v_load(b + i), sum); }
    if (i < d) { sum = v_fma(v_load_tail(a + i, d - i), v_load_tail(b + i, d - i), sum); }
    return v_sum(sum);
}

#endif
