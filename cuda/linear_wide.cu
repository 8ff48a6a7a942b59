/* linear_wide.cu: which kernel of linear_wide.cuh takes a product, how it is laid out and launched. */
#include "cuda.h"
#include "linear_family.cuh"

/* a way to launch a kernel of linear_wide.cuh */
typedef struct {
    const wide_kernel *kernel;
    int cluster, clusters, alone, stages;
    size_t shared;
    int64_t cost;
} wide_plan;

/* clocks of an item of which a block multiplies `units`: 128 columns of 128 tokens take 1450, where decoding binds, of 256 tokens 2250, the tensor
 * cores; and to store what it has of the tokens, or to hand it over. As measured on an H100 (cuda/dev/02_linear_wide.cu). */
static int64_t item_cost(const wide_kernel *k, int units, int columns, bool split) {
    enum { BEGIN = 1000, DECODE = 650, MULTIPLY_8 = 50, STORE_8 = 250, HAND_OVER_8 = 330 };
    int64_t tokens8 = k->tokens / 8;
    return BEGIN + (int64_t)units * columns / 128 * (DECODE + MULTIPLY_8 * tokens8) + tokens8 * (split ? HAND_OVER_8 : STORE_8);
}

/* Of kernel k with clusters of `cluster` blocks; the cost is 0 where it does not fit. What there is for all blocks they take alone. */
static wide_plan plan_wide(const wide_kernel *k, const small_args *a, int cluster, int columns) {
    wide_plan plan = {k, cluster, ql_cuda_max_clusters(cluster), 0, 0, 0, 0};
    int items = (a->tiles + WIDE_TILES - 1) / WIDE_TILES * ((a->m + k->tokens - 1) / k->tokens);
    uint32_t without = k->bytes(0, a->record), stage = k->bytes(1, a->record) - without;
    if (plan.clusters == 0 || without + LEAST_STAGES * stage > SHARED_MEMORY) { return plan; }
    int stages = (int)((SHARED_MEMORY - without) / stage);
    plan.stages = stages < WIDE_MAX_STAGES ? stages : WIDE_MAX_STAGES, plan.shared = without + (size_t)plan.stages * stage;
    plan.alone = cluster > 1 ? items / (plan.clusters * cluster) : 0;
    int left = items - plan.alone * plan.clusters * cluster;
    if (plan.alone == 0 && left < plan.clusters) { plan.clusters = left; }
    plan.cost = plan.alone * item_cost(k, a->units, columns, false) +
                (left + plan.clusters - 1) / plan.clusters * item_cost(k, (a->units + cluster - 1) / cluster, columns, cluster > 1);
    return plan;
}

static wide_plan best_plan(const small_args *a, const wide_kernel *kernels, int columns) {
    wide_plan best = {NULL, 0, 0, 0, 0, 0, 0};
    for (int i = 0; i < SMALL_WIDES; i++) {
        for (int cluster = 1; cluster <= WIDE_ROUND && cluster <= a->units; cluster *= 2) {
            wide_plan plan = plan_wide(&kernels[i], a, cluster, columns);
            if (plan.cost > 0 && (best.cost == 0 || plan.cost < best.cost)) { best = plan; }
        }
    }
    return best;
}

bool ql_cuda_fits_wide(const small_args *a, const wide_kernel *kernels, int columns) { return best_plan(a, kernels, columns).cost > 0; }

bool ql_cuda_launch_wide(small_args *a, const wide_kernel *kernels, int columns) {
    ql_tensor_map map;
    wide_plan best = best_plan(a, kernels, columns);
    if (best.cost == 0) { return false; }
    if (!ql_cuda_tensor_map(&map, a->x, a->m, a->x_line, a->x_line, best.kernel->tokens)) { return true; } /* the failure is kept */
    a->stages = best.stages, a->alone = best.alone;
    void *arguments[] = {a, &map};
    ql_cuda_launch_pointers((const void *)best.kernel->function, dim3((unsigned)(best.clusters * best.cluster)), dim3(WIDE_THREADS),
                            best.shared, true, (unsigned)best.cluster, arguments);
    return true;
}
