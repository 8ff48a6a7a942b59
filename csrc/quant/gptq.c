/* gptq.c: the column loop of GPTQ, left-looking (gptq.h), on tiles of rows of W: rows are independent.
 *
 * A tile is kept as (columns, ROWS): the rows of a column are contiguous, and lie in the lanes of the ops. A block of at
 * most 128 columns is brought up to date with all finished columns by one panel product, then its columns are quantized
 * one by one. Where a group begins, its scales need the weights that the finished columns leave it with: `forecast`
 * continues the recurrence with columns that are not rounded. */
#include "gptq.h"

#include "../core/bits.h"
#include "../core/sizes.h"
#include "scale.h"

#include <math.h>   /* isfinite */
#include <stdatomic.h>
#include <string.h> /* memcpy */

enum {
    ROWS = QL_GPTQ_ROWS,
    BLOCK = 128, /* the reference's: stale scales depend on it */
    STEPS = 16   /* columns updated one by one; the rest of the block gets them together */
};

/* ---- the factor ------------------------------------------------------------------------------------------------ */

typedef struct {
    double *out, *diagonal;
    const float *h;
    const int32_t *order;
    int64_t k;
    double factor, damp;
    int *not_finite; /* set by any task */
} factor_context;

static void matrix_row(void *context, int64_t i) {
    const factor_context *c = context;
    int64_t k = c->k, row = c->order[k - 1 - i];
    int finite = 1;
    for (int64_t j = 0; j <= i; j++) {
        int64_t column = c->order[k - 1 - j];
        double value = row >= column ? c->h[row * k + column] : c->h[column * k + row];
        if (!isfinite(value)) { finite = 0; }
        c->out[i * k + j] = c->factor * value;
    }
    double *diagonal = &c->out[i * k + i];
    *diagonal = (*diagonal == 0.0 ? 1.0 : *diagonal) + c->damp;
    if (!finite) { __atomic_store_n(c->not_finite, 1, __ATOMIC_RELAXED); }
}

ql_status ql_gptq_matrix(double *out, const float *h, const int32_t *order, int64_t k, double factor, double damp) {
    int not_finite = 0;
    factor_context context = {out, NULL, h, order, k, factor, damp, &not_finite};
    ql_parallel_for(k, matrix_row, &context);
    return not_finite ? ql_fail(QL_ENUMERIC, "the Hessian is not finite: the inputs hold NaN or infinity") : QL_OK;
}

/* A block of columns of the Cholesky factor: l (k, k) has finished columns up to `first`. */
typedef struct {
    double *l;
    double *right; /* (depth, count), its rows PADDED apart: what the rows of l are multiplied by */
    int64_t k, first, count;
} panel_context;

enum {
    TASK_ROWS = 56,  /* a slice of `right` stays in the second-level cache while all of them meet it */
    PANEL_ROWS = 28, /* copied together: rows of l may lie in a few sets of the cache */
    PADDED = QL_GPTQ_PANEL + 8
};

/* columns of -L[first .. first + count, :first] become rows of `right` */
static void pack_panel(void *context, int64_t i) {
    const panel_context *c = context;
    int64_t begin = i * QL_GPTQ_PANEL, end = at_most(begin + QL_GPTQ_PANEL, c->first);
    for (int64_t j = 0; j < c->count; j++) {
        const double *row = c->l + (c->first + j) * c->k;
        for (int64_t s = begin; s < end; s++) { c->right[s * PADDED + j] = -row[s]; }
    }
}

/* z (rows, count), rows of l that begin at column `first`, += left (rows, depth) right (depth, count) */
static void add_product(double *z, const double *left, const panel_context *c, const double *right, int64_t rows, int64_t depth) {
    ql_cpu()->feedback_forward(z, left, right, rows, depth, c->count, c->k, PADDED, PADDED);
}

static void copy_rows(double *out, const double *in, const panel_context *c, int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; r++) { memcpy(out + r * PADDED, in + r * c->k, (size_t)columns * sizeof *in); }
}

static void update_rows(void *context, int64_t i) {
    const panel_context *c = context;
    double left[PANEL_ROWS * PADDED];
    int64_t begin = c->first + i * TASK_ROWS, end = at_most(begin + TASK_ROWS, c->k);
    for (int64_t s = 0; s < c->first; s += QL_GPTQ_PANEL) {
        int64_t depth = at_most(QL_GPTQ_PANEL, c->first - s);
        for (int64_t r = begin; r < end; r += PANEL_ROWS) {
            double *row = c->l + r * c->k;
            int64_t rows = at_most(PANEL_ROWS, end - r);
            copy_rows(left, row + s, c, rows, depth);
            add_product(row + c->first, left, c, c->right + s * PADDED, rows, depth);
        }
    }
}

