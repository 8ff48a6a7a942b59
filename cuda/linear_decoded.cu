/* linear_decoded.cu: how the kernel of linear_decoded.cuh is laid out and launched. */
#include "linear.cuh"
#include "linear_family.cuh"

static_assert((int)DECODED_BYTES <= (int)SHARED_MEMORY && DECODED_RING % 1024 == 0, "stages are swizzled by their address");
static_assert(2 * WIDE_TILES * WIDE_ROUND * (int)CHUNK <= 2 * (int)DECODED_PLACE, "what wide_finish_any turns stands where lines do");

static int ceiling(int a, int b) { return (a + b - 1) / b; }

/* (rows, columns) of all parts */
static int64_t decoded_bytes(const small_args *a, int columns) { return (int64_t)a->tiles * TILE_ROWS * a->units * columns * (int64_t)sizeof(bf16); }

bool ql_cuda_fits_decoded(const small_args *a, int columns) {
    return !a->adapted && decoded_bytes(a, columns) <= QL_DECODED_BYTES && ql_cuda_max_clusters(DECODED_BLOCKS) > 0;
}

bool ql_cuda_launch_decoded(small_args *a, decoded_kernel kernel, int columns) {
    int across = ceiling(a->m, 8 * DECODED_TOKENS8), width = across < DECODED_BAND ? across : DECODED_BAND, clusters = ql_cuda_max_clusters(DECODED_BLOCKS);
    int64_t pairs = (int64_t)ceiling(a->tiles, DECODED_BLOCKS * WIDE_TILES) * across;
    if (pairs < clusters) { clusters = (int)pairs; }
    ql_tensor_map x, values;
    decoded_work work;
    work.counters = 2 + ceiling(a->tiles, WIDE_TILES) * ceiling(a->x_line, DECODED_CHUNK);
    work.group = ceiling(clusters, width) * DECODED_BLOCKS * WIDE_TILES;
    work.values = (bf16 *)ql_cuda_scratch(QL_SCRATCH_WEIGHT, (size_t)decoded_bytes(a, columns));
    work.claimed = (uint32_t *)ql_cuda_scratch(QL_SCRATCH_COUNTERS, (size_t)work.counters * sizeof(uint32_t));
    if (work.values == NULL || work.claimed == NULL) { return false; }
    work.done = work.claimed + 1, work.ready = work.claimed + 2;
    if (!ql_cuda_tensor_map(&x, a->x, a->m, a->x_line, a->x_line, 8 * DECODED_TOKENS8 / DECODED_BLOCKS) ||
        !ql_cuda_tensor_map(&values, work.values, (int64_t)a->tiles * TILE_ROWS, a->x_line, a->x_line, DECODED_ROWS)) {
        return false;
    }
    void *arguments[] = {a, &work, &x, &values};
    ql_cuda_launch_pointers((const void *)kernel, dim3((unsigned)(clusters * DECODED_BLOCKS)), dim3(WIDE_THREADS), DECODED_BYTES, true, DECODED_BLOCKS,
                            arguments);
    return true;
}
