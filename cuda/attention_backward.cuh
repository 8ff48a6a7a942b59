/* attention_backward.cuh: what the kernels of attention's gradient share. */
#ifndef QL_CUDA_ATTENTION_BACKWARD_CUH
#define QL_CUDA_ATTENTION_BACKWARD_CUH

#include "device.cuh"

template <typename T> struct gradient_args {
    T *dq, *dk, *dv;
    const T *dout, *q, *k, *v, *out;
    const float *lse, *delta; /* (t, hq); delta: the sum of dout out, made by ql_attention_backward_tiles */
    const int64_t *q_start, *kv_start, *kv_len;
    int b, hq, hkv, d;
    float scale;
};

/* false, and nothing is done, where the shape is not theirs: d in {64, 80, 96, 128} */
bool ql_attention_backward_tiles(gradient_args<bf16> args, int64_t t, int64_t max_queries, int64_t max_keys);

#endif
