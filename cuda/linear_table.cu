/* linear_table.cu: linear_small.cuh for the codes of NF4 and FP4. */
#include "linear_family.cuh"

const small_family ql_small_table = {2, SMALL_RINGS_OF(codes_table, 2, 1), SMALL_RINGS_OF(codes_table, 0, 1),
                                     SMALL_REGISTERS_OF(codes_table, 2, 2, 16, 1, 3),
                                     SMALL_GROUPS_OF(codes_table, 2), SMALL_GROUPS_OF(codes_table, 0),
                                     SMALL_WIDES_OF(codes_table), small_decoded<codes_table>};
