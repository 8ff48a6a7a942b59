/* linear_3bit.cu: linear_small.cuh for affine codes of 3 bits. */
#include "linear_family.cuh"

const small_family ql_small_3bit = {2, SMALL_RINGS_OF(codes_3bit, 2, 0), SMALL_RINGS_OF(codes_3bit, 0, 0),
                                     SMALL_REGISTERS_OF(codes_3bit, 2, 1, 16, 2, 2),
                                     SMALL_GROUPS_OF(codes_3bit, 2), SMALL_GROUPS_OF(codes_3bit, 0),
                                     SMALL_WIDES_OF(codes_3bit), small_decoded<codes_3bit>};
