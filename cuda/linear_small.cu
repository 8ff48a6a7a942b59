/* linear_small.cu: which kernel of linear_small.cuh takes a product of a few tokens, how it is laid out and launched. */
#include "linear.cuh"
#include "linear_family.cuh"

#include <string.h>

enum { SHARED_MEMORY = 227 << 10, RESERVED = 1 << 10, LEAST_STAGES = 3 };

static const small_family *family_of(const ql_packed *p) {
    switch (p->kind) {
    case QL_UNITS_2BIT: return &ql_small_2bit;
    case QL_UNITS_3BIT: return &ql_small_3bit;
    case QL_UNITS_4BIT: return &ql_small_4bit;
    case QL_UNITS_8BIT: return &ql_small_8bit;
    default: return &ql_small_table;
    }
}

/* products that one launch can hold beside one another */
static bool alike(const ql_weight *a, const ql_weight *b) {
    const ql_packed *p = ql_packed_of(a), *q = ql_packed_of(b);
    return p->kind == q->kind && p->units == q->units && p->record == q->record && p->parts == q->parts && p->zeros == q->zeros &&
           a->k == b->k && a->perm == b->perm && (p->kind != QL_UNITS_TABLE || a->format == b->format);
}

/* product i as a part; false where its rows cannot stand in pairs */
static bool make_part(small_part *part, const ql_product *product, const ql_rotation *rotation) {
    const ql_packed *p = ql_packed_of(product->w);
    int64_t line = (int64_t)p->units * p->record;
    memset(part, 0, sizeof *part);
    part->upper = p->records, part->lower = p->records + line;
    part->factor = part->factor_lower = p->factor;
    part->rows = product->rows, part->out = product->out, part->n = (int)product->w->n, part->output = (int)product->output;
    part->tiles = p->rows8 / 2, part->divisor = 1, part->multiplier = 2, part->lower_rows = UNIT_ROWS;
    if (product->output == QL_OUT_SWIGLU) {
        const ql_packed *up = ql_packed_of(product[1].w);
        if (product[1].w->n != product->w->n) { return false; }
        part->lower = up->records, part->factor_lower = up->factor;
        part->tiles = p->rows8, part->multiplier = 1, part->lower_rows = 0;
    }
    if (product->output == QL_OUT_ROPE) {
        int64_t d = rotation->d;
        if (d % TILE_ROWS != 0 || product->w->n % d != 0) { return false; }
        part->divisor = (int)(d / TILE_ROWS), part->multiplier = (int)(d / UNIT_ROWS);
        part->lower = p->records + d / TILE_ROWS * line, part->lower_rows = (int)(d / 2), part->rotate = 1;
        part->tiles = (int)(product->w->n / TILE_ROWS);
    }
    return true;
}

static int batch_of(int64_t m) { return m == 1 ? 0 : m <= 8 ? 1 : m <= 16 ? 2 : m <= 32 ? 3 : 4; }
static int tokens8_of(int batch) { return batch <= 1 ? 1 : 1 << (batch - 1); }

/* The smallest cluster with which the activations leave room for a few stages: true where there is one. */
static bool launch_ring(const small_kernel *k, small_args *a, int columns) {
    int groups = (a->tiles + k->tiles - 1) / k->tiles, multiprocessors = ql_cuda_multiprocessors();
    size_t room = SHARED_MEMORY / k->blocks - RESERVED, stage = (size_t)k->tiles * 2 * k->warps * k->units * a->record;
    for (int cluster = 1; cluster <= 8 && cluster <= a->units; cluster *= 2) {
        int most = (a->units + cluster - 1) / cluster, wanted = multiprocessors * k->blocks / cluster;
        int clusters = wanted < groups ? wanted : groups;
        int owned = cluster > 1 ? ((groups + clusters - 1) / clusters + cluster - 1) / cluster : 0;
        if (owned > SMALL_MAX_OWNED) { continue; }
        size_t without = k->layout(0, a->record, most * (columns / 32), cluster, owned).bytes;
        if (without + LEAST_STAGES * stage > room) { continue; }
        int stages = (int)((room - without) / stage);
        a->stages = stages < SMALL_MAX_STAGES ? stages : SMALL_MAX_STAGES;
        void *arguments[] = {a};
        ql_cuda_launch_pointers((const void *)k->function, dim3((unsigned)(clusters * cluster)), dim3((unsigned)(k->warps + 2) * WARP),
                                without + (size_t)a->stages * stage, true, (unsigned)cluster, arguments);
        return true;
    }
    return false;
}

