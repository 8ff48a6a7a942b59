/* bytes_body.h: y (m, n) = x (m, k) W^T for a few rows of x where codes are integers, of 2 to 4 bits in panels (formats/packed.h) or as
 * bytes in rows: byte products (VNNI), four of them to a lane and instruction, so that arithmetic takes less time than memory. With
 * AMX, more than one row of x (of int8 than QL_GEMV_INT8_ROWS), and more than QL_GEMV_ROWS of nf4 and fp4: on tiles (few_amx.c).
 *
 * A group of x becomes integers of three limbs (limbs.h); each limb has int32 sums of its own, which are exact. Codes are
 * unsigned, so sums begin at -middle * the sum of the limbs that they add up. A row of y has the same bits for every number of threads
 * and every m; with bytes, nf4 and fp4 on tiles others than in vectors, which add up each lane's columns apart.
 *
 * The file that includes this one defines GEMV_TILES: 1, there are tiles; 0, there are not. */
#include "../core/sizes.h"
#include "../formats/packed.h"
#include "bytes.h"
#include "overlay.h"

#include <string.h> /* memcpy */

enum {
    VECTORS = 8,             /* of rows of W at a time, in panels */
    SCALES_AHEAD = 64        /* floats from the scale of a row to the one that is fetched meanwhile */
};

/* Panels at a time, each a stream of memory of its own. As measured, one stream alone reaches three quarters of the speed of some on
 * processors with tiles; on others it is the fastest. */
static inline int streams_of(int64_t rows) { return !GEMV_TILES ? 1 : rows == 32 ? 3 : 2; }

/* bytes that each of them is fetched ahead, as measured on both kinds of processors, too */
static inline int64_t panels_ahead(int bits) { return GEMV_TILES ? 4096 : bits == 4 ? 6144 : 8192; }

/* the first n of 64 bytes, n > 0 */
static inline __mmask64 first_bytes(int64_t n) { return n < 64 ? (1ull << n) - 1 : ~0ull; }

/* ---- x as integers ------------------------------------------------------------------------------------------------ */

/* stored columns [j, j + VL) of a row of x, those from `end` on 0 */
static inline vf load_columns(const float *x, const int32_t *perm, int64_t j, int64_t end) {
    vm lanes = vm_first(at_most(VL, end - j));
    if (perm == NULL) { return _mm512_maskz_loadu_ps(lanes, x + j); }
    return _mm512_mask_i32gather_ps(v_zero(), lanes, _mm512_maskz_loadu_epi32(lanes, perm + j), x, sizeof(float));
}

/* -128 * sums of `count` limbs in the lanes in which byte products add them up */
static void begin_lanes(int32_t *begin, const int8_t *limbs, int64_t count) {
    vi sum = vi_set1(0);
    for (int64_t c = 0; c < count; c += 64) {
        __mmask64 lanes = first_bytes(count - c);
        sum = _mm512_dpbusd_epi32(sum, vi_set1((int32_t)0x80808080u), _mm512_maskz_loadu_epi8(lanes, limbs + c));
    }
    vi_store(begin, vi_sub(vi_set1(0), sum));
}

/* where limb l of row r of x has column j */
static inline int8_t *limb_at(const gemv_product *g, int64_t r, int l, int64_t j) {
    int64_t row = r * kept_limbs(g->halves) + l;
    return g->limbs + (g->tiles == 0 ? row * g->ld + j : (j / CHUNK * g->tiles * LINES + row) * CHUNK + j % CHUNK);
}

