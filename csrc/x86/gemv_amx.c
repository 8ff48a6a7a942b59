/* gemv_amx.c: y (m, n) = x (m, k) W^T for m <= QL_GEMV_ROWS where codes are integers of 4 bits in panels (formats/packed.h) or
 * of 8 in rows: byte products (VNNI, which each processor with AMX has), four of them to a lane and instruction, so that less
 * than half of the time that memory takes is spent on arithmetic.
 *
 * A group of x becomes integers of 24 bits with one scale, max|x| / MOST: about the rounding of float32 at the largest of them.
 * An integer is three signed bytes, its limbs; each limb has int32 sums of its own, which are exact. Codes are unsigned, so
 * sums begin at -middle * the sum of the limbs that they add up. So a row of y has the same bits for every m and every number of threads. */
#include "../formats/packed.h"
#include "overlay.h"
#include "vec_avx512.h"

#include <stdalign.h>
#include <string.h> /* memcpy */

#define ALWAYS_INLINE static inline __attribute__((always_inline)) /* m, rows and format are constants after inlining */

enum {
    LIMBS = 3,
    MOST_PRODUCTS = 4,       /* of the same x, in one region */
    MOST = 127 << 16,        /* its limbs are 127, 0, 0 */
    MAX_GROUP = 1 << 16,     /* columns: 255 * 128 of them fit in an int32 */
    MAX_SCRATCH = 768 << 10, /* bytes of stack that one product may take */
    TASK_BYTES = 128 << 10,  /* of W: large against the cost of a task, small against a thread's share */
    STREAMS = 3,             /* of memory that a thread reads at a time: one alone reaches three quarters of their speed */
    AHEAD = 2048,            /* bytes of a stream: memory answers late */
    SCALES_AHEAD = 64        /* the same for the scales of rows: floats */
};

typedef struct {
    float *y;              /* (m, n) */
    int8_t *limbs;         /* (m, LIMBS, ld), the highest limb first */
    int32_t *begin;        /* (m, groups, LIMBS, lanes) what sums begin at; lanes: 1 in panels, VL in rows */
    float *scales, *sums;  /* (m, groups) of the integers of a group; the sum of its x, where W has zeros */
    const ql_weight *w;
    const void *codes;
    ql_packed_layout l;
    int64_t m, ld, groups, part, tasks; /* part: panels or rows of a task */
    void (*task)(void *context, int64_t i);
    int accumulate;
} product;

static inline int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }
static inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

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

/* group `group` of row r, stored columns [j, end), to its limbs from column `to` on */
static void split_group(product *g, const float *x, int64_t r, int64_t group, int64_t j, int64_t end, int64_t to) {
    const __m128i in_order = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m128i by_nibble = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15); /* low ones of a word first */
    const __m128i order = g->l.rows > 0 ? by_nibble : in_order;
    const int32_t *perm = g->w->perm;
    vi largest = vi_set1(0); /* as bits, so that a NaN is the largest */
    for (int64_t c = j; c < end; c += VL) {
        vi bits = vi_and(vf_as_vi(load_columns(x, perm, c, end)), vi_set1(INT32_MAX));
        largest = _mm512_max_epi32(largest, bits);
    }
    float most, scale;
    int32_t bits = _mm512_reduce_max_epi32(largest);
    memcpy(&most, &bits, sizeof most);
    scale = most / MOST;
    vf inverse = v_set1(most > 0.0f ? MOST / most : 0.0f);
    vi sum[LIMBS] = {vi_set1(0), vi_set1(0), vi_set1(0)};
    for (int64_t c = j; c < end; c += VL) {
        vi rest = vi_from_vf(v_mul(load_columns(x, perm, c, end), inverse));
        for (int l = LIMBS - 1; l >= 0; l--) {
            vi limb = _mm512_srai_epi32(vi_shl(rest, 24), 24);
            rest = _mm512_srai_epi32(vi_sub(rest, limb), 8);
            sum[l] = vi_add(sum[l], limb);
            int8_t *out = g->limbs + (r * LIMBS + l) * g->ld + to + c - j;
            _mm_storeu_si128((__m128i *)(void *)out, _mm_shuffle_epi8(_mm512_cvtepi32_epi8(limb), order));
        }
    }
    int64_t at = r * g->groups + group;
    float total = 0.0f;
    for (int l = 0; l < LIMBS; l++) {
        int32_t limbs = _mm512_reduce_add_epi32(sum[l]);
        total = total * 256.0f + (float)limbs;
        if (g->l.rows > 0) {
            g->begin[at * LIMBS + l] = -8 * limbs;
        } else {
            begin_lanes(g->begin + (at * LIMBS + l) * VL, g->limbs + (r * LIMBS + l) * g->ld + to, end - j);
        }
    }
    g->scales[at] = scale;
    g->sums[at] = total * scale;
}

