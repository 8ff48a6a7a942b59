/* attention.cuh: what the attention kernels share. Sequence b has queries [q_start[b], q_start[b + 1]) of q (t, hq, d) and
 * keys and values rows [kv_start[b], kv_start[b] + kv_len[b]) of k, v (rows, hkv, d); its last query sees all of them.
 *
 * Every kernel walks the keys of a sequence in ascending order by tiles that begin at its first key, whatever stands beside
 * it: so the result of a token is bitwise the same in every batch and chunk that the same kernel computes. */
#ifndef QL_CUDA_ATTENTION_CUH
#define QL_CUDA_ATTENTION_CUH

#include "device.cuh"

template <typename T> struct attention_args {
    T *out;           /* (t, hq, d) */
    float *lse;       /* (t, hq) or NULL */
    const T *q;       /* (t, hq, d) */
    const T *k, *v;   /* (rows, hkv, d) */
    const int64_t *q_start, *kv_start, *kv_len; /* (b + 1,) (b,) (b,) on the device */
    int b, hq, hkv, d;
    float scale;
    int ordered; /* whether each column of a row of out goes to its ordered_column */
};

/* log-sum-exp of scaled scores from their maximum, not scaled, and the sum of 2^(scale_log2 (score - maximum)) */
__device__ __forceinline__ float log_sum(float maximum, float sum, float scale_log2) {
    return (maximum * scale_log2 + log2f(sum)) * 0.69314718055994531f;
}

/* bf16: false, and nothing is done, where the shape or the device is not theirs */
bool ql_attention_prefill(const attention_args<bf16> &args, int64_t max_queries, int64_t max_keys); /* d in {64, 80, 96, 128}; ordered: not 80 */
bool ql_attention_wgmma(const attention_args<bf16> &args, int64_t max_queries);   /* d = 128, code for sm_90a */
bool ql_attention_decode(const attention_args<bf16> &args, int64_t max_keys);     /* as prefill; at most one query a sequence */

#endif
