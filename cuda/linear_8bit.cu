/* linear_8bit.cu: linear_small.cuh for affine and int8 codes of 8 bits. */
#include "linear_family.cuh"

const small_family ql_small_8bit = {1, SMALL_RINGS_OF(codes_8bit, 1, 0), SMALL_RINGS_OF(codes_8bit, 0, 0),
                                     SMALL_REGISTERS_OF(codes_8bit, 1, 2, 16, 1, 3),
                                     SMALL_GROUPS_OF(codes_8bit, 1), SMALL_GROUPS_OF(codes_8bit, 0),
                                     SMALL_WIDES_OF(codes_8bit), small_decoded<codes_8bit>};
