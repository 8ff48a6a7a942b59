/* gemv_body.h: y (m, n) = x (m, k) W^T for m <= QL_GEMV_ROWS: decode. All that counts is to read W once, at the speed of memory,
 * so codes become float32 in registers and meet float32 activations there; products are exact up to float32 rounding.
 *
 * Three kernels, by what a code is:
 *   nibbles  4 bits. Lanes are rows of W (panels, formats/packed.h), so that nothing is summed across lanes. AVX-512's permute, which
 *            reads the low 4 bits of a lane, looks each nibble up in the 16 values of the format: shift, permute, fma for a
 *            lane's weight. AVX2's reads 3 bits: there integers are made in place by a mask and a subtraction, and the
 *            bytes of nf4 and fp4 are looked up one by one.
 *   sums     2 and 3 bits. A window of as many bits as a permute reads is a few codes or parts of codes: it is looked up in a table of the
 *            sums that it can stand for with these activations, so that 3 instructions serve 4 or 3 bits of a lane. The
 *            tables of a row of x (half a vector a column at 2 bits, 2/3 with AVX2) are made once a product; panels of 64
 *            rows share each load of a table. With AVX-512 every other shift is spared by a load from the next byte on;
 *            the last one reads 3 bytes beyond the panel.
 *   rows     8 bits (5 to 7 as bytes) and floats. Lanes are columns; a few rows of W at a time share the loads of x.
 * Codes are looked up around the middle of their range; zeros other than it, the `offsets` of a group, are taken off as
 * offset * sum of the group's activations. A group's sum is multiplied by its scale once.
 *
 * A row of y has the same bits for every m and every number of threads. */
#include "../core/sizes.h"
#include "../formats/packed.h"
#include "overlay.h"
#include "panels.h"

#include <stdalign.h>
#include <string.h> /* memcpy */

enum {
    PANELS = V_AVX512 ? 2 : 1, /* of 4 bits at a time, each a stream of memory of its own: one stream alone is not as fast */
    VECTORS = 4,               /* of their rows at a time, at most */
    WINDOW = V_AVX512 ? 4 : 3, /* bits that a permute looks up: 2^WINDOW is VL; */
    WINDOWS = 32 / WINDOW + (32 % WINDOW > 0), /* of a word */
    FLOAT_ROWS = V_AVX512 ? 8 : QL_GEMV_ROWS, /* rows of x at a time where W is float32, */
    FLOAT_BYTES = 128 << 10, /* of W meanwhile where there are more */
    NARROW = 64,             /* columns of a float32 W whose rows are short */
    AHEAD = V_AVX512 ? 4096 : 8192, /* bytes, as measured: memory answers late; past the end it is the next weight, as often as not */
    NIBBLES_AHEAD = 6144,    /* the same of 4 bits */
    ROW_AHEAD = 2048,        /* the same for each of a few rows that are read at a time */
    SCALES_AHEAD = 32,       /* and floats from a scale of theirs */
    LINE = 64                /* bytes of a cache line */
};

typedef struct {
    float *y;           /* (m, n) */
    const float *x;     /* (m, ldx): columns as stored, groups padded with 0 in panels */
    const float *sums;  /* (m, groups) sum of each group's x; NULL where no zeros are */
    const float *table; /* sums: a line of 16 floats for each nibble of a row of W */
    const ql_weight *w;
    const void *codes;
    ql_packed_layout l;
    int64_t m, ldx, part; /* part: panels or rows of a task */
    int accumulate;
} gemv;

/* ---- panels --------------------------------------------------------------------------------------------------- */

/* - offset * sum of x over group `group` of row r of x, for VL rows of W: `offsets` are theirs */
static inline vf offset_term(const gemv *g, const void *offsets, int64_t r, int64_t group) {
    return v_fnma(vi_to_vf(vi_load_i16(offsets)), v_set1(g->sums[r * g->l.groups + group]), v_zero());
}

/* nibble_group: sum[r][v] += row r of x . the codes of `blocks` blocks of a group, for VL rows of W a vector, `vectors` of them from p
 * on and, beyond the 32 rows of a panel, in the next one; `ahead`: bytes to what to fetch meanwhile. */
#if V_AVX512
typedef v_table nibble_values;
static inline nibble_values nibble_values_of(const float *table) { return v_table_load(table); }

