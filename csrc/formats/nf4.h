/* nf4.h: 4-bit NormalFloat (Dettmers et al. 2023, QLoRA, appendix E): the values and the decision thresholds, which
 * are the float32 midpoints of neighbouring values; a tie goes to the lower code. */
#ifndef QL_FORMAT_NF4_H
#define QL_FORMAT_NF4_H

#include <stdint.h>

#define QL_NF4_VALUES                                                                                              \
    {                                                                                                              \
        -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,           \
            -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,        \
            0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f,                 \
            0.7229568362236023f, 1.0f                                                                              \
    }

#define QL_NF4_THRESHOLDS                                                                                          \
    {                                                                                                              \
        -0.8480963706970215f, -0.6106328964233398f, -0.4599952697753906f, -0.33967941999435425f,                   \
            -0.23460739850997925f, -0.13791173696517944f, -0.045525018125772476f, 0.03979014977812767f,            \
            0.120255246758461f, 0.2035212516784668f, 0.2920137643814087f, 0.3893125355243683f,                     \
            0.5016634464263916f, 0.6427869200706482f, 0.8614784479141235f                                          \
    }

static const float ql_nf4_values[16] = QL_NF4_VALUES;
static const float ql_nf4_thresholds[15] = QL_NF4_THRESHOLDS;

/* unit: the element divided by its block's absmax, in [-1, 1] */
static inline uint8_t ql_nf4_encode(float unit) {
    uint8_t code = 0;
    for (int i = 0; i < 15; i++) { code = (uint8_t)(code + (unit > ql_nf4_thresholds[i])); }
    return code;
}

#endif
