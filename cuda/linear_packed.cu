/* linear_packed.cu: which kernel takes a product on the packed weight: of linear_small.cuh and linear_group.cuh a few tokens, how they are laid out
 * and launched; of linear_wide.cuh and linear_decoded.cuh more. */
#include "linear.cuh"
#include "linear_family.cuh"

#include "../csrc/formats/nf4.h"

#include <string.h>

/* RING_TOKENS, GROUP_TOKENS: the most that such kernels take. PLAIN_TOKENS: more of them are handed from product to product in the order of the
 * fragments where linear_group.cuh can be used; fewer in some cases (ql_cuda_takes_ordered). */
enum { RESERVED = 1 << 10, PLAIN_TOKENS = 8, RING_TOKENS = 16, GROUP_TOKENS = 64 };

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
    part->term[0] = part->term[1] = product->term;
    part->ordered = product->ordered;
    part->tiles = p->rows8 / 2, part->divisor = 1, part->multiplier = 2, part->lower_rows = UNIT_ROWS;
    if (product->output == QL_OUT_SWIGLU) {
        const ql_packed *up = ql_packed_of(product[1].w);
        if (product[1].w->n != product->w->n) { return false; }
        part->lower = up->records, part->factor_lower = up->factor, part->term[1] = product[1].term;
        part->tiles = p->rows8, part->multiplier = 1, part->lower_rows = 0;
    }
    if (product->output == QL_OUT_ROPE) {
        int64_t d = rotation->d;
        if (d % TILE_ROWS != 0 || product->w->n % d != 0) { return false; }
        part->divisor = (int)(d / TILE_ROWS), part->multiplier = (int)(d / UNIT_ROWS);
        part->lower = p->records + d / TILE_ROWS * line, part->lower_rows = (int)(d / 2);
        part->tiles = (int)(product->w->n / TILE_ROWS);
    }
    return true;
}

/* ---- launches ----------------------------------------------------------------------------------------------------- */

/* Blocks of this kernel an SM, and how many of this size an SM should hold, the next kernel's among them, whose weights are then
 * on their way before this one ends. One block where an SM has few bytes, as measured on an H100 (cuda/dev/README.md). */
typedef struct {
    int per_sm, resident;
} residence;

static residence residence_of(const small_kernel *k, const small_args *a) {
    int64_t bytes_an_sm = (int64_t)a->tiles * a->units * a->record * 2 / ql_cuda_multiprocessors();
    residence r = {k->blocks > 1 && bytes_an_sm > (k->tokens == 1 ? 160 : 120) << 10 ? 2 : 1, 1};
    r.resident = k->blocks == 1 ? 1 : k->tokens == 1 ? r.per_sm + 1 : 2;
    return r;
}

/* Shared memory and stages of kernel k with blocks of `room` bytes: false where they do not fit. */
static bool fit_ring(const small_kernel *k, small_args *a, int cluster, int clusters, int room, size_t *shared) {
    int most = (a->units + cluster - 1) / cluster, stage = 2 * k->warps * k->units * a->record;
    int owned = cluster > 1 ? ((a->tiles + clusters - 1) / clusters + cluster - 1) / cluster : 0;
    if (owned > SMALL_MAX_OWNED) { return false; }
    int without = (int)k->layout(0, a->record, most, cluster, owned).bytes;
    if (without + LEAST_STAGES * stage > room) { return false; }
    a->stages = (room - without) / stage;
    a->stages = a->stages < SMALL_MAX_STAGES ? a->stages : SMALL_MAX_STAGES;
    *shared = (size_t)without + (size_t)a->stages * stage;
    return true;
}

static bool launch_ring(const small_kernel *k, small_args *a, int cluster) {
    residence best = residence_of(k, a), tries[] = {best, {best.per_sm, best.per_sm}, {1, 1}};
    for (residence r : tries) {
        int wanted = ql_cuda_multiprocessors() * r.per_sm / cluster, clusters = wanted < a->tiles ? wanted : a->tiles;
        size_t shared = 0;
        if (!fit_ring(k, a, cluster, clusters, SHARED_MEMORY / r.resident - RESERVED, &shared)) { continue; }
        void *arguments[] = {a};
        ql_cuda_launch_pointers((const void *)k->function, dim3((unsigned)(clusters * cluster)),
                                dim3((unsigned)(k->warps + 1 + k->finishers) * WARP), shared, true, (unsigned)cluster, arguments);
        return true;
    }
    return false;
}