ALWAYS_INLINE void nibble_group(vf (*sum)[VECTORS], const gemv *g, const uint32_t *p, const float *x, int64_t blocks, int64_t ahead,
                                nibble_values values, const int looked_up, const int vectors, const int m) {
    (void)looked_up; /* whole numbers, too */
    vf odd[QL_GEMV_ROWS][VECTORS]; /* of odd columns, apart: one chain of additions a vector would take longer than the look-ups */
#pragma GCC unroll 4
    for (int r = 0; r < m; r++) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) { odd[r][v] = v_zero(); }
    }
    for (int64_t b = 0; b < blocks; b++, p += 32, x += 8) {
        vi word[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            const uint32_t *words = lanes_of(p, &g->l, v, 32);
            v_prefetch((const char *)words + ahead);
            word[v] = vi_load(words);
            KEEP(word[v]); /* gcc would load it again for each shift */
        }
#pragma GCC unroll 8
        for (int q = 0; q < 8; q++) {
            vf a[QL_GEMV_ROWS];
#pragma GCC unroll 4
            for (int r = 0; r < m; r++) { a[r] = v_set1(x[r * g->ldx + q]); }
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                vf value = v_table_get(values, q > 0 ? vi_shr(word[v], 4u * (unsigned)q) : word[v]);
#pragma GCC unroll 4
                for (int r = 0; r < m; r++) {
                    vf *to = q % 2 == 0 ? &sum[r][v] : &odd[r][v];
                    *to = v_fma(value, a[r], *to);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < m; r++) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) { sum[r][v] = v_add(sum[r][v], odd[r][v]); }
    }
}
#else
typedef v_bytes nibble_values;
static inline nibble_values nibble_values_of(const float *table) { return v_bytes_of(table); }

/* Whole numbers: four codes stand in the mantissa of 2^23; one of them is left there and 2^23 and the middle are taken off, which is
 * exact. Code q of the four is 16^q times as large, x as much smaller. */
ALWAYS_INLINE void whole_group(vf (*sum)[VECTORS], const gemv *g, const uint32_t *p, const float *x, int64_t blocks, int64_t ahead,
                               const int vectors, const int m) {
    const vi power = vi_set1(0x4b000000);
    for (int64_t b = 0; b < blocks; b++, p += 32, x += 8) {
        vi four[2][VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            vi word = vi_load(p + v * VL);
            if (v % 2 == 0) { v_prefetch((const char *)(p + v * VL) + ahead); }
            four[0][v] = vi_halves(word, power), four[1][v] = vi_or(vi_shr(word, 16), power);
        }
#pragma GCC unroll 8
        for (int q = 0; q < 8; q++) {
            const int32_t one = 1 << q % 4 * 4;
            vf a[QL_GEMV_ROWS];
#pragma GCC unroll 4
            for (int r = 0; r < m; r++) { a[r] = v_set1(x[r * g->ldx + q]); }
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                vi code = vi_and(four[q / 4][v], vi_set1(0x7f800000 | 15 * one));
                vf value = v_sub(vi_as_vf(code), v_set1((float)(0x800000 + 8 * one)));
#pragma GCC unroll 4
                for (int r = 0; r < m; r++) { sum[r][v] = v_fma(value, a[r], sum[r][v]); }
            }
        }
    }
}

/* A table, VL rows of W. Of 16 floats it is two registers: a look-up of 8 codes would be two permutes, a blend and a shift for either. Of
 * 32 codes it is a shuffle for each byte of a float and eight that bring the bytes together: columns 0 2 4 6 or 1 3 5 7 of two
 * rows a vector, and x in that order. */
ALWAYS_INLINE void table_group(vf (*sum)[VECTORS], const gemv *g, const uint32_t *p, const float *x, int64_t blocks, int64_t ahead,
                               v_bytes values, const int m) {
    vf fours[QL_GEMV_ROWS][4]; /* [i]: rows i and 4 + i of W */
#pragma GCC unroll 4
    for (int r = 0; r < m; r++) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) { fours[r][i] = v_zero(); }
    }
    for (int64_t b = 0; b < blocks; b++, p += 32, x += 8) {
        v_prefetch((const char *)p + ahead);
        vi word = vi_load(p);
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; odd++) {
            vf value[4];
            v_bytes_get(value, values, vi_and(odd ? vi_shr(word, 4) : word, vi_set1(0x0f0f0f0f)));
#pragma GCC unroll 4
            for (int r = 0; r < m; r++) {
                vf a = v_set4(x + r * g->ldx + 4 * odd);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) { fours[r][i] = v_fma(value[i], a, fours[r][i]); }
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < m; r++) { sum[r][0] = v_add(sum[r][0], v_sums4(fours[r])); }
}

ALWAYS_INLINE void nibble_group(vf (*sum)[VECTORS], const gemv *g, const uint32_t *p, const float *x, int64_t blocks, int64_t ahead,
                                nibble_values values, const int looked_up, const int vectors, const int m) {
    if (looked_up) {
        table_group(sum, g, p, x, blocks, ahead, values, m);
    } else {
        whole_group(sum, g, p, x, blocks, ahead, vectors, m);
    }
}