ql_status ql_gptq_factor_update(double *l, int64_t k, int64_t first, int64_t count) {
    if (first == 0) { return QL_OK; }
    double *right = ql_scratch((size_t)(first * PADDED) * sizeof *right);
    if (right == NULL) { return ql_fail(QL_ENOMEM, "no memory for a panel of the Cholesky factor"); }
    panel_context context = {l, right, k, first, count};
    ql_parallel_for(pieces(first, QL_GPTQ_PANEL), pack_panel, &context);
    ql_parallel_for(pieces(k - first, TASK_ROWS), update_rows, &context);
    return QL_OK;
}

static void solve_rows(void *context, int64_t i) {
    const panel_context *c = context;
    double left[PANEL_ROWS * PADDED];
    int64_t begin = c->first + c->count + i * PANEL_ROWS, rows = at_most(PANEL_ROWS, c->k - begin);
    double *row = c->l + begin * c->k + c->first;
    copy_rows(left, row, c, rows, c->count);
    for (int64_t r = 0; r < rows; r++) { memset(row + r * c->k, 0, (size_t)c->count * sizeof *row); }
    add_product(row, left, c, c->right, rows, c->count);
}

void ql_gptq_factor_solve(double *l, const double *inverse, int64_t k, int64_t first, int64_t count) {
    double right[QL_GPTQ_PANEL * PADDED];
    for (int64_t s = 0; s < count; s++) { memcpy(right + s * PADDED, inverse + s * count, (size_t)count * sizeof *right); }
    panel_context context = {l, right, k, first, count};
    ql_parallel_for(pieces(k - first - count, PANEL_ROWS), solve_rows, &context);
}

/* rows i and k-1-i trade places, each reversed: the flat array is reversed */
static void reverse_row_pair(void *context, int64_t i) {
    const factor_context *c = context;
    int64_t k = c->k;
    double *a = c->out + i * k, *b = c->out + (k - 1 - i) * k + k - 1;
    int64_t count = i == k - 1 - i ? k / 2 : k;
    for (int64_t j = 0; j < count; j++) {
        double keep = a[j];
        a[j] = b[-j];
        b[-j] = keep;
    }
}

static void divide_row(void *context, int64_t i) {
    const factor_context *c = context;
    for (int64_t j = i + 1; j < c->k; j++) { c->out[i * c->k + j] /= c->diagonal[j]; }
}

void ql_gptq_feedback(double *l, double *diagonal, int64_t k) {
    factor_context context = {.out = l, .diagonal = diagonal, .k = k};
    ql_parallel_for((k + 1) / 2, reverse_row_pair, &context);
    for (int64_t j = 0; j < k; j++) { diagonal[j] = l[j * k + j]; }
    ql_parallel_for(k, divide_row, &context);
}

/* ---- one tile of rows ------------------------------------------------------------------------------------------ */

typedef struct {
    const ql_gptq_result *result;
    const ql_gptq_problem *p;
    const ql_gptq_options *options;
    const double *importance; /* (k,): H_jj + damping, by step */
    char *work;               /* a part for each task */
    atomic_int_fast64_t next; /* the first tile that no task has taken */
    atomic_int stopped;
} quantize_context;

/* Arrays are (columns, ROWS), in the order of quantization. Rows beyond the last of W are zeros and are not stored. */
typedef struct {
    const ql_gptq_result *result;
    const ql_gptq_problem *p;
    const ql_gptq_options *options;
    const double *importance;
    int64_t row, rows;   /* rows row .. row + rows of W */
    double *error;       /* (k): w - q of finished steps */
    double *forecast;    /* (k): weights that a group begins with */
    double *z;           /* (BLOCK): the block, with the updates of every finished column */
    double *z_begin;     /* (BLOCK): the same as it was when the block began */
    double *scale, *zero; /* (STEPS) */
    double *loss;        /* (1) */
    float *w;            /* (k) */
    uint8_t *codes;      /* (k) */
} tile;

static int64_t tile_bytes(int64_t k) {
    int64_t doubles = 2 * k + 2 * BLOCK + 2 * STEPS + 1;
    return ROWS * (doubles * (int64_t)sizeof(double) + k * (int64_t)(sizeof(float) + 1));
}

int64_t ql_gptq_work_bytes(int64_t k) { return ql_threads() * tile_bytes(k) + (k + 7) / 8 * 8 * (int64_t)sizeof(double); }

static tile tile_in(const quantize_context *c, char *work, int64_t row) {
    int64_t k = c->p->k, left = c->p->n - row;
    tile t = {.result = c->result, .p = c->p, .options = c->options, .importance = c->importance, .row = row,
              .rows = left < ROWS ? left : ROWS};
    t.error = (double *)(void *)work;
    t.forecast = t.error + k * ROWS;
    t.z = t.forecast + k * ROWS;
    t.z_begin = t.z + BLOCK * ROWS;
    t.scale = t.z_begin + BLOCK * ROWS;
    t.zero = t.scale + STEPS * ROWS;
    t.loss = t.zero + STEPS * ROWS;
    t.w = (float *)(void *)(t.loss + ROWS);
    t.codes = (uint8_t *)(t.w + k * ROWS);
    return t;
}