/* group `group` of row r, stored columns [j, end), to its limbs from column `to` on */
static void split_group(gemv_product *g, const float *x, int64_t r, int64_t group, int64_t j, int64_t end, int64_t to) {
    const __m128i in_order = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m128i of_nibbles = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15); /* as codes_of tells */
    const __m128i of_pairs = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m128i order = g->l.rows == 32 ? of_nibbles : g->l.rows == 64 ? of_pairs : in_order;
    const int32_t *perm = g->w->perm;
    vi largest = vi_set1(0);
    for (int64_t c = j; c < end; c += VL) { largest = larger_bits(largest, load_columns(x, perm, c, end)); }
    limb_scale scale = limb_scale_of(_mm512_reduce_max_epi32(largest));
    vf up = v_set1(scale.up), inverse = v_set1(scale.inverse);
    vi sum[LIMBS] = {vi_set1(0), vi_set1(0), vi_set1(0)};
    for (int64_t c = j; c < end; c += VL) {
        vi limbs = to_limbs(to_integers(load_columns(x, perm, c, end), up, inverse));
        for (int l = 0; l < kept_limbs(g->halves); l++) {
            vi limb = _mm512_srai_epi32(vi_shl(limbs, 8u * (unsigned)(1 + l)), 24);
            sum[l] = vi_add(sum[l], limb);
            int8_t *out = limb_at(g, r, l, to + c - j);
            _mm_storeu_si128((__m128i *)(void *)out, _mm_shuffle_epi8(_mm512_cvtepi32_epi8(limb), order));
        }
    }
    int64_t at = r * g->groups + group;
    float total = 0.0f;
    for (int l = 0; l < LIMBS; l++) {
        int32_t limbs = _mm512_reduce_add_epi32(sum[l]);
        total = total * 256.0f + (float)limbs;
        if (g->l.rows > 0 || g->tiles > 0) {
            g->begin[at * LIMBS + l] = -g->middle * limbs;
        } else {
            begin_lanes(g->begin + (at * LIMBS + l) * VL, g->limbs + (r * LIMBS + l) * g->ld + to, end - j);
        }
    }
    g->scales[at] = scale.most / (g->halves == 2 ? (float)MOST * LEVEL_ONE : (float)MOST);
    g->sums[at] = total * g->scales[at];
}

/* columns between the limbs of one group and of the next */
static int64_t group_columns(const gemv_product *g) {
    int64_t columns = g->l.rows > 0 ? g->l.blocks * g->l.step : g->l.group;
    return g->tiles > 0 ? round_up(columns, CHUNK) : columns; /* of tiles, whole chunks */
}

typedef struct { gemv_product *g; const float *x; } split_context;

static void split_row(void *context, int64_t r) {
    gemv_product *g = ((split_context *)context)->g;
    const float *row = ((split_context *)context)->x + r * g->w->k;
    for (int64_t group = 0; group < g->groups; group++) {
        int64_t j = group * g->l.group;
        split_group(g, row, r, group, j, at_most(j + g->l.group, g->w->k), group * group_columns(g));
    }
}

/* ---- panels of 4, 2 and 3 bits -------------------------------------------------------------------------------------- */

static inline vi four_limbs(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    return vi_set1(four);
}

/* sum[v] += the block at p, VL rows of W a vector, times its limbs of x, the first of which are at x. Meanwhile the block `ahead` bytes on is fetched,
 * a few lines between products: where all are asked for at once, products wait until memory has taken them in. */
ALWAYS_INLINE void add_block(vi (*sum)[LIMBS], const gemv_product *g, const uint32_t *p, const int8_t *x, int64_t ahead, const int bits, const int vectors) {
    const int step = step_of(bits), rows = rows_of(bits), words = bits == 3 ? 3 : 1, pause = step / 4 / words;
#pragma GCC unroll 8
    for (int h = 0; h < step / 4; h++) {
        if (GEMV_TILES && bits == 2) { __asm__("" : "+r"(p)); } /* words are loaded again: gcc would keep them in registers that it lacks */
        vi limb[LIMBS];
#pragma GCC unroll 3
        for (int a = 0; a < LIMBS; a++) { limb[a] = four_limbs(x + a * g->ld + 4 * h); }
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            const int turn = h * vectors + v, line = turn / pause;
            if (turn % pause == 0 && line < words * vectors) {
                v_prefetch((const char *)(lanes_of(p, &g->l, line % vectors, rows) + line / vectors * rows) + ahead);
            }
            vi code = codes_of(lanes_of(p, &g->l, v, rows), bits, h);
#pragma GCC unroll 3
            for (int a = 0; a < LIMBS; a++) { sum[v][a] = _mm512_dpbusd_epi32(sum[v][a], code, limb[a]); }
        }
    }
}