/* a row of x as those two read it */
static void nibble_x(float *x, int64_t columns, int looked_up) {
    static const float parts[8] = {1, 0x1p-4f, 0x1p-8f, 0x1p-12f, 1, 0x1p-4f, 0x1p-8f, 0x1p-12f};
    static const int32_t order[8] = {0, 2, 4, 6, 1, 3, 5, 7};
    for (int64_t j = 0; j < columns; j += 8) {
        vf a = v_load(x + j);
        v_store(x + j, looked_up ? v_permute(a, vi_load(order)) : v_mul(a, v_load(parts)));
    }
}
#endif

/* `vectors` VL rows of W, from lane `lane` of the panel at p on, whose first row is i, for all m rows of x */
ALWAYS_INLINE void nibble_lanes(const gemv *g, const uint32_t *p, nibble_values values, int64_t lane, int64_t i, const int looked_up,
                                const int vectors, const int m) {
    const ql_packed_layout *l = &g->l;
    const float *x = g->x;
    const int panels = vectors * VL > 32 ? PANELS : 1;
    vf total[QL_GEMV_ROWS][VECTORS];
#pragma GCC unroll 4
    for (int r = 0; r < m; r++) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) { total[r][v] = v_zero(); }
    }
    for (int64_t group = 0; group < l->groups; group++) {
        vf sum[QL_GEMV_ROWS][VECTORS];
        int64_t blocks = group == l->groups - 1 ? l->last : l->blocks;
#pragma GCC unroll 4
        for (int r = 0; r < m; r++) {
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                const uint32_t *offsets = p + v / (32 / VL) * l->panel + 32 + (lane + v % (32 / VL) * VL) / 2; /* int16 */
                sum[r][v] = l->zeros ? offset_term(g, offsets, r, group) : v_zero();
            }
        }
        int64_t ahead = ahead_of(l, group, panels, NIBBLES_AHEAD);
#pragma GCC unroll 4
        for (int v = 0; V_AVX512 && v < vectors; v++) { v_prefetch((const char *)lanes_of(p + lane, l, v, 32) + ahead); }
        nibble_group(sum, g, p + l->head + lane, x, blocks, ahead, values, looked_up, vectors, m);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            vf scale = v_load((const float *)(const void *)lanes_of(p + lane, l, v, 32));
#pragma GCC unroll 4
            for (int r = 0; r < m; r++) { total[r][v] = v_fma(sum[r][v], scale, total[r][v]); }
        }
        p += l->head + blocks * 32, x += blocks * 8;
    }
#pragma GCC unroll 4
    for (int r = 0; r < m; r++) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            int64_t row = i + v / (32 / VL) * 32 + lane + v % (32 / VL) * VL;
            store_lanes(g->y, g->w->n, r, row, total[r][v], g->accumulate);
        }
    }
}

ALWAYS_INLINE void nibble_panels(const gemv *g, int64_t panel, int64_t end, const int looked_up, const int m) {
    nibble_values values = nibble_values_of(g->table);
    const int alone = V_AVX512 ? 2 : looked_up ? 1 : m > 2 ? 2 : 4; /* vectors of a panel at a time, and */
    const int at_once = m > 2 ? 1 : PANELS;                        /* panels: registers */
    const uint32_t *p = (const uint32_t *)g->codes + panel * g->l.panel;
    for (; panel + at_once <= end; panel += at_once, p += at_once * g->l.panel) {
        for (int64_t lane = 0; lane < 32; lane += alone * VL) {
            nibble_lanes(g, p, values, lane, panel * 32, looked_up, at_once * alone, m);
        }
    }
    for (int64_t lane = 0; panel < end && lane < 32; lane += alone * VL) {
        nibble_lanes(g, p, values, lane, panel * 32, looked_up, alone, m);
    }
}

ALWAYS_INLINE void nibble_rows(const gemv *g, int64_t task, const int looked_up) {
    int64_t panel = task * g->part, end = at_most((task + 1) * g->part, g->l.panels);
    switch (g->m) {
    case 1: nibble_panels(g, panel, end, looked_up, 1); break;
    case 2: nibble_panels(g, panel, end, looked_up, 2); break;
    case 3: nibble_panels(g, panel, end, looked_up, 3); break;
    default: nibble_panels(g, panel, end, looked_up, 4); break;
    }
}

static void nibble_task(void *context, int64_t task) { nibble_rows(context, task, 1); }
#if !V_AVX512
static void whole_task(void *context, int64_t task) { nibble_rows(context, task, 0); }
#endif

