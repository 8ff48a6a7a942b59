/* cpu.h: what this processor and this system allow. */
#ifndef QL_CPU_H
#define QL_CPU_H

/* 1 where usable; else 0 and *why_not says why (never NULL) */
int ql_cpu_has_avx2(const char **why_not);        /* AVX2, FMA, F16C */
int ql_cpu_has_avx512(const char **why_not);      /* AVX-512 F, BW, DQ, VL */
int ql_cpu_has_avx512_bf16(const char **why_not); /* and BF16 */
int ql_cpu_has_amx(const char **why_not);         /* AMX tile and bf16, and the system's permission for its state */

#endif
