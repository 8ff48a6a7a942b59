/* fp4.h: bitsandbytes' 4-bit float: bit 3 is the sign, magnitudes 0 .0625 8 12 4 6 2 3 over 12. */
#ifndef QL_FORMAT_FP4_H
#define QL_FORMAT_FP4_H

#include <stdint.h>

#define QL_FP4_VALUES                                                                                              \
    {                                                                                                              \
        0.0f, 0.005208333333f, 0.66666667f, 1.0f, 0.33333333f, 0.5f, 0.16666667f, 0.25f, -0.0f, -0.005208333333f,  \
            -0.66666667f, -1.0f, -0.33333333f, -0.5f, -0.16666667f, -0.25f                                         \
    }

static const float ql_fp4_values[16] = QL_FP4_VALUES;

#endif
