/* packed.h: the layout of ql_weight.packed on a CPU, the order in which a product with few rows of activations (decode) streams a
 * weight of 2 to 7 bits once from front to back. quant/pack.c writes it, x86/gemv_body.h, bytes_body.h and few_amx.c read it.
 *
 * A panel is `rows` consecutive rows of W, the last one padded with zero codes. A panel holds its groups one after another; a
 * group holds
 *     float scales[rows]
 *     int16 offsets[rows]        zero - 2^(bits-1), only where the weight has zeros
 *     uint32 words[blocks][words][rows]
 * and a block is `step` consecutive columns; a group whose columns do not fill its last block is padded with columns that meet
 * activations of 0. All of a panel is a multiple of 64 bytes. The words of one row and block:
 *   4 bits (affine, nf4, fp4)  1 word, code q of 8 in bits 4q..
 *   2 bits                     1 word, code q of 16 in bits 2q..: a nibble is a pair of codes
 *   3 bits                     3 words: the low 2 bits of codes 0..15, those of 16..31, and bit 2 of all 32: byte b has those
 *                              of codes 4b..4b+3, then those of 16+4b..16+4b+3
 * Codes of 5 to 7 bits have no panels: they are bytes, (n, k) row-major, code + 128 - 2^(bits-1). */
#ifndef QL_FORMAT_PACKED_H
#define QL_FORMAT_PACKED_H

#include "weight.h"

enum {
    QL_GEMV_ROWS = 4,       /* rows of activations of such a product at most, */
    QL_GEMV_TILE_ROWS = 16, /* on tiles, */
    QL_GEMV_INT8_ROWS = 2,  /* of int8 in vectors, where tiles take more; of other integers 1 */
    QL_GEMV_BYTE_GROUP = 32,   /* columns of codes of 5 to 8 bits that share a scale there: fewer leave tiles mostly empty */
    QL_GEMV_TABLE_GROUP = 256, /* of nf4 and fp4, at most: the sums of their 16-bit integers are far from the end of an int32 */
    QL_GEMV_GROUP = 1 << 16,   /* of all: the same of products of bytes */
    QL_PACKED_ALIGN = 64,
    QL_MAX_PADDING = 3      /* no more than 3/2 of the columns */
};

typedef struct {
    int rows, step, words;  /* rows 0: not in panels */
    int zeros;              /* whether offsets are there */
    int64_t group, groups;  /* columns that share a scale, groups of a row */
    int64_t blocks, last;   /* blocks of a group, of the last group of a row */
    int64_t head;           /* uint32 before a group's blocks */
    int64_t panel, panels;  /* uint32 of a panel; how many panels */
    int64_t columns;        /* of a row, padding included */
} ql_packed_layout;

/* Columns that share a scale, for every format; 0 where the blocks of nf4 and fp4 cross rows. */
static inline int64_t ql_row_group(const ql_weight *w) {
    if (w->format == QL_AFFINE) { return w->group < w->k ? w->group : w->k; }
    if (w->format != QL_NF4 && w->format != QL_FP4) { return w->k; }
    return w->k % w->group == 0 ? w->group : w->group % w->k == 0 ? w->k : 0;
}

static inline int ql_packs_bytes(const ql_weight *w) { return w->format == QL_AFFINE && w->bits > 4 && w->bits < 8; }

static inline ql_packed_layout ql_packed_layout_of(const ql_weight *w) {
    ql_packed_layout l = {0};
    int bits = w->format == QL_NF4 || w->format == QL_FP4 ? 4 : w->format == QL_AFFINE ? w->bits : 0;
    l.group = ql_row_group(w);
    if (bits < 2 || bits > 4 || l.group == 0) { return l; }
    l.rows = bits == 4 ? 32 : 64, l.step = bits == 4 ? 8 : bits == 2 ? 16 : 32, l.words = bits == 3 ? 3 : 1;
    l.zeros = w->zeros != NULL;
    l.groups = (w->k + l.group - 1) / l.group;
    l.blocks = (l.group + l.step - 1) / l.step;
    l.last = (w->k - (l.groups - 1) * l.group + l.step - 1) / l.step;
    l.head = l.rows + (l.zeros ? l.rows / 2 : 0);
    int64_t blocks = (l.groups - 1) * l.blocks + l.last;
    l.columns = blocks * l.step;
    l.panel = l.groups * l.head + blocks * l.words * l.rows;
    l.panels = (w->n + l.rows - 1) / l.rows;
    if (2 * l.columns > QL_MAX_PADDING * w->k + 2 * l.step) { l.rows = 0; } /* tiny groups: mostly padding */
    return l;
}

/* rows of activations of a product on tiles that has a kernel for few of them; precise: as exact as float32 (ql_precise) */
static inline int64_t ql_gemv_tile_rows(const ql_weight *w, int precise) {
    int64_t group = ql_row_group(w);
    int looked_up = w->format == QL_NF4 || w->format == QL_FP4, bytes = w->format == QL_INT8 || (w->format == QL_AFFINE && w->bits > 4);
    if (bytes && group < QL_GEMV_BYTE_GROUP) { return QL_GEMV_ROWS; }
    if (looked_up && (group > QL_GEMV_TABLE_GROUP || precise)) { return QL_GEMV_ROWS; }
    return group > QL_GEMV_GROUP ? QL_GEMV_ROWS : QL_GEMV_TILE_ROWS;
}

/* bytes of a packed copy; 0: this weight has none, it is read where it is or decoded */
static inline int64_t ql_packed_nbytes(const ql_weight *w) {
    if (ql_packs_bytes(w)) { return w->n * w->k; }
    ql_packed_layout l = ql_packed_layout_of(w);
    return l.rows == 0 ? 0 : l.panels * l.panel * 4;
}

#endif
