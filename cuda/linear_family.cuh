/* linear_family.cuh: the instances of linear_small.cuh for one kind of codes; each kind is a file of its own, since they take
 * long to compile. */
#ifndef QL_CUDA_LINEAR_FAMILY_CUH
#define QL_CUDA_LINEAR_FAMILY_CUH

#include "linear_decoded.cuh"
#include "linear_group.cuh"
#include "linear_small.cuh"
#include "linear_wide.cuh"
#include "packed.h"

typedef small_layout (*small_layout_function)(int stages, int record, int units, int cluster, int owned);

typedef struct {
    void (*function)(small_args);
    small_layout_function layout;                /* NULL: a register kernel */
    int tokens, warps, units, finishers, blocks; /* most tokens; register kernel: the most warps, units a warp */
} small_kernel;

typedef struct {
    void (*function)(small_args, ql_tensor_map), (*streams)(small_args, ql_tensor_map); /* streams: activations go by in slots */
    uint32_t (*bytes)(int stages, int record, int units, int slots);                    /* of shared memory */
    int tokens, groups, together;                                                       /* most tokens; warpgroups that multiply; units a copy */
} group_kernel;

typedef struct {
    void (*function)(small_args, ql_tensor_map);
    uint32_t (*bytes)(int stages, int record); /* of shared memory */
    int tokens;                                /* of an item */
} wide_kernel;

/* bytes of shared memory that a block can have on sm_90; stages below which a ring is no ring */
enum { SHARED_MEMORY = 227 << 10, LEAST_STAGES = 2 };
enum { SMALL_RINGS = 5, SMALL_REGISTERS = 4, SMALL_GROUPS = 4, SMALL_WIDES = 2 };

typedef void (*decoded_kernel)(small_args, decoded_work, ql_tensor_map, ql_tensor_map);

typedef struct {
    int parts;                                         /* the number that the first instances are made for */
    small_kernel ring[SMALL_RINGS], any[SMALL_RINGS];  /* any: for any number of parts */
    small_kernel registers[SMALL_REGISTERS];
    group_kernel group[SMALL_GROUPS], group_any[SMALL_GROUPS];
    wide_kernel wide[SMALL_WIDES]; /* for any number of parts, as is: */
    decoded_kernel decoded;
} small_family;

/* float rows (linear_dense.cu); false: too many tokens */
bool ql_cuda_launch_dense(const small_args *a, ql_units_kind kind);
/* more tokens than a group kernel takes (linear_wide.cu); false: no kernel fits */
bool ql_cuda_launch_wide(small_args *a, const wide_kernel *kernels, int columns);
bool ql_cuda_fits_wide(const small_args *a, const wide_kernel *kernels, int columns);
/* as many, with W decoded once (linear_decoded.cu); false: the failure is kept */
bool ql_cuda_launch_decoded(small_args *a, decoded_kernel kernel, int columns);
bool ql_cuda_fits_decoded(const small_args *a, int columns);

extern const small_family ql_small_2bit, ql_small_3bit, ql_small_4bit, ql_small_8bit, ql_small_table;

template <typename Codes, int Parts, int Tokens, int Warps, int Units, int Finishers, int Blocks> constexpr small_kernel make_ring() {
    constexpr int tokens8 = (Tokens + 7) / 8;
    static_assert(Finishers <= SMALL_MAX_FINISHERS, "the norms of several tokens have room for so many warps");
    return {small_ring<Codes, tokens8, Tokens == 1, Parts, Warps, Units, Finishers, Blocks>,
            small_ring_layout<Codes, tokens8, Tokens == 1, Warps, Units>, Tokens, Warps, Units, Finishers, Blocks};
}
template <typename Codes, int Parts, int Tokens, int Units, int MaxWarps, int Blocks> constexpr small_kernel make_register() {
    return {small_register<Codes, 1, Tokens == 1, Parts, Units, MaxWarps, Blocks>, NULL, Tokens, MaxWarps, Units, 0, Blocks};
}

template <typename Codes, int Tokens8, int Groups> uint32_t group_bytes(int stages, int record, int units, int slots) {
    return group_layout_of<Codes, Tokens8, Groups>(stages, record, units, slots).bytes;
}
template <typename Codes, int Parts, int Tokens8, int Groups> constexpr group_kernel make_group() {
    return {small_group<Codes, Tokens8, Parts, Groups, false>, small_group<Codes, Tokens8, Parts, Groups, true>, group_bytes<Codes, Tokens8, Groups>, 8 * Tokens8, Groups, group_together<Codes, Tokens8>()};
}
#define SMALL_GROUPS_OF(Codes, Parts) \
    { make_group<Codes, Parts, 2, 4>(), make_group<Codes, Parts, 4, 3>(), make_group<Codes, Parts, 6, 2>(), make_group<Codes, Parts, 8, 2>() }

template <typename Codes, int Tokens8> uint32_t wide_bytes(int stages, int record) { return wide_layout_of<Codes, Tokens8>(stages, record).bytes; }
template <typename Codes, int Tokens8> constexpr wide_kernel make_wide() {
    return {small_wide<Codes, Tokens8>, wide_bytes<Codes, Tokens8>, 8 * Tokens8};
}
#define SMALL_WIDES_OF(Codes) { make_wide<Codes, 16>(), make_wide<Codes, 32>() }

/* Of those that take the tokens, the first that fits is used. Wide: the first kernel for 2 to 8 tokens has 16 warps and an SM for
 * itself, where a table leaves no room for two blocks. */
#define SMALL_RINGS_OF(Codes, Parts, Wide)                                                                                   \
    {                                                                                                                        \
        make_ring<Codes, Parts, 1, 8, 2, 2, 2>(), make_ring<Codes, Parts, 8, (Wide) ? 16 : 8, 1, 2, (Wide) ? 1 : 2>(),       \
            make_ring<Codes, Parts, 8, 8, 2, 2, 2>(), make_ring<Codes, Parts, 16, 16, 1, 2, 1>(),                            \
            make_ring<Codes, Parts, 16, 8, 2, 2, 1>()                                                                        \
    }
#define SMALL_REGISTERS_OF(Codes, Parts, Units, Warps, Blocks, WideUnits)                                                    \
    {                                                                                                                        \
        make_register<Codes, Parts, 1, Units, Warps, Blocks>(), make_register<Codes, Parts, 8, Units, Warps, Blocks>(),      \
            make_register<Codes, Parts, 1, WideUnits, 32, 1>(), make_register<Codes, Parts, 8, WideUnits, 32, 1>()           \
    }

#endif