/* one block a tile where a warp can hold its share of K */
static bool launch_registers(const small_kernel *k, small_args *a, bool table) {
    int warps = (a->units + k->units - 1) / k->units;
    if (warps > k->warps || a->x == NULL) { return false; }
    void *arguments[] = {a};
    size_t shared = 2 * (size_t)warps * CHUNK + (table ? TABLE_BYTES : 0);
    ql_cuda_launch_pointers((const void *)k->function, dim3((unsigned)a->tiles), dim3((unsigned)warps * WARP), shared, true, 1, arguments);
    return true;
}

/* whether this build and device have the kernels of linear_group.cuh */
static bool has_groups(void) {
    if (ql_cuda_capability() != 90) { return false; }
    static const bool built = ql_cuda_is_built((const void *)ql_small_4bit.group[0].function);
    return built;
}

int ql_cuda_norm_ahead_tokens(void) { return has_groups() ? GROUP_TOKENS : ql_cuda_capability() < 90 ? 0 : RING_TOKENS; }
bool ql_cuda_orders(int64_t t) { return t > PLAIN_TOKENS && has_groups(); }

/* a way to launch a kernel of linear_group.cuh */
typedef struct {
    const group_kernel *kernel;
    int cluster, clusters;
    int slots, stages, ahead; /* slots: 0 where all activations stay */
    size_t shared;
    int64_t cost;
} group_plan;

/* Stages of weights that fit beside the activations of `units` units, or beside a few slots of them. Activations that go by are waited for again and
 * again: weights that a block asks for far ahead would stand in their way. Bytes of a stage; 0: it does not fit. */
static int fit_group(group_plan *plan, const small_args *a, int units, int columns) {
    enum { STREAM_BYTES = 64 << 10, SLOT_COLUMNS = 512, LEAST_SLOTS = 3 }; /* as measured; a slot is free when the unit behind it begins: two at least */
    const group_kernel *k = plan->kernel;
    if (plan->slots > 0) { plan->slots = SLOT_COLUMNS / columns > LEAST_SLOTS ? SLOT_COLUMNS / columns : LEAST_SLOTS; }
    uint32_t before = k->bytes(0, a->record, units, plan->slots), stage_bytes = k->bytes(1, a->record, units, plan->slots) - before;
    if (before + LEAST_STAGES * stage_bytes > SHARED_MEMORY) { return 0; }
    int without = (int)before, stage = (int)stage_bytes, stages = (SHARED_MEMORY - without) / stage;
    int most = plan->slots > 0 ? STREAM_BYTES / stage : GROUP_MAX_STAGES;
    most = most < LEAST_STAGES ? LEAST_STAGES : most < GROUP_MAX_STAGES ? most : GROUP_MAX_STAGES;
    plan->stages = stages < most ? stages : most, plan->shared = (size_t)without + (size_t)plan->stages * stage;
    return stage;
}

/* Stages that are asked for before the activations, which would wait behind them: those of an item, two at least where there are many items, or, where
 * there is no other, as many bytes as memory brings until they are there. From MANY_TOKENS on several items gain nothing by it. All as measured on an H100. */
static int stages_ahead(const group_plan *plan, int stage, int steps, int64_t items) {
    enum { AHEAD_BYTES = 36 << 10, MANY_TOKENS = 32, MANY_ITEMS = 4 };
    const group_kernel *k = plan->kernel;
    int ahead = items > 1 ? (steps + k->together - 1) / k->together : AHEAD_BYTES / stage, least = items > MANY_ITEMS ? 2 : 1;
    if (items > 1 && k->tokens > MANY_TOKENS) { return plan->stages; }
    ahead = ahead < least ? least : ahead;
    return ahead < plan->stages ? ahead : plan->stages;
}

/* Of kernel k with clusters of `cluster` blocks; cost 0 where it does not fit. A block brings in the weights of its items, and
 * activations, which come from L2 and count half; an item that is handed over costs as much as ITEM_BYTES of weights. As measured on an
 * H100 (cuda/dev). Streams: activations go by, once: only where no cluster has a second item. */