static void split(product *g, const float *x) {
    int64_t k = g->w->k, padded = g->l.rows > 0 ? g->l.blocks * g->l.step : g->l.group;
    for (int64_t r = 0; r < g->m; r++) {
        for (int64_t group = 0; group < g->groups; group++) {
            int64_t j = group * g->l.group;
            split_group(g, x + r * k, r, group, j, at_most(j + g->l.group, k), group * padded);
        }
    }
}

/* the sums of three limbs as one number */
static inline vf join(const vi sum[LIMBS]) {
    vf high = v_fma(vi_to_vf(sum[0]), v_set1(256.0f), vi_to_vf(sum[1]));
    return v_fma(high, v_set1(256.0f), vi_to_vf(sum[2]));
}

/* ---- panels of 4 bits ----------------------------------------------------------------------------------------------- */

/* lanes [VL v, VL v + VL) of consecutive panels, the first of which is at p */
static inline const char *lanes_of(const uint32_t *p, const ql_packed_layout *l, int v) {
    return (const char *)(p + v / 2 * l->panel + v % 2 * VL);
}

/* bytes from a word of group `group` to what to fetch meanwhile: on in its panel or, near the end, in the next one that this
 * thread will read as this stream */
static inline int64_t ahead_of(const ql_packed_layout *l, int64_t group, int panels) {
    int64_t left = (l->groups - 1 - group) * (l->head + l->blocks * 32) * 4;
    return left < AHEAD ? AHEAD + (panels - 1) * l->panel * 4 : AHEAD;
}

static inline vi four_limbs(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    return vi_set1(four);
}

/* total + the sums of group `group` of row r of x, scaled; head: of the group, in the panel of vector v */
static inline vf add_group(const product *g, vf total, const vi sum[LIMBS], const uint32_t *head, int v, int64_t r, int64_t group) {
    int64_t at = r * g->groups + group;
    vf value = v_mul(join(sum), v_set1(g->scales[at]));
    if (g->l.zeros) {
        const int16_t *offsets = (const int16_t *)(const void *)(head + 32) + v % 2 * VL;
        value = v_fnma(vi_to_vf(vi_load_i16(offsets)), v_set1(g->sums[at]), value);
    }
    return v_fma(value, v_load((const float *)(const void *)head + v % 2 * VL), total);
}

/* VL elements of row r of y from column i, as many as there are */
static inline void store_lanes(const product *g, int64_t r, int64_t i, vf value) {
    int64_t count = at_most(VL, g->w->n - i);
    if (count < 1) { return; }
    float *y = g->y + r * g->w->n + i;
    v_store_tail(y, g->accumulate ? v_add(v_load_tail(y, count), value) : value, count);
}