/* `panels` panels from row i of W on, each a stream of memory of its own, for row r of x */
ALWAYS_INLINE void panel_products(const gemv_product *g, int64_t i, int64_t r, const int bits, const int panels) {
    const ql_packed_layout *l = &g->l;
    const int step = step_of(bits), words = bits == 3 ? 3 : 1, rows = rows_of(bits), vectors = panels * rows / VL;
    const uint32_t *p = (const uint32_t *)g->codes + i / rows * l->panel;
    const int8_t *x = g->limbs + r * LIMBS * g->ld;
    vf total[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) { total[v] = v_zero(); }
    for (int64_t group = 0; group < l->groups; group++) {
        vi sum[VECTORS][LIMBS];
        const uint32_t *head = p;
        int64_t ahead = ahead_of(l, group, panels, panels_ahead(bits));
#pragma GCC unroll 3
        for (int a = 0; a < LIMBS; a++) {
            vi begin = vi_set1(g->begin[(r * g->groups + group) * LIMBS + a]);
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) { sum[v][a] = begin; }
        }
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) { v_prefetch((const char *)lanes_of(head, l, v, rows) + ahead); }
        p += l->head;
        int64_t blocks = group == l->groups - 1 ? l->last : l->blocks;
        for (int64_t b = 0; b < blocks; b++, p += words * rows, x += step) { add_block(sum, g, p, x, ahead, bits, vectors); }
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            total[v] = add_group(g, total[v], sum[v], panel_scale(g, head, 0, v, rows), r, group);
        }
    }
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) { store_lanes(g->y, g->w->n, r, i + v * VL, total[v], g->accumulate); }
}

ALWAYS_INLINE void panel_range(const gemv_product *g, int64_t panel, int64_t end, int64_t r, const int bits) {
    const int rows = rows_of(bits), streams = streams_of(rows);
    for (; panel + streams <= end; panel += streams) { panel_products(g, panel * rows, r, bits, streams); }
    for (; panel < end; panel++) { panel_products(g, panel * rows, r, bits, 1); }
}

/* one row of x after the other: the panels of a task stay in the second-level cache */
#define PANEL_TASK(BITS)                                                                                \
    static void panel_task_##BITS(void *context, int64_t task) {                                        \
        const gemv_product *g = context;                                                                \
        int64_t panel = task * g->part, end = at_most(panel + g->part, g->l.panels);                    \
        for (int64_t r = 0; r < g->m; r++) { panel_range(g, panel, end, r, BITS); }                     \
    }
PANEL_TASK(2)
PANEL_TASK(3)
PANEL_TASK(4)

/* panels, or rows of bytes that a kernel takes at a time, of W */
static int64_t units_of(const gemv_product *g) {
    return g->l.rows > 0 ? g->l.panels : pieces(g->w->n, g->tiles > 0 ? BYTE_ROWS : 1);
}

#if GEMV_TILES
static void few_task(void *context, int64_t task) {
    const gemv_product *g = context;
    ql_few_amx(g, task * g->part, at_most((task + 1) * g->part, units_of(g)));
}
#endif

/* ---- rows of bytes -------------------------------------------------------------------------------------------------- */

static int64_t bytes_of_row(const ql_weight *w) {
    return w->format == QL_AFFINE && w->bits == 8 ? 4 * ql_words_per_row(w->k, 8) : w->k;
}

/* total + the sums of group `group` of row i of W and row r of x, scaled; *offset += the zero's part of it */
ALWAYS_INLINE vf add_row_group(const gemv_product *g, vf total, float *offset, const vi sum[LIMBS], int64_t i, int64_t r, int64_t group,
                               const int is_int8) {
    const ql_weight *w = g->w;
    int64_t at = r * g->groups + group, of = is_int8 ? i : i * g->groups + group;
    float scale = is_int8 ? QL_INT8_STEP * w->scales[of] : w->scales[of];
    if (!is_int8) { v_prefetch(w->scales + of + SCALES_AHEAD); }
    if (w->zeros != NULL) {
        int zero = w->zeros[of] - (int)ql_affine_symmetric_zero(w->bits);
        *offset += (float)zero * g->sums[at] * scale;
    }
    return v_fma(join_limbs(sum[0], sum[1], sum[2]), v_set1(scale * g->scales[at]), total);
}

