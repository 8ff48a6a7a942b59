/* units.cuh: the packed layout of a quantized weight on the device, and its decoding into fragments of mma.m16n8k16.
 *
 * A unit is 8 rows x `columns` columns (128; 256 for 2 and 3 bits), a multiple of 16: its mma steps. Lane l of a warp, g = l / 4,
 * t = l % 4, holds of step j four columns of row g from 32 (j / 2) + 8 t + 4 (j % 2) on: the pairs (0, 1) and (2, 3) are a[0] and
 * a[2] of the fragment where the unit is the upper half of 16 rows, a[1] and a[3] where it is the lower. So a lane takes 16
 * consecutive bytes of its row of activations for two steps (the order of columns in a product is free): b[0] and b[1] of the
 * first, then of the second.
 *
 * In memory a unit is a record: codes, `chunks` times 512 bytes of 16 bytes a lane (3 bits: and 256 bytes, 8 a lane), then `parts`
 * vectors of 8 float16 scales (one a row), each for columns / parts columns, then, where the weight has zero points, as many
 * vectors of 8 bfloat16 (zero plus the format's offset). The records of 8 rows follow one another along k, then the next 8 rows.
 * Rows are padded to 16, columns to the unit: there scales are 0, and the activations too.
 * The float16 scales are the weight's times a power of two, the same for the whole weight, which keeps them away from the ends
 * of the range of float16; the inverse of it is `factor`.
 *
 * Words of a lane: bits are so placed that a shift and a mask give two codes, one in each half of a word:
 *   4 bits  word j / 2, pair p of step j: i = 2 (j % 2) + p, first code in bits 4 i, second in bits 16 + 4 i
 *   8 bits  word j, pair p: first in byte p, second in byte 2 + p; codes with the top bit inverted
 *   2 bits  word j / 4, i = 2 (j % 4) + p: bits 2 i and 16 + 2 i
 *   3 bits  i = 2 j + p - 2: word i / 5, bits 3 (i % 5) and 16 + 3 (i % 5), five to a word; step 0 has what is left of the words: bit b
 *           of its pair p is bit 15 and bit 31 of word 3 p + b
 *   tables  word j / 2, byte 2 (j % 2) + p: first code in the low nibble, second in the high */
#ifndef QL_CUDA_UNITS_CUH
#define QL_CUDA_UNITS_CUH

#include "pipeline.cuh"

enum { UNIT_ROWS = 8, TILE_ROWS = 16, STEP = 16, TWO_STEPS = 32, CHUNK = 512, TABLE_BYTES = 256 * WARP * 4 };

/* (a & b) | c */
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}
__device__ __forceinline__ uint32_t sub_bf16x2(uint32_t a, uint32_t b) {
    __nv_bfloat162 x, y;
    memcpy(&x, &a, 4);
    memcpy(&y, &b, 4);
    x = __hsub2(x, y);
    memcpy(&a, &x, 4);
    return a;
}
__device__ __forceinline__ uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

#define QL_BF16X2_128 0x43004300u

/* A field of both halves, from bit `at` on, as values less the offset. Under 128 a bfloat16 has seven bits: a field there stays where it is, a multiple
 * of 2^place, and is divided by as much, exactly, as the offset is taken away. That spares two shifts of three. at: known when this is compiled */
template <int Bits> __device__ __forceinline__ uint32_t field_of(uint32_t w, int at, uint32_t offset) {
    int place = at % 6;
    uint32_t v = and_or(w >> (at - place), (((1u << Bits) - 1) << place) * 0x10001u, QL_BF16X2_128);
    if (place == 0) { return sub_bf16x2(v, offset); }
    uint32_t less = (0x4280u | (128 - (256 >> place))) * 0x10001u; /* 128 - 128 / 2^place */
    return fma_bf16x2(v, ((127u - place) << 7) * 0x10001u, sub_bf16x2(less, offset));
}

/* Each struct of codes: columns of a unit, words a lane holds of it, bytes of codes, and
 * pair(words, j, p, offset, table): two neighbouring values of step j. offset: two bfloat16, what `zero` adds up to. table: address. */
