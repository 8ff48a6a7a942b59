/* packed.h: the packed copy of a weight on the device (layout: units.cuh), as the host sees it; of a float weight, its own rows. */
#ifndef QL_CUDA_PACKED_H
#define QL_CUDA_PACKED_H

#include "../csrc/quantlab.h"

/* which decoding of units.cuh, or rows as they are stored (linear_dense.cu): a unit is then 8 whole rows */
typedef enum {
    QL_UNITS_2BIT,
    QL_UNITS_3BIT,
    QL_UNITS_4BIT,
    QL_UNITS_8BIT,
    QL_UNITS_TABLE,
    QL_ROWS_F32,
    QL_ROWS_F16,
    QL_ROWS_BF16
} ql_units_kind;

typedef struct {
    ql_units_kind kind;
    const uint8_t *records; /* unit (r, b) at (r * units + b) * record; rows8 * units of them */
    const float *factor;    /* what sums are multiplied by */
    int rows8, units;       /* units of 8 rows, an even number; units along k */
    int columns, record, parts, zeros;
    void *memory; /* that unpack releases */
} ql_packed;

/* NULL where the weight has none: groups that are not multiples of 32 columns, floats that do not come in whole vectors */
static inline const ql_packed *ql_packed_of(const ql_weight *w) { return (const ql_packed *)w->packed; }

#endif