/* rows [i, i + 4 VL) of W, from lane `lane` of a panel of 64, for one row of x, that of the tables */
static void sums_lanes(const gemv *g, const uint32_t *p, int64_t lane, int64_t i) {
    const ql_packed_layout *l = &g->l;
    const float *table = g->table;
    vf total[4] = {v_zero(), v_zero(), v_zero(), v_zero()};
    for (int64_t group = 0; group < l->groups; group++) {
        const float *scales = (const float *)(const void *)p + lane;
        vf sum[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) {
            const int16_t *offsets = (const int16_t *)(const void *)(p + 64) + lane + v * VL;
            sum[v] = l->zeros ? offset_term(g, offsets, 0, group) : v_zero();
        }
        p += l->head;
        int64_t words = (group == l->groups - 1 ? l->last : l->blocks) * l->words;
        for (int64_t word = 0; word < words; word++, p += 64) {
            const char *bytes = (const char *)(p + lane);
            vi codes[4];
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++) { v_prefetch(bytes + v * 4 * VL + AHEAD); }
#pragma GCC unroll 11
            for (int q = 0; q < WINDOWS; q++, table += VL) {
                const unsigned bit = (unsigned)(q * WINDOW), first = V_AVX512 ? bit / 8 : 0; /* byte loaded */
                vf values = v_load(table);
#pragma GCC unroll 4
                for (int v = 0; v < 4; v++) {
                    if (bit == 8 * first) { codes[v] = vi_load(bytes + v * 4 * VL + first); }
                    sum[v] = v_add(sum[v], v_permute(values, bit > 8 * first ? vi_shr(codes[v], bit - 8 * first) : codes[v]));
                }
            }
        }
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) { total[v] = v_fma(sum[v], v_load(scales + v * VL), total[v]); }
    }
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) { store_lanes(g->y, g->w->n, 0, i + v * VL, total[v], g->accumulate); }
}

static void sums_task(void *context, int64_t task) {
    const gemv *g = context;
    int64_t end = at_most((task + 1) * g->part, g->l.panels);
    for (int64_t panel = task * g->part; panel < end; panel++) {
        const uint32_t *p = (const uint32_t *)g->codes + panel * g->l.panel;
        for (int64_t lane = 0; lane < 64; lane += 4 * VL) { sums_lanes(g, p, lane, panel * 64 + lane); }
    }
}

/* what a window of `count` activations may stand for: line[i] = sum over c of x[c] * values[c][i] */
static inline void sums_line(float *line, const float *x, float (*values)[VL], int64_t count) {
    vf sum = v_mul(v_set1(x[0]), v_load(values[0]));
    for (int64_t c = 1; c < count; c++) { sum = v_fma(v_set1(x[c]), v_load(values[c]), sum); }
    v_store(line, sum);
}

/* The tables of a row of x, `columns` long, in the order in which the words of W need them. A code's bit 0 is worth 0 or 1, bit 1 is
 * worth -2 or 0, bit 2 (in a word of its own) -2 or 2. A window of 3 bits starts at either bit of a code; the last of a word has 2. */
static void sums_table(float *table, const float *x, int64_t columns, int bits) {
    alignas(64) float pair[2][2][VL] = {{{0}}}, third[WINDOW][VL];
    for (int i = 0; i < VL; i++) {
        for (int t = 0; t < WINDOW; t++) {
            int bit = i >> t & 1;
            pair[0][t / 2][i] += (float)(t % 2 ? 2 * bit - 2 : bit);
            if (WINDOW == 3) { pair[1][(t + 1) / 2][i] += (float)(t % 2 ? bit : 2 * bit - 2); }
            third[t][i] = (float)(4 * bit - 2);
        }
    }
    int64_t step = bits == 3 ? 32 : 16;
    for (int64_t j = 0; j < columns; j += step) {
        for (int64_t first = j; first < j + step; first += 16) {
            for (int64_t bit = 0; bit < 32; bit += WINDOW, table += VL) {
                sums_line(table, x + first + bit / 2, pair[bit % 2], at_most(2, 16 - bit / 2));
            }
        }
        float by_bit[32]; /* as formats/packed.h has them */
        for (int64_t q = 0; bits == 3 && q < 8; q++) { memcpy(by_bit + 4 * q, x + j + q % 2 * 16 + q / 2 * 4, 4 * sizeof *x); }
        for (int64_t bit = 0; bits == 3 && bit < 32; bit += WINDOW, table += VL) {
            sums_line(table, by_bit + bit, third, at_most(WINDOW, 32 - bit));
        }
    }
}

/* ---- rows ----------------------------------------------------------------------------------------------------- */

