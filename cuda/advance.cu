/* advance.cu: the counters of a generation, on the device: so a recorded step needs nothing from the host. */
#include "cuda.h"

static __global__ void advance(int32_t *history, int32_t *ids, int32_t *positions, int32_t *rows, int64_t *kv_len,
                               int64_t *step, const int32_t *tokens, int b) {
    ql_cuda_wait_previous();
    int64_t now = step[0];
    __syncthreads(); /* all have read the step before it grows: one block */
    for (int i = (int)threadIdx.x; i < b; i += (int)blockDim.x) {
        int32_t token = tokens[i];
        history[now * b + i] = token;
        ids[i] = token;
        positions[i]++;
        rows[i]++;
        kv_len[i]++;
    }
    if (threadIdx.x == 0) { step[0] = now + 1; }
}

extern "C" void ql_advance_forward_cuda(int32_t *history, int32_t *ids, int32_t *positions, int32_t *rows, int64_t *kv_len,
                                        int64_t *step, const int32_t *tokens, int64_t b) {
    unsigned threads = b < 32 ? 32 : b < 1024 ? (unsigned)((b + 31) / 32 * 32) : 1024;
    ql_cuda_launch(advance, dim3(1), dim3(threads), 0, true, history, ids, positions, rows, kv_len, step, tokens, b);
}