/* `panels` panels from row i of W on, each a stream of memory of its own, for all m rows of x */
ALWAYS_INLINE void nibble_panels(const product *g, int64_t i, const int panels, const int m) {
    const ql_packed_layout *l = &g->l;
    const uint32_t *p = (const uint32_t *)g->codes + i / 32 * l->panel;
    const vi nibble = vi_set1(0x0f0f0f0f);
    const int8_t *x = g->limbs;
    vf total[QL_GEMV_ROWS][2 * STREAMS];
#pragma GCC unroll 4
    for (int r = 0; r < m; r++) {
#pragma GCC unroll 8
        for (int v = 0; v < 2 * panels; v++) { total[r][v] = v_zero(); }
    }
    for (int64_t group = 0; group < l->groups; group++) {
        vi sum[QL_GEMV_ROWS][2 * STREAMS][LIMBS];
        const uint32_t *head = p;
        int64_t ahead = ahead_of(l, group, panels);
#pragma GCC unroll 4
        for (int r = 0; r < m; r++) {
#pragma GCC unroll 3
            for (int a = 0; a < LIMBS; a++) {
                vi begin = vi_set1(g->begin[(r * l->groups + group) * LIMBS + a]);
#pragma GCC unroll 8
                for (int v = 0; v < 2 * panels; v++) { sum[r][v][a] = begin; }
            }
        }
        p += l->head;
        int64_t blocks = group == l->groups - 1 ? l->last : l->blocks;
        for (int64_t b = 0; b < blocks; b++, p += 32, x += 8) {
#pragma GCC unroll 8
            for (int v = 0; v < 2 * panels; v++) { v_prefetch(lanes_of(p, l, v) + ahead); }
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) { /* the low nibbles, the high nibbles */
#pragma GCC unroll 4
                for (int r = 0; r < m; r++) {
                    vi limb[LIMBS];
#pragma GCC unroll 3
                    for (int a = 0; a < LIMBS; a++) { limb[a] = four_limbs(x + (r * LIMBS + a) * g->ld + 4 * h); }
#pragma GCC unroll 8
                    for (int v = 0; v < 2 * panels; v++) {
                        vi word = vi_load(lanes_of(p, l, v)), code = vi_and(h ? vi_shr(word, 4) : word, nibble);
#pragma GCC unroll 3
                        for (int a = 0; a < LIMBS; a++) { sum[r][v][a] = _mm512_dpbusd_epi32(sum[r][v][a], code, limb[a]); }
                    }
                }
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < m; r++) {
#pragma GCC unroll 8
            for (int v = 0; v < 2 * panels; v++) {
                total[r][v] = add_group(g, total[r][v], sum[r][v], head + v / 2 * l->panel, v, r, group);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < m; r++) {
#pragma GCC unroll 8
        for (int v = 0; v < 2 * panels; v++) { store_lanes(g, r, i + v * VL, total[r][v]); }
    }
}

ALWAYS_INLINE void nibble_range(const product *g, int64_t panel, int64_t end, const int m) {
    const int streams = m == 1 ? STREAMS : m == 2 ? 2 : 1; /* registers */
    for (; panel + streams <= end; panel += streams) { nibble_panels(g, panel * 32, streams, m); }
    for (; panel < end; panel++) { nibble_panels(g, panel * 32, 1, m); }
}

static void nibble_task(void *context, int64_t task) {
    const product *g = context;
    int64_t panel = task * g->part, end = at_most(panel + g->part, g->l.panels);
    switch (g->m) {
    case 1: nibble_range(g, panel, end, 1); break;
    case 2: nibble_range(g, panel, end, 2); break;
    case 3: nibble_range(g, panel, end, 3); break;
    default: nibble_range(g, panel, end, 4); break;
    }
}

/* ---- rows of bytes -------------------------------------------------------------------------------------------------- */

static int64_t bytes_of_row(const ql_weight *w) {
    return w->format == QL_AFFINE && w->bits == 8 ? 4 * ql_words_per_row(w->k, 8) : w->k;
}

/* total + the sums of group `group` of row i of W and row r of x, scaled; *offset += the zero's part of it */
ALWAYS_INLINE vf add_row_group(const product *g, vf total, float *offset, const vi sum[LIMBS], int64_t i, int64_t r, int64_t group,
                               const int is_int8) {
    const ql_weight *w = g->w;
    int64_t at = r * g->groups + group, of = is_int8 ? i : i * g->groups + group;
    float scale = is_int8 ? QL_INT8_STEP * w->scales[of] : w->scales[of];
    if (!is_int8) { v_prefetch(w->scales + of + SCALES_AHEAD); }
    if (w->zeros != NULL) {
        int zero = w->zeros[of] - (int)ql_affine_symmetric_zero(w->bits);
        *offset += (float)zero * g->sums[at] * scale;
    }
    return v_fma(join(sum), v_set1(scale * g->scales[at]), total);
}

/* rows i, i + apart, … of W, `rows` of them, for all m rows of x; int8 codes are made unsigned */
ALWAYS_INLINE void byte_rows(const product *g, int64_t i, int64_t apart, const int rows, const int m, const int is_int8) {
    const ql_weight *w = g->w;
    const int64_t stride = apart * bytes_of_row(w);
    const char *codes = (const char *)g->codes + i * bytes_of_row(w);
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

ALWAYS_INLINE void byte_range(const product *g, int64_t i, int64_t end, const int m, const int is_int8) {
    const int rows = m < 3 ? 4 : 2; /* registers */
    int64_t apart = (end - i) / rows, first = i; /* as many streams of memory as rows at a time */
    for (; i < first + apart; i++) { byte_rows(g, i, apart, rows, m, is_int8); }
    for (i = first + rows * apart; i < end; i++) { byte_rows(g, i, 0, 1, m, is_int8); }
}

#define BYTE_TASK(NAME, IS_INT8)                                         \
    static void NAME(void *context, int64_t task) {                      \
        const product *g = context;                                      \
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
static int prepare(product *of, float *y, const ql_weight *w, int64_t m, int accumulate) {
    const void *packed = __atomic_load_n(&w->packed, __ATOMIC_ACQUIRE);
    int in_place = w->format == QL_INT8 || (w->format == QL_AFFINE && w->bits == 8);
    if ((w->format != QL_INT8 && w->format != QL_AFFINE) || (!in_place && w->bits < 4)) { return 0; }
    product g = {.y = y, .w = w, .codes = in_place ? w->codes : packed, .l = ql_packed_layout_of(w), .m = m, .accumulate = accumulate};
    int panels = g.l.rows > 0;
    g.groups = (w->k + g.l.group - 1) / g.l.group;
    g.ld = round_up((panels ? g.l.columns : w->k) + VL, 64);
    int too_large = m > QL_GEMV_ROWS || g.l.group > MAX_GROUP || m * (LIMBS * g.ld + 256 * g.groups) > MAX_SCRATCH;
    int no_kernel = !in_place && !ql_packs_bytes(w) && g.l.rows != 32;
    if (m < 1 || w->n < 1 || g.codes == NULL || too_large || no_kernel) { return 0; }
    int64_t count = panels ? g.l.panels : w->n, bytes = panels ? 4 * g.l.panel : bytes_of_row(w), at_once = panels ? STREAMS : 4;
    g.part = round_up(at_most(count / (4 * ql_threads()), TASK_BYTES / bytes), at_once);
    if (g.part < 1) { g.part = at_once; }
    g.tasks = (count + g.part - 1) / g.part;
    g.task = panels ? nibble_task : w->format == QL_INT8 ? int8_task : code_task;
    *of = g;
    return 1;
}

/* whether both take the same integers of x */
static int same_integers(const product *a, const product *b) {
    const int32_t *perm_a = a->w->perm, *perm_b = b->w->perm;
    if (a->w->k != b->w->k || a->l.group != b->l.group || a->l.rows != b->l.rows) { return 0; }
    return perm_a == perm_b || (perm_a != NULL && perm_b != NULL && memcmp(perm_a, perm_b, (size_t)a->w->k * sizeof *perm_a) == 0);
}

/* task `task` of all products from `context` on */
static void task_of_all(void *context, int64_t task) {
    product *g = context;
    for (; task >= g->tasks; g++) { task -= g->tasks; }
    g->task(g, task);
}

/* `count` products that take the same integers of x, in one region */
static void run(product *g, int64_t count, const float *x) {
    int64_t numbers = round_up(g->m * g->groups, 16), lanes = g->l.rows > 0 ? 1 : VL, tasks = 0;
    alignas(64) int8_t limbs[g->m * LIMBS * g->ld];
    alignas(64) int32_t begin[LIMBS * numbers * lanes];
    alignas(64) float scales[numbers], sums[numbers];
    for (int64_t i = 0; i < count; i++) {
        g[i].limbs = limbs, g[i].begin = begin, g[i].scales = scales, g[i].sums = sums;
        tasks += g[i].tasks;
    }
    split(g, x);
    ql_parallel_for(tasks, task_of_all, g);
}

int ql_gemv_forward_amx(float *y, const float *x, const ql_weight *w, int64_t m, int accumulate) {
    product g;
    if (!prepare(&g, y, w, m, accumulate)) { return 0; }
    run(&g, 1, x);
    return 1;
}

void ql_products_forward_amx(float *const *y, const float *x, const ql_weight *const *w, int64_t count, int64_t m) {
    product g[MOST_PRODUCTS];
    int64_t i = 0;
    while (i < count && count <= MOST_PRODUCTS && prepare(&g[i], y[i], w[i], m, 0) && same_integers(&g[0], &g[i])) { i++; }
    if (count > 0 && i == count) {
        run(g, count, x);
        return;
    }
    for (i = 0; i < count; i++) {
        (w[i]->format == QL_F32 ? ql_linear_forward_avx512 : ql_linear_forward_amx)(y[i], x, w[i], m, 0);
    }
}
