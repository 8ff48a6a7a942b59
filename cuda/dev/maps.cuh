/* maps.cuh: tensor maps for a stand-alone program, as libraries.cu makes them. */
#ifndef QL_CUDA_MAPS_CUH
#define QL_CUDA_MAPS_CUH

#include "../device.cuh"
#include "../tensor_map.h"

#include <stdio.h>
#include <stdlib.h>

typedef int (*encode_tiled)(ql_tensor_map *, int, uint32_t, void *, const uint64_t *, const uint64_t *, const uint32_t *, const uint32_t *, int, int, int, int);

/* of x (m, k) in boxes of 64 columns of `tokens` rows */
static ql_tensor_map map_of(const bf16 *x, int m, int k, int tokens) {
    void *found = NULL;
    ql_tensor_map map;
    cudaDriverEntryPointQueryResult result;
    uint64_t sizes[] = {(uint64_t)k, (uint64_t)m}, strides[] = {(uint64_t)k * sizeof(bf16)};
    uint32_t box[] = {64, (uint32_t)tokens}, steps[] = {1, 1};
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result) != cudaSuccess ||
        ((encode_tiled)found)(&map, 9, 2, (void *)x, sizes, strides, box, steps, 0, 3, 3, 0) != 0) {
        printf("cuTensorMapEncodeTiled failed\n");
        exit(2);
    }
    return map;
}

#endif
