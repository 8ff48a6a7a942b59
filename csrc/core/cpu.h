/* cpu.h: what this processor and this system allow. */
#ifndef QL_CPU_H
#define QL_CPU_H

/* 1 where usable; else 0 and *why_not says why (never NULL) */
int ql_cpu_has_avx2(const char **why_not);        /* AVX2, FMA, F16C */
int ql_cpu_has_avx512(const char **why_not);      /* AVX-512 F, BW, DQ, VL */
int ql_cpu_has_avx512_vnni(const char **why_not); /* and VNNI */
int ql_cpu_has_avx512_bf16(const char **why_not); /* and BF16 */
int ql_cpu_has_amx(const char **why_not);         /* and AMX tiles for bf16 and int8, and the system's permission for its state */

#endif