static group_plan plan_group(const group_kernel *k, const small_args *a, int cluster, bool streams, int columns) {
    enum { ITEM_BYTES = 48 << 10 };
    group_plan plan = {k, cluster, 0, streams, 0, 0, 0, 0};
    int items = (a->tiles + GROUP_WARPS - 1) / GROUP_WARPS, units = (a->units + cluster - 1) / cluster, most = ql_cuda_max_clusters(cluster);
    plan.clusters = most < items ? most : items;
    if (plan.clusters == 0 || (streams && (items > plan.clusters || !a->ordered))) { return plan; }
    int stage = fit_group(&plan, a, units, columns), steps = (units + k->groups - 1) / k->groups;
    if (stage == 0) { return plan; }
    int64_t rounds = (items + plan.clusters - 1) / plan.clusters, weights = (int64_t)steps * k->groups * a->record * 2 * GROUP_WARPS;
    plan.ahead = stages_ahead(&plan, stage, steps, rounds);
    plan.cost = rounds * (weights + ITEM_BYTES) + (int64_t)units * columns * k->tokens;
    return plan;
}

/* of the kernels for the fewest tokens that are enough, the cheapest way; cost 0: there is none */
static group_plan best_plan(const small_args *a, const group_kernel *kernels, int columns) {
    group_plan best = {NULL, 0, 0, 0, 0, 0, 0, 0};
    for (int i = 0; i < SMALL_GROUPS && has_groups(); i++) {
        if (a->m > kernels[i].tokens || (best.cost > 0 && kernels[i].tokens > best.kernel->tokens)) { continue; }
        for (int cluster = 2; cluster <= 8 && cluster <= a->units; cluster *= 2) {
            for (bool streams : {false, true}) {
                group_plan plan = plan_group(&kernels[i], a, cluster, streams, columns);
                if (plan.cost > 0 && (best.cost == 0 || plan.cost < best.cost)) { best = plan; }
            }
        }
    }
    return best;
}

static bool launch_groups(small_args *a, const group_kernel *kernels, int columns) {
    group_plan best = best_plan(a, kernels, columns);
    if (best.cost == 0) { return false; }
    ql_tensor_map map = {}; /* of columns in order */
    if (a->ordered && !ql_cuda_tensor_map(&map, a->x, a->m, a->x_line, a->x_line, best.kernel->tokens)) { return true; } /* the failure is kept */
    a->stages = best.stages, a->slots = best.slots, a->ahead = best.ahead;
    void *arguments[] = {a, &map};
    auto function = best.slots > 0 ? best.kernel->streams : best.kernel->function;
    ql_cuda_launch_pointers((const void *)function, dim3((unsigned)(best.clusters * best.cluster)),
                            dim3((unsigned)(best.kernel->groups + 1) * GROUP_THREADS), best.shared, true, (unsigned)best.cluster, arguments);
    return true;
}

/* a kernel for 8 tokens takes 2 to 8, one for 16 takes 9 to 16 */
static bool takes(const small_kernel *k, int m) { return m <= k->tokens && (k->tokens == 1 || m > (k->tokens == 8 ? 1 : k->tokens / 2)); }

/* the first ring kernel that fits with the smallest cluster of first .. last */
static bool launch_rings(small_args *a, const small_kernel *kernels, int first, int last) {
    for (int cluster = first; cluster <= last && cluster <= a->units; cluster *= 2) {
        for (int i = 0; i < SMALL_RINGS; i++) {
            if (takes(&kernels[i], a->m) && launch_ring(&kernels[i], a, cluster)) { return true; }
        }
    }
    return false;
}

/* tokens up to which linear_wide.cuh is faster than linear_decoded.cuh, as measured on an H100: a table takes longer to decode again and again */
static int64_t wide_tokens(ql_units_kind kind) { return kind == QL_UNITS_TABLE ? 1024 : 2048; }

/* whether W is decoded once for all tokens of the product, which then takes activations in plain order */
static bool is_decoded(const small_args *a, const ql_packed *p) {
    return has_groups() && a->part[0].output >= SMALL_BF16 && p->kind < QL_ROWS_F32 && a->m > wide_tokens(p->kind) && ql_cuda_fits_decoded(a, p->columns);
}

/* As measured on an H100: rings up to 8 tokens; those in the order of the fragments go to groups, others up to 16 to a ring where a block holds the
 * activations of all of K. Rings know the plain order alone. */