/* the first `count` of VL values of a row from column j, the rest 0 */
ALWAYS_INLINE vf row_values(const int format, const char *row, int64_t j, int64_t count) {
    const int64_t size = format == QL_F32 ? 4 : format == QL_F16 || format == QL_BF16 ? 2 : 1;
    alignas(64) char some[4 * VL] = {0};
    const char *p = row + j * size;
    if (count < VL) {
        if (format == QL_AFFINE) { memset(some, 128, VL); } /* the code of 0 */
        memcpy(some, p, count > 0 ? (size_t)(count * size) : 0);
        p = some;
    }
    switch (format) {
    case QL_F32: return v_load((const float *)(const void *)p);
    case QL_F16: return v_load_f16(p);
    case QL_BF16: return v_load_bf16(p);
    case QL_INT8: return vi_to_vf(vi_load_i8(p));
    default: return vi_to_vf(vi_sub(vi_load_u8(p), vi_set1(128)));
    }
}

ALWAYS_INLINE void add_columns(vf (*sum)[4], const gemv *g, const char *codes, int64_t stride, int64_t j, const int format, const int rows,
                               const int m) {
#pragma GCC unroll 4
    for (int a = 0; a < rows; a++) {
        vf value = row_values(format, codes + a * stride, j, VL);
#pragma GCC unroll 8
        for (int r = 0; r < m; r++) { sum[r][a] = v_fma(value, v_load(g->x + r * g->ldx + j), sum[r][a]); }
    }
}

/* sum[r][a] += row a of W . row r of x, over columns [j, end), VL lanes of them; stride: bytes from one row to the next; whole: they are
 * known to be whole cache lines */
ALWAYS_INLINE void row_products(vf (*sum)[4], const gemv *g, const char *codes, int64_t stride, int64_t j, int64_t end,
                                const int format, const int whole, const int rows, const int m) {
    const int64_t size = format == QL_F32 ? 4 : format == QL_F16 || format == QL_BF16 ? 2 : 1;
    const int vectors = LINE / (int)(VL * size);
    for (; j + vectors * VL <= end; j += vectors * VL) {
#pragma GCC unroll 4
        for (int a = 0; a < rows; a++) { v_prefetch(codes + a * stride + j * size + ROW_AHEAD); }
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) { add_columns(sum, g, codes, stride, j + v * VL, format, rows, m); }
    }
    if (whole) { return; }
    for (; j + VL <= end; j += VL) { add_columns(sum, g, codes, stride, j, format, rows, m); }
#pragma GCC unroll 4
    for (int a = 0; j < end && a < rows; a++) {
        vf value = row_values(format, codes + a * stride, j, end - j);
#pragma GCC unroll 8
        for (int r = 0; r < m; r++) { sum[r][a] = v_fma(value, v_load_tail(g->x + r * g->ldx + j, end - j), sum[r][a]); }
    }
}

/* affine codes have a scale a group; whole: groups are cache lines */
ALWAYS_INLINE void row_groups(vf (*total)[4], const gemv *g, const char *codes, int64_t stride, const float *scales, int64_t apart,
                              const int whole, const int rows, const int m) {
    const int64_t groups = g->l.groups, size = g->l.group, k = g->w->k;
    for (int64_t j = 0; j < k; j += size, scales++) {
        vf sum[QL_GEMV_ROWS][4];
#pragma GCC unroll 4
        for (int r = 0; r < m; r++) {
#pragma GCC unroll 4
            for (int a = 0; a < rows; a++) { sum[r][a] = v_zero(); }
        }
        row_products(sum, g, codes, stride, j, at_most(j + size, k), QL_AFFINE, whole, rows, m);
#pragma GCC unroll 4
        for (int a = 0; a < rows; a++) {
            const float *scale = scales + a * apart * groups;
            v_prefetch(scale + SCALES_AHEAD);
#pragma GCC unroll 4
            for (int r = 0; r < m; r++) { total[r][a] = v_fma(sum[r][a], v_set1(*scale), total[r][a]); }
        }
    }
}

/* what the zeros of row i of W take off its product with row r of x */
static float row_offset(const gemv *g, int64_t i, int64_t r) {
    const int64_t groups = g->l.groups, middle = ql_affine_symmetric_zero(g->w->bits);
    const uint8_t *zeros = g->w->zeros + i * groups;
    const float *scales = g->w->scales + i * groups, *sums = g->sums + r * groups;
    vf offsets = v_zero();
    int64_t group = 0;
    for (; group + VL <= groups; group += VL) {
        vf zero = vi_to_vf(vi_sub(vi_load_u8(zeros + group), vi_set1((int32_t)middle)));
        offsets = v_fma(v_mul(zero, v_load(scales + group)), v_load(sums + group), offsets);
    }
    float offset = v_sum(offsets);
    for (; group < groups; group++) { offset += (float)(zeros[group] - middle) * scales[group] * sums[group]; }
    return offset;
}

