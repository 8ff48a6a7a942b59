/* tensor_map.h: what tensor copies are told of a matrix in device memory (the driver's CUtensorMap, 128 bytes it alone understands). */
#ifndef QL_CUDA_TENSOR_MAP_H
#define QL_CUDA_TENSOR_MAP_H

#include <cuda_bf16.h>
#include <stdint.h>

typedef struct __attribute__((aligned(64))) {
    uint64_t words[16];
} ql_tensor_map;

/* Of x (rows, columns), `line` columns from row to row: boxes of box_rows x 64, rows of 128 bytes swizzled (16-byte chunk c of row r at
 * c ^ (r % 8)), zeros beyond the rows. x and a line are multiples of 16 bytes. 0: the driver refused (kept). (libraries.cu) */
int ql_cuda_tensor_map(ql_tensor_map *map, const __nv_bfloat16 *x, int64_t rows, int64_t columns, int64_t line, int box_rows);

#endif
