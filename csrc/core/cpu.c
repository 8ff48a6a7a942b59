/* cpu.c: features by cpuid (gcc's builtins also check that the system saves the registers). */
#define _GNU_SOURCE
#include "cpu.h"

#if defined(__x86_64__)

#include <cpuid.h>       /* __get_cpuid_count: gcc's builtins do not all know AMX */
#include <sys/syscall.h> /* SYS_arch_prctl */
#include <unistd.h>      /* syscall */

enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };

int ql_cpu_has_avx2(const char **why_not) {
    __builtin_cpu_init();
    int has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    *why_not = has ? "" : "this processor has no AVX2 with FMA and F16C";
    return has;
}

int ql_cpu_has_avx512(const char **why_not) {
    __builtin_cpu_init();
    int has = ql_cpu_has_avx2(why_not) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    *why_not = has ? "" : "this processor has no AVX-512 F, BW, DQ and VL";
    return has;
}

int ql_cpu_has_avx512_vnni(const char **why_not) {
    if (!ql_cpu_has_avx512(why_not)) { return 0; }
    int has = __builtin_cpu_supports("avx512vnni");
    *why_not = has ? "" : "this processor has no AVX-512 VNNI";
    return has;
}

int ql_cpu_has_avx512_bf16(const char **why_not) {
    unsigned a, b, c, d;
    if (!ql_cpu_has_avx512_vnni(why_not)) { return 0; }
    int has = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
    *why_not = has ? "" : "this processor has no AVX-512 BF16";
    return has;
}

int ql_cpu_has_amx(const char **why_not) {
    unsigned a, b, c, d = 0;
    if (!ql_cpu_has_avx512_bf16(why_not)) { return 0; }
    int has = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 3) == 3;
    *why_not = has ? "" : "this processor has no AMX tiles for bf16 and int8";
    if (has && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) != 0) {
        *why_not = "the system refuses the AMX tile state (arch_prctl)";
        return 0;
    }
    return has;
}

#else

int ql_cpu_has_avx2(const char **why_not) { *why_not = "this is not an x86-64 processor"; return 0; }
int ql_cpu_has_avx512(const char **why_not) { *why_not = "this is not an x86-64 processor"; return 0; }
int ql_cpu_has_avx512_vnni(const char **why_not) { *why_not = "this is not an x86-64 processor"; return 0; }
int ql_cpu_has_avx512_bf16(const char **why_not) { *why_not = "this is not an x86-64 processor"; return 0; }
int ql_cpu_has_amx(const char **why_not) { *why_not = "this is not an x86-64 processor"; return 0; }

#endif
