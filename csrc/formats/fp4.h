/* fp4.h: bitsandbytes' 4-bit float: bit 3 is the sign, magnitudes 0 .0625 8 12 4 6 2 3 over 12. */
#ifndef QL_FORMAT_FP4_H
#define QL_FORMAT_FP4_H

#include <stdint.h>

#define QL_FP4_VALUES                                                                                              \
    {                                                                                                              \
        0.0f, 0.005208333333f, 0.66666667f, 1.0f, 0.33333333f, 0.5f, 0.16666667f, 0.25f, -0.0f, -0.005208333333f,  \
            -0.66666667f, -1.0f, -0.33333333f, -0.5f, -0.16666667f, -0.25f                                         \
    }

/* float32 midpoints of neighbouring values in ascending order, the two zeros being neighbours too; a tie goes to the
 * lower value. So a small positive element takes the negative zero, code 8, as bitsandbytes' CPU path has it. */
#define QL_FP4_THRESHOLDS                                                                                          \
    {                                                                                                              \
        -0.8333333730697632f, -0.5833333730697632f, -0.4166666865348816f, -0.2916666865348816f,                    \
            -0.2083333432674408f, -0.0859375f, -0.0026041667442768812f, 0.0f, 0.0026041667442768812f, 0.0859375f,  \
            0.2083333432674408f, 0.2916666865348816f, 0.4166666865348816f, 0.5833333730697632f,                    \
            0.8333333730697632f                                                                                    \
    }

/* codes in ascending order of their values */
#define QL_FP4_ORDER {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3}

static const float ql_fp4_values[16] = QL_FP4_VALUES;
static const float ql_fp4_thresholds[15] = QL_FP4_THRESHOLDS;
static const uint8_t ql_fp4_order[16] = QL_FP4_ORDER;

/* unit: the element divided by its block's absmax, in [-1, 1] */
static inline uint8_t ql_fp4_encode(float unit) {
    int rank = 0;
    for (int i = 0; i < 15; i++) { rank += unit > ql_fp4_thresholds[i]; }
    return ql_fp4_order[rank];
}

#endif
