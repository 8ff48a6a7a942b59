/* roof_amx.c: what the tile unit does at most, see core/roof.h. */
#include "../core/roof.h"
#include "../quantlab.h"
#include "config_amx.h"

static void tile_task(void *context, int64_t task) {
    int64_t rounds = *(const int64_t *)context;
    (void)task;
    tile_config before;
    configure_tiles(&before);
    for (int64_t round = 0; round < rounds; round++) { /* four chains, as many as a product of 2 x 2 tiles has */
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    restore_tiles(&before);
}

int64_t ql_roof_tile_amx(int64_t tasks, int64_t rounds) {
    ql_parallel_for(tasks, tile_task, &rounds);
    return tasks * rounds * 4 * 2 * 16 * 16 * 32;
}