/* rows i, i + apart, … of W, `rows` of them, for all m rows of x; int8 codes are made unsigned */
ALWAYS_INLINE void byte_rows(const gemv_product *g, int64_t i, int64_t apart, const int rows, const int m, const int is_int8) {
    const ql_weight *w = g->w;
    const int64_t stride = apart * g->stride;
    const char *codes = (const char *)g->codes + i * g->stride;
    vf total[QL_GEMV_ROWS][4];
    float offset[QL_GEMV_ROWS][4] = {{0}};
#pragma GCC unroll 4
    for (int r = 0; r < m; r++) {
#pragma GCC unroll 4
        for (int a = 0; a < rows; a++) { total[r][a] = v_zero(); }
    }
    for (int64_t group = 0; group < g->groups; group++) {
        vi sum[QL_GEMV_ROWS][4][LIMBS];
        int64_t j = group * g->l.group, end = at_most(j + g->l.group, w->k);
#pragma GCC unroll 4
        for (int r = 0; r < m; r++) {
#pragma GCC unroll 3
            for (int l = 0; l < LIMBS; l++) {
                vi begin = vi_load(g->begin + ((r * g->groups + group) * LIMBS + l) * VL);
#pragma GCC unroll 4
                for (int a = 0; a < rows; a++) { sum[r][a][l] = begin; }
            }
        }
        for (; j < end; j += 64) {
            __mmask64 lanes = first_bytes(end - j);
            vi code[4];
#pragma GCC unroll 4
            for (int a = 0; a < rows; a++) {
                code[a] = _mm512_maskz_loadu_epi8(lanes, codes + a * stride + j);
                if (is_int8) { code[a] = _mm512_xor_si512(code[a], vi_set1((int32_t)0x80808080u)); }
                v_prefetch(codes + a * stride + j + AHEAD);
            }
#pragma GCC unroll 4
            for (int r = 0; r < m; r++) {
#pragma GCC unroll 3
                for (int l = 0; l < LIMBS; l++) {
                    vi limb = _mm512_maskz_loadu_epi8(lanes, g->limbs + (r * LIMBS + l) * g->ld + j);
#pragma GCC unroll 4
                    for (int a = 0; a < rows; a++) { sum[r][a][l] = _mm512_dpbusd_epi32(sum[r][a][l], code[a], limb); }
                }
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < m; r++) {
#pragma GCC unroll 4
            for (int a = 0; a < rows; a++) {
                total[r][a] = add_row_group(g, total[r][a], &offset[r][a], sum[r][a], i + a * apart, r, group, is_int8);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < m; r++) {
#pragma GCC unroll 4
        for (int a = 0; a < rows; a++) {
            float value = v_sum(total[r][a]) - offset[r][a], *y = g->y + r * w->n + i + a * apart;
            *y = g->accumulate ? *y + value : value;
        }
    }
}

ALWAYS_INLINE void byte_range(const gemv_product *g, int64_t i, int64_t end, const int m, const int is_int8) {
    const int rows = m < 3 ? 4 : 2; /* registers */
    int64_t apart = (end - i) / rows, first = i; /* as many streams of memory as rows at a time */
    for (; i < first + apart; i++) { byte_rows(g, i, apart, rows, m, is_int8); }
    for (i = first + rows * apart; i < end; i++) { byte_rows(g, i, 0, 1, m, is_int8); }
}

#define BYTE_TASK(NAME, IS_INT8)                                         \
    static void NAME(void *context, int64_t task) {                      \
        const gemv_product *g = context;                                      \
        int64_t i = task * g->part, end = at_most(i + g->part, g->w->n); \
        switch (g->m) {                                                  \
        case 1: byte_range(g, i, end, 1, IS_INT8); break;                \
        case 2: byte_range(g, i, end, 2, IS_INT8); break;                \
        case 3: byte_range(g, i, end, 3, IS_INT8); break;                \
        default: byte_range(g, i, end, 4, IS_INT8); break;               \
        }                                                                \
    }
BYTE_TASK(int8_task, 1)
BYTE_TASK(code_task, 0)

/* ---- the product ------------------------------------------------------------------------------------------------------ */

/* what `of` begins with: the kernel, the codes and the sizes of y = x W^T; 0: there is no such kernel */
static int prepare(gemv_product *of, const ql_linear_product *product, int64_t m, int accumulate) {
    const ql_weight *w = product->w;
    const void *packed = __atomic_load_n(&w->packed, __ATOMIC_ACQUIRE);
    int in_place = w->format == QL_INT8 || (w->format == QL_AFFINE && w->bits == 8);
    gemv_product g = {.y = product->y, .w = w, .codes = in_place ? w->codes : packed, .l = ql_packed_layout_of(w), .m = m,
                      .accumulate = accumulate};
    int panels = g.l.rows > 0, tables = w->format == QL_NF4 || w->format == QL_FP4;
    if (w->format != QL_INT8 && w->format != QL_AFFINE && !tables) { return 0; }
    if (!GEMV_TILES && !panels) { return 0; } /* bytes: float32 takes as long for one row, and for more of them less */
    if (tables && (!GEMV_TILES || !panels || m <= QL_GEMV_ROWS)) { return 0; } /* so few: float32, on AVX-512 */
    g.groups = pieces(w->k, g.l.group), g.stride = bytes_of_row(w);
    g.ld = round_up((panels ? g.l.columns : w->k) + VL, 64);
    int64_t most = GEMV_TILES ? ql_gemv_tile_rows(w, ql_precise()) : QL_GEMV_ROWS;
    int64_t in_vectors = most <= QL_GEMV_ROWS ? QL_GEMV_ROWS : w->format == QL_INT8 ? QL_GEMV_INT8_ROWS : 1;
    int too_large = m > most || g.l.group > QL_GEMV_GROUP;
    int no_kernel = !in_place && !ql_packs_bytes(w) && !panels;
    if (m < 1 || w->n < 1 || g.codes == NULL || too_large || no_kernel) { return 0; }
    g.middle = panels && !tables ? (int32_t)ql_affine_symmetric_zero(w->bits) : 128, g.halves = tables ? 2 : 1;
    g.tiles = m > in_vectors ? (int)pieces(m * kept_limbs(g.halves), LINES) : 0;
    void (*const of_bits[])(void *, int64_t) = {[2] = panel_task_2, [3] = panel_task_3, [4] = panel_task_4};
    g.task = panels && !tables ? of_bits[w->bits] : w->format == QL_INT8 ? int8_task : code_task;
#if GEMV_TILES
    if (g.tiles > 0) { g.task = few_task; }
#endif
    *of = g;
    return 1;
}

/* units of a task, of `all` there are */
static int64_t part_of_product(const gemv_product *g, int64_t all) {
    int panels = g->l.rows > 0;
    int64_t at_once = g->tiles > 0 ? (g->tiles == 1 && g->l.rows == 32 && g->halves == 1 ? 2 : 1) : panels ? streams_of(g->l.rows) : 4;
    return part_of(all, panels ? 4 * g->l.panel : (g->tiles > 0 ? BYTE_ROWS : 1) * g->stride, at_once, g->m);
}

/* x as integers, for all of `count` products; 0: no memory for them */
static int split(gemv_product *g, int64_t count, const float *x) {
    int64_t numbers = round_up(g->m * g->groups, 16), lanes = g->l.rows > 0 || g->tiles > 0 ? 1 : VL;
    int64_t limbs = g->tiles > 0 ? g->tiles * LINES * g->groups * group_columns(g) : g->m * LIMBS * g->ld; /* both whole lines */
    char *memory = ql_scratch((size_t)(limbs + (LIMBS * lanes + 2) * numbers * (int64_t)sizeof(float)));
    if (memory == NULL) { return 0; }
    g->limbs = (int8_t *)memory, g->begin = (int32_t *)(void *)(memory + limbs);
    g->scales = (float *)(void *)(g->begin + LIMBS * numbers * lanes), g->sums = g->scales + numbers;
    split_context context = {g, x};
    if (g->tiles > 0) { ql_parallel_for(g->m, split_row, &context); }
    for (int64_t r = 0; r < g->m && g->tiles == 0; r++) { split_row(&context, r); }
    for (int64_t i = 1; i < count; i++) { g[i].limbs = g->limbs, g[i].begin = g->begin, g[i].scales = g->scales, g[i].sums = g->sums; }
    return 1;
}

static int gemv_bytes(const ql_linear_product *products, int64_t count, const float *x, int64_t m, int accumulate) {
    gemv_product g[QL_PRODUCTS];
    ql_loop loops[QL_PRODUCTS];
    int64_t units = 0;
    for (int64_t i = 0; i < count; i++) {
        if (!prepare(&g[i], &products[i], m, accumulate)) { return 0; }
        units += units_of(&g[i]);
    }
    if (!split(g, count, x)) { return 0; }
    for (int64_t i = 0; i < count; i++) {
        g[i].part = part_of_product(&g[i], units);
        loops[i] = (ql_loop){pieces(units_of(&g[i]), g[i].part), g[i].task, &g[i]};
    }
    ql_parallel_loops(loops, count);
    return 1;
}
