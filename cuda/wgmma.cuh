/* wgmma.cuh: products of a warpgroup (sm_90a): bfloat16 operands, float32 sums in registers. */
#ifndef QL_CUDA_WGMMA_CUH
#define QL_CUDA_WGMMA_CUH

#include "device.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

#define QL_OUT_4(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
#define QL_OUT_8(x, i) QL_OUT_4(x, i), QL_OUT_4(x, i + 4)
#define QL_OUT_32(x) QL_OUT_8(x, 0), QL_OUT_8(x, 8), QL_OUT_8(x, 16), QL_OUT_8(x, 24)
#define QL_OUT_64(x) QL_OUT_32(x), QL_OUT_8(x, 32), QL_OUT_8(x, 40), QL_OUT_8(x, 48), QL_OUT_8(x, 56)

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending> __device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
/* what the products write is not read before, nor written after, this place */
template <int n> __device__ __forceinline__ void pin(float (&x)[n]) {
#pragma unroll
    for (int i = 0; i < n; i++) { asm volatile("" : "+f"(x[i])::"memory"); }
}
/* descriptor of swizzled rows of 128 bytes; `panel`: bytes from one 64 columns to the next, where they are read across */
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t panel) {
    return (uint64_t)((address & 0x3ffff) >> 4) | (uint64_t)(panel >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

/* out (64, 8 Tokens8) = or += a (64, 16) x (8 Tokens8, 16)^T: a in registers, x in shared memory: low half of its descriptor */
template <int Tokens8> __device__ __forceinline__ void multiply_units(float (&out)[4 * Tokens8], const uint32_t (&a)[4], uint32_t x, int accumulate);

#define QL_MULTIPLY_UNITS(tokens8, outputs, n, list, a0, a1, a2, a3, b, p)                                                       \
    template <> __device__ __forceinline__ void multiply_units<tokens8>(float (&out)[4 * tokens8], const uint32_t (&a)[4], uint32_t x, \
                                                                        int accumulate) {                                          \
        asm volatile("{\n.reg .pred p;\n.reg .b64 d;\nsetp.ne.b32 p, %" #p ", 0;\nmov.b64 d, {%" #b ", 0x40000040};\n"             \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" list "}, {%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, d" \
                     ", p, 1, 1, 0;\n}\n"                                                                                          \
                     : outputs                                                                                                    \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(x), "r"(accumulate));                                       \
    }
#define QL_LIST_4 "%0,%1,%2,%3"
#define QL_LIST_8 QL_LIST_4 ",%4,%5,%6,%7"
#define QL_LIST_16 QL_LIST_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define QL_LIST_32 QL_LIST_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define QL_LIST_24 QL_LIST_16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define QL_LIST_48 QL_LIST_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define QL_LIST_64 QL_LIST_48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define QL_LIST_96 QL_LIST_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define QL_LIST_128 QL_LIST_96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define QL_OUTPUTS_4 QL_OUT_4(out, 0)
#define QL_OUTPUTS_8 QL_OUT_8(out, 0)
#define QL_OUTPUTS_16 QL_OUT_8(out, 0), QL_OUT_8(out, 8)
#define QL_OUTPUTS_24 QL_OUT_8(out, 0), QL_OUT_8(out, 8), QL_OUT_8(out, 16)
#define QL_OUTPUTS_32 QL_OUT_32(out)
#define QL_OUTPUTS_64 QL_OUT_64(out)
#define QL_OUTPUTS_128 QL_OUT_64(out), QL_OUT_64((out + 64))
QL_MULTIPLY_UNITS(1, QL_OUTPUTS_4, 8, QL_LIST_4, 4, 5, 6, 7, 8, 9)
QL_MULTIPLY_UNITS(2, QL_OUTPUTS_8, 16, QL_LIST_8, 8, 9, 10, 11, 12, 13)
QL_MULTIPLY_UNITS(4, QL_OUTPUTS_16, 32, QL_LIST_16, 16, 17, 18, 19, 20, 21)
QL_MULTIPLY_UNITS(6, QL_OUTPUTS_24, 48, QL_LIST_24, 24, 25, 26, 27, 28, 29)
QL_MULTIPLY_UNITS(8, QL_OUTPUTS_32, 64, QL_LIST_32, 32, 33, 34, 35, 36, 37)
QL_MULTIPLY_UNITS(16, QL_OUTPUTS_64, 128, QL_LIST_64, 64, 65, 66, 67, 68, 69)
QL_MULTIPLY_UNITS(32, QL_OUTPUTS_128, 256, QL_LIST_128, 128, 129, 130, 131, 132, 133)

/* out (64, 256) += values (64, 16) x (256, 16)^T, both in shared memory: low halves of their descriptors */
__device__ __forceinline__ void multiply_tiles(float (&out)[128], uint32_t values, uint32_t x) {
    asm volatile("{\n.reg .b64 v;\n.reg .b64 d;\nmov.b64 v, {%128, 0x40000040};\nmov.b64 d, {%129, 0x40000040};\n"
                 "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" QL_LIST_128 "}, v, d, 1, 1, 1, 0, 0;\n}\n"
                 : QL_OUTPUTS_128
                 : "r"(values), "r"(x));
}

#endif

#endif