/* t->w: zero where a column has no input */
static void load_weights(const tile *t) {
    const ql_gptq_problem *p = t->p;
    for (int64_t j = 0; j < p->k; j++) {
        int64_t column = p->order[j];
        float *w = t->w + j * ROWS;
        for (int64_t r = 0; r < ROWS; r++) { w[r] = r < t->rows && !p->dead[column] ? p->w[(t->row + r) * p->k + column] : 0.0f; }
    }
    memset(t->loss, 0, ROWS * sizeof *t->loss);
}

/* group of step j, which has its scale at that place of the row */
static inline int64_t group_at(const tile *t, int64_t j) {
    return (t->options->store_ordered ? j : t->p->order[j]) / t->p->group;
}

static inline int64_t scale_index(const tile *t, int64_t r, int64_t group) {
    int64_t groups = (t->p->k + t->p->group - 1) / t->p->group;
    return (t->row + r) * groups + group;
}

/* t->scale, t->zero of steps first .. end; rows that W has not take those of its row above */
static void load_grids(const tile *t, int64_t first, int64_t end) {
    for (int64_t j = first; j < end; j++) {
        double *scale = t->scale + (j - first) * ROWS, *zero = t->zero + (j - first) * ROWS;
        if (j > first && group_at(t, j) == group_at(t, j - 1)) {
            memcpy(scale, scale - ROWS, ROWS * sizeof *scale);
            memcpy(zero, zero - ROWS, ROWS * sizeof *zero);
            continue;
        }
        for (int64_t r = 0; r < ROWS; r++) {
            int64_t place = scale_index(t, r < t->rows ? r : 0, group_at(t, j));
            scale[r] = t->result->scales[place];
            zero[r] = t->result->zeros[place];
        }
    }
}

/* scales of one group from x (count, ROWS) */
static void fit_group(const tile *t, int64_t group, const double *x, const double *importance, int64_t count) {
    ql_steps grids[ROWS];
    ql_fit_grids(grids, x, importance, count, t->options);
    for (int64_t r = 0; r < t->rows; r++) {
        t->result->scales[scale_index(t, r, group)] = (float)grids[r].scale;
        t->result->zeros[scale_index(t, r, group)] = (uint8_t)grids[r].zero;
    }
}

/* scales of all groups from W itself, before the first column */
static void fit_fixed_grids(const tile *t) {
    const ql_gptq_problem *p = t->p;
    double *x = t->forecast;
    for (int64_t j = 0; j < p->k; j++) {
        int keep = !p->dead[j] || t->options->keep_dead;
        for (int64_t r = 0; r < ROWS; r++) { x[j * ROWS + r] = r < t->rows && keep ? p->w[(t->row + r) * p->k + j] : 0.0; }
    }
    for (int64_t first = 0; first < p->k; first += p->group) {
        int64_t count = first + p->group < p->k ? p->group : p->k - first;
        fit_group(t, first / p->group, x + first * ROWS, p->importance + first, count);
    }
}

/* z (end - first, ROWS) = the weights of steps first .. end with the updates of the steps before `before` */
static void update_panel(const tile *t, double *z, int64_t first, int64_t end, int64_t before) {
    for (int64_t i = 0; i < (end - first) * ROWS; i++) { z[i] = t->w[first * ROWS + i]; }
    ql_cpu()->gptq_panel_forward(z, t->error, t->p->feedback + first, before, end - first, t->p->k);
}

/* Steps first .. end, at most STEPS of them, one after another; z holds their columns. Then what they leave to the columns
 * after them, up to `last`. Without codes nothing is rounded: the error of a column is how far it has moved. */
static void run_steps(const tile *t, double *z, int64_t first, int64_t end, int64_t last, int rounded) {
    const ql_gptq_problem *p = t->p;
    double moved[STEPS * ROWS], *error = rounded ? t->error + first * ROWS : moved;
    ql_gptq_steps s = {.w = t->w + first * ROWS, .a = p->feedback + first * p->k + first, .diagonal = p->diagonal + first,
                       .scale = t->scale, .zero = t->zero, .maxq = (double)((1 << t->options->bits) - 1), .lda = p->k,
                       .count = end - first};
    if (rounded) { load_grids(t, first, end); }
    ql_cpu()->gptq_steps_forward(rounded ? t->codes + first * ROWS : NULL, error, z, t->loss, &s);
    ql_cpu()->gptq_panel_forward(z + s.count * ROWS, error, s.a + s.count, s.count, last - end, p->k);
}

