/* linear_2bit.cu: linear_small.cuh for affine codes of 2 bits. */
#include "linear_family.cuh"

const small_family ql_small_2bit = {4, SMALL_RINGS_OF(codes_2bit, 4, 0), SMALL_RINGS_OF(codes_2bit, 0, 0),
                                     SMALL_REGISTERS_OF(codes_2bit, 4, 1, 16, 2, 2),
                                     SMALL_GROUPS_OF(codes_2bit, 4), SMALL_GROUPS_OF(codes_2bit, 0),
                                     SMALL_WIDES_OF(codes_2bit), small_decoded<codes_2bit>};
