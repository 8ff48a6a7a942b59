/* quantizers.h: methods that need nothing but the weight. */
#ifndef QL_QUANT_QUANTIZERS_H
#define QL_QUANT_QUANTIZERS_H

#include "../quantlab.h"

/* flat index of the first NaN or infinity of x (count,), -1 where there is none */
int64_t ql_first_nonfinite(const float *x, int64_t count);

/* Double quantization of block scales (blocks,): codes (blocks,), absmax (ceil(blocks / 256),), one offset;
 * scale(b) is about map[codes[b]] * absmax[b / 256] + offset, with the map (256,) of ql_double_quant_map. */
void ql_double_quantize(uint8_t *codes, float *absmax, float *offset, const float *scales, int64_t blocks);
const float *ql_double_quant_map(void);

#endif
