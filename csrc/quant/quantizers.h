/* quantizers.h: methods that need nothing but the weight. */
#ifndef QL_QUANT_QUANTIZERS_H
#define QL_QUANT_QUANTIZERS_H

#include "../quantlab.h"

/* Round to nearest: w (n, k) -> codes (n, words of a row), scales (n, groups) float16 values, zeros (n, groups) or NULL
 * (symmetric). All of codes is written. */
void ql_quantize_rtn(uint32_t *codes, float *scales, uint8_t *zeros, const float *w, int64_t n, int64_t k, int bits,
                     int64_t group);

/* flat index of the first NaN or infinity of x (count,), -1 where there is none */
int64_t ql_first_nonfinite(const float *x, int64_t count);

/* Double quantization of block scales (blocks,): codes (blocks,), absmax (ceil(blocks / 256),), one offset;
 * scale(b) is about map[codes[b]] * absmax[b / 256] + offset, with the map (256,) of ql_double_quant_map. */
void ql_double_quantize(uint8_t *codes, float *absmax, float *offset, const float *scales, int64_t blocks);
const float *ql_double_quant_map(void);

#endif