/* rows i, i + apart, … of W, `rows` of them */
ALWAYS_INLINE void row_lanes(const gemv *g, int64_t i, int64_t apart, const int format, const int rows, const int m) {
    const ql_weight *w = g->w;
    const int64_t size = format == QL_F32 ? 4 : format == QL_F16 || format == QL_BF16 ? 2 : 1;
    int64_t row = format == QL_AFFINE && w->bits == 8 ? 4 * ql_words_per_row(w->k, 8) : size * w->k, stride = apart * row;
    const char *codes = (const char *)g->codes + i * row;
    vf total[FLOAT_ROWS][4];
#pragma GCC unroll 8
    for (int r = 0; r < m; r++) {
#pragma GCC unroll 4
        for (int a = 0; a < rows; a++) { total[r][a] = v_zero(); }
    }
    if (format != QL_AFFINE) {
        row_products(total, g, codes, stride, 0, w->k, format, 0, rows, m);
    } else if (g->l.group % LINE == 0 && w->k % LINE == 0) {
        row_groups(total, g, codes, stride, w->scales + i * g->l.groups, apart, 1, rows, m);
    } else {
        row_groups(total, g, codes, stride, w->scales + i * g->l.groups, apart, 0, rows, m);
    }
#pragma GCC unroll 8
    for (int r = 0; r < m; r++) {
#pragma GCC unroll 4
        for (int a = 0; a < rows; a++) {
            float sum = v_sum(total[r][a]), *y = g->y + r * w->n + i + a * apart;
            if (format == QL_INT8) { sum *= QL_INT8_STEP * w->scales[i + a * apart]; }
            if (format == QL_AFFINE && w->zeros != NULL) { sum -= row_offset(g, i + a * apart, r); }
            *y = g->accumulate ? *y + sum : sum;
        }
    }
}

/* rows [i, i + VL) of a float32 W of few columns (an adapter's B), a lane a row: adding up lanes would cost more than the rest */
ALWAYS_INLINE void narrow_rows(const gemv *g, int64_t i, const int m) {
    int64_t k = g->w->k;
    const float *w = (const float *)(const void *)g->codes + i * k;
    vf sum[FLOAT_ROWS], columns[4];
    for (int r = 0; r < m; r++) { sum[r] = v_zero(); }
    for (int64_t s = 0; s < k; s += 4) {
        v_transpose4(columns, w + s, k);
        for (int q = 0; q < 4; q++) {
            for (int r = 0; r < m; r++) { sum[r] = v_fma(columns[q], v_set1(g->x[r * g->ldx + s + q]), sum[r]); }
        }
    }
    for (int r = 0; r < m; r++) {
        float *y = g->y + r * g->w->n + i;
        v_store(y, g->accumulate ? v_add(v_load(y), sum[r]) : sum[r]);
    }
}

ALWAYS_INLINE void row_range(const gemv *g, int64_t i, int64_t end, const int format, const int m) {
    const int rows = m > 6 ? 3 : V_AVX512 || m < 3 ? 4 : 2; /* registers */
    int narrow = format == QL_F32 && g->w->k <= NARROW && g->w->k % 4 == 0;
    for (; narrow && i + VL <= end; i += VL) { narrow_rows(g, i, m); }
    int64_t apart = (end - i) / rows, first = i; /* as many streams of memory as rows at a time */
    for (; i < first + apart; i++) { row_lanes(g, i, apart, format, rows, m); }
    for (i = first + rows * apart; i < end; i++) { row_lanes(g, i, 0, format, 1, m); }
}

#define ROW_TASK(FORMAT)                                                                           \
    static void row_task_##FORMAT(void *context, int64_t task) {                                   \
        const gemv *g = context;                                                                   \
        int64_t i = task * g->part, end = at_most(i + g->part, g->w->n);                           \
        switch (g->m) {                                                                            \
        case 1: row_range(g, i, end, FORMAT, 1); break;                                            \
        case 2: row_range(g, i, end, FORMAT, 2); break;                                            \
        case 3: row_range(g, i, end, FORMAT, 3); break;                                            \
        default: row_range(g, i, end, FORMAT, 4); break;                                           \
        }                                                                                          \
    }
ROW_TASK(QL_F16)
ROW_TASK(QL_BF16)
ROW_TASK(QL_INT8)
ROW_TASK(QL_AFFINE)