/* one block a tile where a warp can hold its share of K */
static bool launch_registers(const small_kernel *k, small_args *a, bool table) {
    int warps = (a->units + k->units - 1) / k->units;
    if (k->function == NULL || warps > k->warps) { return false; }
    void *arguments[] = {a};
    size_t shared = 2 * (size_t)warps * CHUNK + (table ? TABLE_BYTES : 0);
    ql_cuda_launch_pointers((const void *)k->function, dim3((unsigned)a->tiles), dim3((unsigned)warps * WARP), shared, true, 1, arguments);
    return true;
}

static bool launch(small_args *a, const ql_packed *p, int batch) {
    const small_family *family = family_of(p);
    bool exact = p->parts == family->parts, table = p->kind == QL_UNITS_TABLE;
    if (exact && batch <= 1 && a->tiles <= 2 * ql_cuda_multiprocessors() && launch_registers(&family->registers[batch], a, table)) { return true; }
    if (ql_cuda_capability() >= 90) { return launch_ring(exact ? &family->ring[batch] : &family->ring_any[batch], a, p->columns); }
    if (!exact || batch > 1) { return false; }
    return launch_registers(&family->registers[batch], a, table) || launch_registers(&family->registers_wide[batch], a, table);
}

/* products [0, count) in one launch */
static bool launch_products(const ql_product *products, int count, const ql_activations *x, const ql_rotation *rotation, int64_t m) {
    const ql_weight *w = products[0].w;
    const ql_packed *p = ql_packed_of(w);
    int batch = batch_of(m), parts = 0;
    small_args a;
    memset(&a, 0, sizeof a);
    for (int i = 0; i < count; i++) {
        if (!make_part(&a.part[parts], &products[i], rotation)) { return false; }
        a.tiles += a.part[parts++].tiles;
        i += products[i].output == QL_OUT_SWIGLU;
    }
    a.units = p->units, a.x_units = p->units * (p->columns / 32), a.record = p->record, a.parts = p->parts, a.zeros = p->zeros;
    a.zeros_table = p->values, a.m = (int)m;
    if (rotation != NULL) { a.cos = rotation->cos, a.sin = rotation->sin, a.positions = rotation->positions, a.d = (int)rotation->d; }
    size_t bytes = (size_t)a.x_units * 64 * (m == 1 ? 1 : 8 * (size_t)tokens8_of(batch));
    uint8_t *blocks = (uint8_t *)ql_cuda_scratch(QL_SCRATCH_ACTIVATION, bytes);
    if (blocks == NULL) { return true; }
    a.x = blocks;
    ql_cuda_activations_blocks(blocks, x, w->perm, m, m == 1 ? 1 : 8 * tokens8_of(batch), w->k, a.x_units);
    return launch(&a, p, batch);
}

bool ql_cuda_linear_small(const ql_product *products, int count, const ql_activations *x, const ql_rotation *rotation, int64_t m) {
    bool together = true;
    if (m < 1 || m > QL_SMALL_TOKENS) { return false; }
    for (int i = 0; i < count; i++) {
        if (products[i].w->packed == NULL) { return false; }
        together = together && alike(products[0].w, products[i].w);
    }
    if (together) { return launch_products(products, count, x, rotation, m); }
    for (int i = 0; i < count; i++) {
        if (products[i].output == QL_OUT_SWIGLU) { return false; }
    }
    for (int i = 0; i < count; i++) {
        if (!launch_products(products + i, 1, x, rotation, m)) { return false; }
    }
    return true;
}
