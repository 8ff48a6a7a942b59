/* linear_4bit.cu: linear_small.cuh for affine codes of 4 bits. */
#include "linear_family.cuh"

const small_family ql_small_4bit = {1, SMALL_RINGS_OF(codes_4bit, 1, 0), SMALL_RINGS_OF(codes_4bit, 0, 0),
                                     SMALL_REGISTERS_OF(codes_4bit, 1, 2, 16, 1, 3),
                                     SMALL_GROUPS_OF(codes_4bit, 1), SMALL_GROUPS_OF(codes_4bit, 0),
                                     SMALL_WIDES_OF(codes_4bit), small_decoded<codes_4bit>};