static bool launch(small_args *a, const ql_packed *p) {
    if (p->kind >= QL_ROWS_F32) { return ql_cuda_launch_dense(a, p->kind); }
    const small_family *family = family_of(p);
    bool exact = p->parts == family->parts;
    if (ql_cuda_capability() < 90) {
        for (const small_kernel &k : family->registers) {
            if (exact && a->m <= k.tokens && (a->m > 1) == (k.tokens > 1) && launch_registers(&k, a, p->kind == QL_UNITS_TABLE)) { return true; }
        }
        return false;
    }
    if (is_decoded(a, p)) { return ql_cuda_launch_decoded(a, family->decoded, p->columns), true; } /* a failure is kept */
    if (a->m > GROUP_TOKENS) { return ql_cuda_launch_wide(a, family->wide, p->columns); }
    const small_kernel *rings = exact ? family->ring : family->any;
    if (!a->ordered && launch_rings(a, rings, 1, a->m <= 8 ? 8 : 1)) { return true; }
    return ((a->m > PLAIN_TOKENS || a->ordered) && launch_groups(a, exact ? family->group : family->group_any, p->columns)) || (!a->ordered && launch_rings(a, rings, 2, 8));
}

/* the activations of `a`: as they are, or converted; a single token in float32 is left to the kernel. False: memory is out */
static bool set_activations(small_args *a, const ql_activations *x, const ql_weight *w, int64_t m) {
    int64_t line = (int64_t)a->units * ql_packed_of(w)->columns;
    a->k = (int)w->k, a->x_line = (int)line, a->m = (int)m;
    if (x->made.halves != NULL && w->perm == NULL && line == w->k && ql_packed_of(w)->kind < QL_ROWS_F32) {
        a->made = x->made, a->eps = x->eps, a->ordered = x->made.ordered;
        return a->x = x->made.halves, true;
    }
    bool wide = m > GROUP_TOKENS && has_groups() && !is_decoded(a, ql_packed_of(w)); /* these kernels take no other order */
    a->ordered = x->ordered;
    if (x->halves != NULL && w->perm == NULL && line == w->k && (uintptr_t)x->halves % 16 == 0 && x->ordered >= wide) { return a->x = x->halves, true; }
    if (x->floats != NULL && m == 1 && ql_cuda_capability() >= 90 && ql_packed_of(w)->kind < QL_ROWS_F32) {
        a->floats = x->floats, a->gain = x->gain, a->eps = x->eps, a->perm = w->perm;
        return true;
    }
    bf16 *rows = (bf16 *)ql_cuda_scratch(QL_SCRATCH_ACTIVATION, (size_t)(m * line) * sizeof(bf16));
    if (rows == NULL) { return false; }
    ql_cuda_activations_rows(rows, x, w->perm, m, w->k, line, wide);
    return a->x = rows, true;
}

/* tokens first .. of all parts */
static void move_to_token(small_args *a, const small_args *all, int64_t first, int64_t m) {
    *a = *all;
    a->m = (int)m;
    if (first == 0) { return; }
    a->x += first * a->x_line;
    if (a->positions != NULL) { a->positions += first; }
    for (small_part &part : a->part) {
        for (ql_low_rank_term &term : part.term) { term.u += first * term.line; }
        int64_t size = part.output == QL_OUT_FLOAT || part.output == QL_OUT_FLOAT_ADD ? 4 : 2;
        if (part.rows != NULL) {
            part.rows += first;
        } else {
            part.out = (char *)part.out + first * part.n * size;
        }
    }
}

/* what one bfloat16 can hold of a table's values; FP4 in twelfths, which are exact (the factor makes up for it) */
static void set_values(uint16_t *values, int format) {
    static const float nf4[16] = QL_NF4_VALUES;
    static const float fp4_twelfths[16] = {0.0f, 0.0625f, 8.0f, 12.0f, 4.0f, 6.0f, 2.0f, 3.0f, -0.0f, -0.0625f, -8.0f, -12.0f, -4.0f, -6.0f, -2.0f, -3.0f};
    for (int i = 0; i < 16; i++) { values[i] = __bfloat16_as_ushort(__float2bfloat16_rn(format == QL_FP4 ? fp4_twelfths[i] : nf4[i])); }
}