static void few_floats(const gemv *g, int64_t i, int64_t end) {
    switch (g->m) {
    case 1: row_range(g, i, end, QL_F32, 1); break;
    case 2: row_range(g, i, end, QL_F32, 2); break;
    case 3: row_range(g, i, end, QL_F32, 3); break;
    case 4: row_range(g, i, end, QL_F32, 4); break;
#if V_AVX512
    case 5: row_range(g, i, end, QL_F32, 5); break;
    case 6: row_range(g, i, end, QL_F32, 6); break;
    case 7: row_range(g, i, end, QL_F32, 7); break;
    default: row_range(g, i, end, QL_F32, 8); break;
#endif
    }
}

/* more rows of x than registers hold: some after the others, with as much of W as the second-level cache keeps */
static void float_task(void *context, int64_t task) {
    const gemv *g = context;
    int64_t i = task * g->part, end = at_most(i + g->part, g->w->n), rows = pieces(g->m, pieces(g->m, FLOAT_ROWS));
    int64_t at_once = rows < g->m ? round_up(pieces(FLOAT_BYTES, g->w->k * (int64_t)sizeof(float)), VL) : g->part;
    for (; i < end; i += at_once) {
        for (int64_t r = 0; r < g->m; r += rows) {
            gemv some = *g;
            some.x += r * g->ldx, some.y += r * g->w->n, some.m = at_most(rows, g->m - r);
            few_floats(&some, i, at_most(i + at_once, end));
        }
    }
}

/* ---- the product ---------------------------------------------------------------------------------------------- */

/* x as the kernels read it: stored order, and in panels the columns that fill a group's last block, 0 */
static void arrange(float *out, const float *x, const ql_weight *w, const ql_packed_layout *l) {
    int64_t padded = l->rows > 0 ? l->blocks * l->step : l->group;
    for (int64_t group = 0; group < l->groups; group++, out += padded) {
        int64_t j = group * l->group, count = at_most(l->group, w->k - j);
        if (w->perm == NULL) {
            memcpy(out, x + j, (size_t)count * sizeof *out);
        } else {
            for (int64_t c = 0; c < count; c++) { out[c] = x[w->perm[j + c]]; }
        }
        int64_t end = l->rows == 0 ? count : group == l->groups - 1 ? l->last * l->step : padded;
        for (int64_t c = count; c < end; c++) { out[c] = 0.0f; }
    }
}

static void group_sums(float *sums, const float *x, int64_t columns, int64_t group, int64_t groups) {
    for (int64_t g = 0; g < groups; g++) {
        vf sum = v_zero();
        for (int64_t j = g * group, end = at_most(j + group, columns); j < end; j += VL) {
            sum = v_add(sum, v_load_tail(x + j, at_most(VL, end - j)));
        }
        sums[g] = v_sum(sum);
    }
}

/* The rest is for `count` products of one x, alike: all their tasks are one loop. */

static void run_rows(gemv *g, int64_t count) {
    void (*const tasks[QL_FORMAT_COUNT])(void *, int64_t) = {[QL_F32] = float_task, [QL_F16] = row_task_QL_F16,
        [QL_BF16] = row_task_QL_BF16, [QL_INT8] = row_task_QL_INT8, [QL_AFFINE] = row_task_QL_AFFINE};
    const ql_weight *w = g->w;
    int64_t bytes = w->k * (w->format == QL_F32 ? 4 : w->format == QL_F16 || w->format == QL_BF16 ? 2 : 1), rows = 0;
    ql_loop loops[QL_PRODUCTS];
    for (int64_t i = 0; i < count; i++) { rows += g[i].w->n; }
    for (int64_t i = 0; i < count; i++) {
        g[i].part = round_up(part_of(rows, bytes, 1, g->m), VL); /* whichever rows are left over are the last of W */
        loops[i] = (ql_loop){pieces(g[i].w->n, g[i].part), tasks[w->format], &g[i]};
    }
    ql_parallel_loops(loops, count);
}

static void run_panels(gemv *g, int64_t count, int64_t at_once, void (*task)(void *context, int64_t i)) {
    int64_t panels = 0;
    ql_loop loops[QL_PRODUCTS];
    for (int64_t i = 0; i < count; i++) { panels += g[i].l.panels; }
    for (int64_t i = 0; i < count; i++) {
        g[i].part = part_of(panels, 4 * g->l.panel, at_once, g->m);
        loops[i] = (ql_loop){pieces(g[i].l.panels, g[i].part), task, &g[i]};
    }
    ql_parallel_loops(loops, count);
}

static void run_nibbles(gemv *g, int64_t count) {
    alignas(64) float values[16];
    for (int i = 0; i < 16; i++) {
        values[i] = g->w->format == QL_NF4 ? ql_nf4_values[i] : g->w->format == QL_FP4 ? ql_fp4_values[i] : (float)(i - 8);
    }
    for (int64_t i = 0; i < count; i++) { g[i].table = values; }
#if V_AVX512
    run_panels(g, count, PANELS, nibble_task);
#else
    run_panels(g, count, PANELS, g->w->format == QL_AFFINE ? whole_task : nibble_task);
#endif
}

