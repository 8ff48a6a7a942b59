/* roof_avx512_bf16.c: what products of pairs of bf16 do at most, see core/roof.h. */
#include "../core/roof.h"
#include "../quantlab.h"
#include "pairs_avx512_bf16.h"

enum { CHAINS = 20 }; /* with no more than latency times units, 12, some cycles are lost: 8 % */

static void pairs_task(void *context, int64_t task) {
    int64_t rounds = *(const int64_t *)context;
    vf sums[CHAINS], factor = vi_as_vf(vi_set1(0x3c003c00)), term = vi_as_vf(vi_set1(0x3f803f80)); /* sums stay finite and normal */
    for (int i = 0; i < CHAINS; i++) { sums[i] = v_set1((float)(task + i)); }
    for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 20
        for (int i = 0; i < CHAINS; i++) { sums[i] = v_multiply_pairs(factor, term, sums[i]); }
    }
#pragma GCC unroll 20
    for (int i = 0; i < CHAINS; i++) { __asm__ volatile("" ::"v"(sums[i])); }
}

int64_t ql_roof_pairs_avx512_bf16(int64_t tasks, int64_t rounds) {
    ql_parallel_for(tasks, pairs_task, &rounds);
    return tasks * rounds * CHAINS * VL * 4;
}
