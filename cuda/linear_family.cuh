/* linear_family.cuh: the instances of linear_small.cuh for one kind of codes; each kind is a file of its own, since they take
 * long to compile. */
#ifndef QL_CUDA_LINEAR_FAMILY_CUH
#define QL_CUDA_LINEAR_FAMILY_CUH

#include "linear_small.cuh"

typedef small_layout (*small_layout_function)(int stages, int record, int x_units, int cluster, int owned);

typedef struct {
    void (*function)(small_args); /* NULL: there is none */
    small_layout_function layout; /* of a ring kernel */
    int warps, units, tiles, blocks; /* register kernel: the most warps, units a warp */
} small_kernel;

enum { SMALL_BATCHES = 5 }; /* 1, up to 8, 16, 32, 64 tokens */

typedef struct {
    int parts;                                                 /* the number that the first instances are made for */
    small_kernel ring[SMALL_BATCHES], ring_any[SMALL_BATCHES]; /* ring_any: any number of parts */
    small_kernel registers[2], registers_wide[2];              /* 1, up to 8 tokens; wide: 32 warps a block */
} small_family;

extern const small_family ql_small_2bit, ql_small_3bit, ql_small_4bit, ql_small_8bit, ql_small_table;

template <typename Codes, int Parts, int Tokens8, bool Single, int Warps, int Units, int Tiles, int Blocks> constexpr small_kernel make_ring() {
    return {small_ring<Codes, Tokens8, Single, Parts, Warps, Units, Tiles, Blocks>,
            small_ring_layout<Codes, Tokens8, Single, Warps, Units, Tiles>, Warps, Units, Tiles, Blocks};
}
template <typename Codes, int Parts, bool Single, int Units, int MaxWarps, int Blocks> constexpr small_kernel make_register() {
    return {small_register<Codes, 1, Single, Parts, Units, MaxWarps, Blocks>, NULL, MaxWarps, Units, 1, Blocks};
}

#define SMALL_RINGS(Codes, Parts)                                                                            \
    {                                                                                                        \
        make_ring<Codes, Parts, 1, true, 8, 1, 1, 2>(), make_ring<Codes, Parts, 1, false, 8, 1, 1, 2>(),     \
            make_ring<Codes, Parts, 2, false, 8, 1, 2, 1>(), make_ring<Codes, Parts, 4, false, 8, 1, 2, 1>(), \
            make_ring<Codes, Parts, 8, false, 8, 1, 1, 1>()                                                  \
    }
#define SMALL_REGISTERS(Codes, Parts, Units, Warps, Blocks) \
    { make_register<Codes, Parts, true, Units, Warps, Blocks>(), make_register<Codes, Parts, false, Units, Warps, Blocks>() }

#endif