/* products [0, count) side by side, some tokens at a time */
static bool launch_products(const ql_product *products, int count, const ql_activations *x, const ql_rotation *rotation, int64_t m) {
    const ql_weight *w = products[0].w;
    const ql_packed *p = ql_packed_of(w);
    int parts = 0;
    small_args all;
    memset(&all, 0, sizeof all);
    for (int i = 0; i < count; i++) {
        if (!make_part(&all.part[parts], &products[i], rotation)) { return false; }
        all.adapted |= all.part[parts].term[0].r > 0 || all.part[parts].term[1].r > 0;
        all.tiles += all.part[parts++].tiles;
        i += products[i].output == QL_OUT_SWIGLU;
    }
    all.units = p->units, all.record = p->record, all.parts = p->parts, all.zeros = p->zeros;
    if (p->kind == QL_UNITS_TABLE) { set_values(all.values, w->format); }
    all.next = products[0].next;
    if (rotation != NULL) { all.cos = rotation->cos, all.sin = rotation->sin, all.positions = rotation->positions, all.d = (int)rotation->d; }
    if (!set_activations(&all, x, w, m)) { return true; } /* the failure is kept */
    int64_t step = has_groups() ? m : ql_cuda_capability() < 90 ? 8 : RING_TOKENS;
    for (int64_t first = 0; first < m; first += step) {
        small_args a;
        move_to_token(&a, &all, first, m - first < step ? m - first : step);
        if (launch(&a, p)) { continue; }
        if (step <= 8 || first > 0 || all.made.halves != NULL || all.next.halves != NULL || all.ordered || m > GROUP_TOKENS) { return false; }
        step = (step / 2 + 7) / 8 * 8, first = -step; /* fewer tokens at a time may fit */
    }
    return true;
}

/* whether w is packed; the first product that may take it packs it: a model that only trains has no second copy of its weights */
static bool is_packed(const ql_weight *w) {
    if (w->packed == NULL && !ql_cuda_recording() && ql_cuda_pack((ql_weight *)w) == QL_OK && w->packed != NULL) {
        (void)ql_cuda_finish(); /* the products read it before they wait for what was issued ahead of them */
    }
    return w->packed != NULL;
}

/* Tokens up to which a product on the packed weight is faster than one on the weight decoded for cuBLAS, as measured on an H100: any number where
 * linear_decoded.cuh takes over, whose outputs are bfloat16. SwiGLU spares gate's and up's way through memory, a table takes longer to decode; rows of
 * bfloat16 cuBLAS takes as they are, other rows of floats not. */
static int64_t most_tokens(const ql_weight *w, ql_output output, bool once) {
    if (ql_cuda_capability() < 90 || w->format == QL_BF16) { return 16; }
    if (w->format == QL_F32 || w->format == QL_F16) { return 32; }
    if (!has_groups()) { return GROUP_TOKENS; }
    if (once && output >= QL_OUT_BF16) { return INT32_MAX; }
    return output == QL_OUT_SWIGLU ? 4096 : w->format == QL_NF4 || w->format == QL_FP4 ? 1024 : 2048;
}

int ql_cuda_takes_ordered(const ql_weight *w, const ql_low_rank *l, int64_t t) {
    bool crowds = t * w->k * (int64_t)sizeof(bf16) > SHARED_MEMORY / 2; /* a ring of so few tokens: there is no room for the kernels around it */
    if (!has_groups() || (t <= PLAIN_TOKENS && !crowds) || t > most_tokens(w, QL_OUT_FLOAT_ADD, false) || w->perm != NULL || (l != NULL && l->r > 0) || !is_packed(w)) {
        return 0;
    }
    const ql_packed *p = ql_packed_of(w);
    if (p->kind >= QL_ROWS_F32 || (int64_t)p->units * p->columns != w->k) { return 0; }
    const small_family *family = family_of(p);
    ql_product product = {w, NULL, NULL, QL_OUT_FLOAT_ADD, 0, {}, {}};
    small_args a;
    memset(&a, 0, sizeof a);
    (void)make_part(&a.part[0], &product, NULL);
    a.tiles = a.part[0].tiles, a.units = p->units, a.record = p->record, a.m = (int)t;
    bool exact = p->parts == family->parts;
    if (t > GROUP_TOKENS) { return ql_cuda_fits_wide(&a, family->wide, p->columns); }
    a.ordered = true;
    group_plan plan = best_plan(&a, exact ? family->group : family->group_any, p->columns);
    return t > PLAIN_TOKENS ? plan.cost > 0 : plan.slots > 0;
}

bool ql_cuda_linear_packed(const ql_product *products, int count, const ql_activations *x, const ql_rotation *rotation, int64_t m) {
    bool together = true, adapted = false;
    int64_t values = 0;
    if (m < 1) { return false; }
    for (int i = 0; i < count; i++) { adapted |= products[i].term.r > 0, values += products[i].w->n * products[i].w->k; }
    bool once = !adapted && values * (int64_t)sizeof(bf16) <= QL_DECODED_BYTES;
    for (int i = 0; i < count; i++) {
        if (m > most_tokens(products[i].w, products[i].output, once) || !is_packed(products[i].w)) { return false; }
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