/* t->forecast (end - from): the weights of steps from .. end once every step before `from` is finished, moved on among
 * themselves without rounding. */
static void forecast(const tile *t, int64_t block, int64_t block_end, int64_t from, int64_t end) {
    if (end <= block_end) { /* the block holds these columns */
        const double *known = (from == block ? t->z_begin : t->z) + (from - block) * ROWS;
        memcpy(t->forecast, known, (size_t)((end - from) * ROWS) * sizeof *known);
    } else {
        update_panel(t, t->forecast, from, end, from);
    }
    if (from == 0) { return; } /* nothing is finished: W itself */
    for (int64_t step = from, step_end; step < end; step = step_end) {
        step_end = step + STEPS < end ? step + STEPS : end;
        run_steps(t, t->forecast + (step - from) * ROWS, step, step_end, end, 0);
    }
}

/* scales of the group that begins at step j */
static void begin_group(const tile *t, int64_t block, int64_t block_end, int64_t j) {
    int64_t end = j + 1, group = group_at(t, j), from = t->options->stale_scales ? block : j;
    while (end < t->p->k && group_at(t, end) == group) { end++; }
    forecast(t, block, block_end, from, end);
    fit_group(t, group, t->forecast + (j - from) * ROWS, t->importance + j, end - j);
}

/* Codes and loss of the tile into the result. */
static void store(const tile *t) {
    int64_t k = t->p->k, words = ql_words_per_row(k, t->options->bits);
    for (int64_t r = 0; r < t->rows; r++) {
        uint32_t *row = t->result->codes + (t->row + r) * words;
        for (int64_t j = 0; j < k; j++) {
            ql_code_put(row, t->options->store_ordered ? j : t->p->order[j], t->options->bits, t->codes[j * ROWS + r]);
        }
        t->result->loss[t->row + r] = t->loss[r];
    }
}

/* The reference's blocks are the multiples of 128. Where scales are fresh the blocks are free, and end with a group. */
static int64_t end_of_block(const tile *t, int64_t block) {
    int64_t k = t->p->k, end = block + BLOCK < k ? block + BLOCK : k;
    if (end == k || t->options->stale_scales || t->options->fixed_scales) { return end; }
    int64_t cut = end;
    while (cut > block && group_at(t, cut) == group_at(t, cut - 1)) { cut--; }
    return cut > block ? cut : end;
}

static int begins_group(const tile *t, int64_t j) {
    return !t->options->fixed_scales && (j == 0 || group_at(t, j) != group_at(t, j - 1));
}

static void quantize_tile(const tile *t) {
    int64_t k = t->p->k;
    load_weights(t);
    if (t->options->fixed_scales) { fit_fixed_grids(t); }
    for (int64_t block = 0, end; block < k; block = end) {
        end = end_of_block(t, block);
        update_panel(t, t->z, block, end, block);
        memcpy(t->z_begin, t->z, (size_t)((end - block) * ROWS) * sizeof *t->z);
        for (int64_t step = block, step_end; step < end; step = step_end) {
            if (begins_group(t, step)) { begin_group(t, block, end, step); }
            step_end = step + 1;
            while (step_end < end && step_end < step + STEPS && !begins_group(t, step_end)) { step_end++; }
            run_steps(t, t->z + (step - block) * ROWS, step, step_end, end, 1);
        }
    }
    store(t);
}

/* Each task takes tiles until none is left: so memory grows with the threads, not with the tiles. */
static void quantize_tiles(void *context, int64_t i) {
    quantize_context *c = context;
    char *work = c->work + i * tile_bytes(c->p->k);
    for (int64_t row; !atomic_load(&c->stopped) && (row = ROWS * atomic_fetch_add(&c->next, 1)) < c->p->n;) {
        tile t = tile_in(c, work, row);
        quantize_tile(&t);
        if (ql_call_stopped()) { atomic_store(&c->stopped, 1); } /* hears of it in the caller's own task */
    }
}

void ql_gptq_quantize(const ql_gptq_result *result, const ql_gptq_problem *problem, const ql_gptq_options *options, void *work,
                      int64_t work_bytes) {
    int64_t k = problem->k;
    double *importance = work; /* (k,), by step */
    for (int64_t j = 0; j < k; j++) { importance[j] = problem->importance[problem->order[j]]; }
    char *tiles_work = (char *)work + (k + 7) / 8 * 8 * (int64_t)sizeof(double);
    quantize_context context = {.result = result, .p = problem, .options = options, .importance = importance, .work = tiles_work};
    int64_t tasks = (work_bytes - (tiles_work - (char *)work)) / tile_bytes(k);
    ql_parallel_for(tasks, quantize_tiles, &context);
}