struct codes_4bit {
    enum { columns = 128, words = 4, bytes = CHUNK, table = 0 };
    static constexpr uint32_t symmetric = 0x43084308u; /* 128 + 8 */
    static __device__ __forceinline__ uint32_t pair(const uint32_t *w, int j, int p, uint32_t offset, uint32_t) {
        return sub_bf16x2(and_or(w[j / 2] >> (4 * (2 * (j % 2) + p)), 0x000f000fu, QL_BF16X2_128), offset);
    }
};
struct codes_8bit { /* 7 bits under 128, and -128 where the inverted top bit is set; offset: zero alone */
    enum { columns = 128, words = 8, bytes = 2 * CHUNK, table = 0 };
    static constexpr uint32_t symmetric = 0x43004300u;
    static __device__ __forceinline__ uint32_t pair(const uint32_t *w, int j, int p, uint32_t offset, uint32_t) {
        uint32_t low = and_or(w[j] >> (8 * p), 0x007f007fu, QL_BF16X2_128);
        uint32_t top = (p == 0 ? w[j] << 7 : w[j] >> 1) & 0x40004000u; /* 2 or 0 */
        return fma_bf16x2(top, 0xc280c280u, sub_bf16x2(low, offset));  /* -64 */
    }
};
struct codes_2bit {
    enum { columns = 256, words = 4, bytes = CHUNK, table = 0 };
    static constexpr uint32_t symmetric = 0x43024302u;
    static __device__ __forceinline__ uint32_t pair(const uint32_t *w, int j, int p, uint32_t offset, uint32_t) {
        return field_of<2>(w[j / 4], 2 * (2 * (j % 4) + p), offset);
    }
};
struct codes_3bit {
    enum { columns = 256, words = 6, bytes = CHUNK + CHUNK / 2, table = 0 };
    static constexpr uint32_t symmetric = 0x43044304u;
    static __device__ __forceinline__ uint32_t pair(const uint32_t *w, int j, int p, uint32_t offset, uint32_t) {
        int i = 2 * j + p - 2;
        if (i >= 0) { return field_of<3>(w[i / 5], 3 * (i % 5), offset); }
        uint32_t v = and_or(w[3 * p] >> 15, 0x00010001u, QL_BF16X2_128);
        v = and_or(w[3 * p + 1] >> 14, 0x00020002u, v);
        return sub_bf16x2(and_or(w[3 * p + 2] >> 13, 0x00040004u, v), offset);
    }
};
struct codes_table { /* NF4, FP4: in shared memory, a bfloat16 pair for each byte and lane, so no two lanes meet in a bank */
    enum { columns = 128, words = 4, bytes = CHUNK, table = 1 };
    static constexpr uint32_t symmetric = 0;
    static __device__ __forceinline__ uint32_t pair(const uint32_t *w, int j, int p, uint32_t, uint32_t table) {
        int shift = 8 * (2 * (j % 2) + p) - 7;
        uint32_t q = shift < 0 ? w[j / 2] << 7 : w[j / 2] >> shift;
        return load_shared<uint32_t>(and_or(q, 0x7f80u, (threadIdx.x % WARP) * 4) + table);
    }
};
/* bytes of a record with `parts` scales a row */
template <typename Codes> constexpr int record_bytes(int parts, int zeros) {
    return Codes::bytes + parts * 16 * (zeros ? 2 : 1);
}

/* the words of this lane from a record in shared memory */
template <typename Codes> __device__ __forceinline__ void load_words(uint32_t (&w)[Codes::words], uint32_t record, int lane) {
#pragma unroll
    for (int i = 0; i < Codes::words / 4; i++) {
        uint4 v = load_shared<uint4>(record + i * CHUNK + lane * 16);
        w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
    }
    if constexpr (Codes::words % 4 == 2) {
        uint2 v = load_shared<uint2>(record + Codes::words / 4 * CHUNK + lane * 8);
        w[Codes::words - 2] = v.x, w[Codes::words - 1] = v.y;
    }
}
/* the same from global memory; read once, so it takes no room in L1 */
template <typename Codes> __device__ __forceinline__ void load_words(uint32_t (&w)[Codes::words], const uint8_t *record, int lane) {
#pragma unroll
    for (int i = 0; i < Codes::words / 4; i++) {
        const uint8_t *from = record + i * CHUNK + lane * 16;
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(w[4 * i]), "=r"(w[4 * i + 1]), "=r"(w[4 * i + 2]), "=r"(w[4 * i + 3])
                     : "l"(from));
    }
    if constexpr (Codes::words % 4 == 2) {
        const uint8_t *from = record + Codes::words / 4 * CHUNK + lane * 8;
        asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(w[Codes::words - 2]), "=r"(w[Codes::words - 1]) : "l"(from));
    }
}

__device__ __forceinline__ float half_bits_to_float(uint32_t bits) {
    float v;
    asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"((uint16_t)bits));
    return v;
}

/* c += a b; not volatile, unlike mma_bf16: the compiler may interleave it with the decoding of the next */
__device__ __forceinline__ void mma_units(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif
