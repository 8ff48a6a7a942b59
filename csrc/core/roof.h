/* roof.h: what this machine can do at most, for benchmarks: multiply-adds in registers, reads and copies of memory, on
 * ql_threads() threads. Each ISA has its own, since the peak depends on the width of a vector. */
#ifndef QL_ROOF_H
#define QL_ROOF_H

#include <stdint.h> /* int64_t */

/* fma: `tasks` independent tasks of `rounds` rounds; returns the floating-point operations done (a multiply-add is two)
 * read: every float of x (count,) into a register;  copy: out = x (count,), past the caches where the ISA can */
#define QL_ROOF_PROTOTYPES(isa)                                             \
    int64_t ql_roof_fma_##isa(int64_t tasks, int64_t rounds);               \
    void ql_roof_read_##isa(const float *x, int64_t count);                 \
    void ql_roof_copy_##isa(float *out, const float *x, int64_t count);
QL_ROOF_PROTOTYPES(scalar)
QL_ROOF_PROTOTYPES(avx2)
QL_ROOF_PROTOTYPES(avx512)
int64_t ql_roof_pairs_avx512_bf16(int64_t tasks, int64_t rounds); /* bf16 products in registers; returns the operations done */
int64_t ql_roof_tile_amx(int64_t tasks, int64_t rounds); /* bf16 products of tiles in registers; returns the operations done */

#endif
