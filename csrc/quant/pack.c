/* pack.c: writes the layout of formats/packed.h, panel by panel, in parallel. */
#include "pack.h"

#include "../core/pages.h"

#include <pthread.h>
#include <string.h> /* memcpy */

typedef struct {
    const ql_weight *w;
    ql_packed_layout l;
    void *out;
} pack_context;

static uint32_t code_at(const ql_weight *w, int64_t i, int64_t j) {
    if (w->format != QL_AFFINE) { return ql_nibble(w->codes, i * w->k + j); }
    return ql_code_get((const uint32_t *)w->codes + i * ql_words_per_row(w->k, w->bits), j, w->bits);
}

/* `count` codes of row i from column j as the words of one row of a block */
static void pack_codes(uint32_t words[3], const ql_weight *w, int64_t i, int64_t j, int64_t count) {
    int bits = w->format == QL_AFFINE ? w->bits : 4;
    words[0] = words[1] = words[2] = 0;
    for (int64_t q = 0; q < count; q++) {
        uint32_t code = code_at(w, i, j + q);
        if (bits == 3) {
            words[q / 16] |= (code & 3) << (2 * (q % 16));
            words[2] |= (code >> 2) << (q % 16 / 4 * 8 + q / 16 * 4 + q % 4);
        } else {
            words[0] |= code << (bits * q);
        }
    }
}

/* the same for a whole block; codes that already lie as a word asks are copied */
static void pack_block(uint32_t words[3], const ql_weight *w, int64_t i, int64_t j, int step) {
    if (w->format == QL_AFFINE && w->bits != 3 && j % step == 0) {
        words[0] = ((const uint32_t *)w->codes)[i * ql_words_per_row(w->k, w->bits) + j / step];
    } else if (w->format != QL_AFFINE && (i * w->k + j) % 2 == 0) {
        uint32_t bytes; /* the even element of a byte is in its high nibble */
        memcpy(&bytes, (const uint8_t *)w->codes + (i * w->k + j) / 2, sizeof bytes);
        words[0] = (bytes & 0x0f0f0f0fu) << 4 | (bytes >> 4 & 0x0f0f0f0fu);
    } else {
        pack_codes(words, w, i, j, step);
    }
}

static float scale_at(const ql_weight *w, const ql_packed_layout *l, int64_t i, int64_t g) {
    if (w->format == QL_AFFINE) { return w->scales[i * l->groups + g]; }
    return ql_block_scale(w, (i * w->k + g * l->group) / w->group);
}

/* group g of the panel whose first row is i0; returns the end of what it wrote */
static uint32_t *pack_group(uint32_t *out, const ql_weight *w, const ql_packed_layout *l, int64_t i0, int64_t g) {
    int64_t rows = w->n - i0 < l->rows ? w->n - i0 : l->rows, blocks = g == l->groups - 1 ? l->last : l->blocks;
    int64_t first = g * l->group, end = first + l->group < w->k ? first + l->group : w->k;
    float *scales = (float *)(void *)out;
    int16_t *offsets = (int16_t *)(void *)(out + l->rows);
    for (int64_t r = 0; r < rows; r++) {
        scales[r] = scale_at(w, l, i0 + r, g);
        if (l->zeros) {
            offsets[r] = (int16_t)(w->zeros[(i0 + r) * l->groups + g] - (int)ql_affine_symmetric_zero(w->bits));
        }
    }
    out += l->head;
    for (int64_t b = 0; b < blocks; b++, out += l->words * l->rows) {
        int64_t j = first + b * l->step;
        for (int64_t r = 0; r < rows; r++) {
            uint32_t words[3];
            if (j + l->step <= end) { pack_block(words, w, i0 + r, j, l->step); } else { pack_codes(words, w, i0 + r, j, end - j); }
            for (int q = 0; q < l->words; q++) { out[q * l->rows + r] = words[q]; }
        }
    }
    return out;
}

static void pack_panel(void *context, int64_t panel) {
    const pack_context *c = context;
    uint32_t *out = (uint32_t *)c->out + panel * c->l.panel;
    for (int64_t g = 0; g < c->l.groups; g++) { out = pack_group(out, c->w, &c->l, panel * c->l.rows, g); }
}

enum { BYTE_ROWS = 16 };

static void pack_bytes(void *context, int64_t task) {
    const pack_context *c = context;
    const ql_weight *w = c->w;
    uint32_t shift = 128 - ql_affine_symmetric_zero(w->bits);
    for (int64_t i = task * BYTE_ROWS; i < w->n && i < (task + 1) * BYTE_ROWS; i++) {
        uint8_t *row = (uint8_t *)c->out + i * w->k;
        for (int64_t j = 0; j < w->k; j++) { row[j] = (uint8_t)(code_at(w, i, j) + shift); }
    }
}

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void ql_weight_pack(ql_weight *w, int64_t m) {
    int64_t bytes = ql_packed_nbytes(w), most = ql_gemv_tile_rows(w, ql_precise());
    if (__atomic_load_n(&w->packed, __ATOMIC_ACQUIRE) != NULL || bytes == 0 || m > ql_cpu()->gemv_rows || m > most) { return; }
    pthread_mutex_lock(&lock);
    if (w->packed == NULL) {
        pack_context context = {w, ql_packed_layout_of(w), ql_pages_take(bytes)};
        if (context.out != NULL) {
            if (ql_packs_bytes(w)) {
                ql_parallel_for((w->n + BYTE_ROWS - 1) / BYTE_ROWS, pack_bytes, &context);
            } else {
                ql_parallel_for(context.l.panels, pack_panel, &context);
            }
        }
        if (ql_call_stopped()) { /* some panels may be missing */
            ql_pages_release(context.out);
        } else {
            __atomic_store_n(&w->packed, context.out, __ATOMIC_RELEASE);
        }
    }
    pthread_mutex_unlock(&lock);
}

void ql_weight_unpack(ql_weight *w) {
    ql_pages_release(w->packed);
    w->packed = NULL;
}