/* one row of x after the other, since each has its own tables */
static void run_sums(const gemv *all, int64_t count, float *table) {
    for (int64_t r = 0; r < all->m; r++) {
        gemv g[QL_PRODUCTS];
        sums_table(table, all->x + r * all->ldx, all->l.columns, all->w->bits);
        for (int64_t i = 0; i < count; i++) {
            g[i] = all[i];
            g[i].y += r * g[i].w->n, g[i].m = 1, g[i].table = table;
            g[i].sums = all->sums == NULL ? NULL : all->sums + r * all->l.groups;
        }
        run_panels(g, count, 1, sums_task);
    }
}

typedef struct { int64_t x, sums, table; } scratch_sizes; /* floats, each a multiple of 16 */

/* 0: no memory to work in */
static int run(gemv *g, int64_t count, const float *x, const scratch_sizes *s) {
    int64_t size = s->x + s->sums + s->table;
    float *scratch = size > 0 ? ql_scratch((size_t)size * sizeof *scratch) : NULL;
    if (size > 0 && scratch == NULL) { return 0; }
    const ql_packed_layout *l = &g->l;
    float *sums = size > 0 ? scratch + s->x : NULL;
    const float *arranged = s->x > 0 ? scratch : x;
    for (int64_t r = 0; r < g->m && s->x > 0; r++) { arrange(scratch + r * g->ldx, x + r * g->w->k, g->w, l); }
    int64_t group = l->rows > 0 ? l->blocks * l->step : l->group, columns = l->rows > 0 ? l->columns : g->w->k;
    for (int64_t r = 0; r < g->m && s->sums > 0; r++) {
        group_sums(sums + r * l->groups, arranged + r * g->ldx, columns, group, l->groups);
    }
#if !V_AVX512
    for (int64_t r = 0; r < g->m && l->rows == 32; r++) { nibble_x(scratch + r * g->ldx, columns, g->w->format != QL_AFFINE); }
#endif
    for (int64_t i = 0; i < count; i++) { g[i].x = arranged, g[i].sums = s->sums > 0 ? sums : NULL; }
    switch (l->rows) {
    case 0: run_rows(g, count); break;
    case 32: run_nibbles(g, count); break;
    default: run_sums(g, count, sums + s->sums); break;
    }
    return 1;
}

static int64_t lines(int64_t floats) { return round_up(floats, 16); }

/* whether the kernels read another x than the caller's (nibble_x, too) */
static int is_arranged(const ql_weight *w, const ql_packed_layout *l) {
    return w->perm != NULL || (l->rows > 0 && l->columns != w->k) || (!V_AVX512 && l->rows == 32);
}

/* 0: this weight or this m has no such kernel */
static int prepare(gemv *of, const ql_linear_product *product, int64_t m, int accumulate) {
    const ql_weight *w = product->w;
    const void *packed = __atomic_load_n(&w->packed, __ATOMIC_ACQUIRE);
    gemv g = {.y = product->y, .w = w, .l = ql_packed_layout_of(w), .m = m, .ldx = w->k, .accumulate = accumulate};
    int in_place = w->format == QL_AFFINE ? w->bits == 8 : w->format != QL_NF4 && w->format != QL_FP4;
    g.codes = in_place ? w->codes : packed;
    int64_t most = w->format == QL_F32 && V_AVX512 ? QL_GEMV_TILE_ROWS : QL_GEMV_ROWS;
    if (m < 1 || m > most || w->n < 1 || g.codes == NULL || (!in_place && ql_packed_nbytes(w) == 0)) { return 0; }
    if (g.l.rows == 0) { g.l.groups = pieces(w->k, g.l.group); }
    if (is_arranged(w, &g.l)) { g.ldx = lines(g.l.rows > 0 ? g.l.columns : w->k); }
    *of = g;
    return 1;
}

int V_NAME(gemv_forward)(const ql_linear_product *products, int64_t count, const float *x, int64_t m, int accumulate) {
    gemv g[QL_PRODUCTS];
    for (int64_t i = 0; i < count; i++) {
        if (!prepare(&g[i], &products[i], m, accumulate)) { return 0; }
    }
    const ql_weight *w = g->w;
    scratch_sizes s = {0};
    if (is_arranged(w, &g->l)) { s.x = m * g->ldx; }
    if (w->zeros != NULL) { s.sums = lines(m * g->l.groups); }
    if (g->l.rows == 64) { s.table = lines(g->l.columns / g->l.step * g->l.words * WINDOWS * VL); }
    return run(g, count, x, &s);
}
