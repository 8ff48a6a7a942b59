/* gptq.c: the column loop of GPTQ, left-looking (gptq.h). One task is a tile of rows of W: rows are independent.
 *
 * Inside a tile, a block of at most 128 columns is brought up to date with all finished columns by one panel product
 * (ops: feedback), then its columns are quantized one by one. Where a group begins, its scales need the weights that
 * the finished columns leave it with: `forecast` continues the recurrence with columns that are not rounded. */
#include "gptq.h"

#include "../core/bits.h"
#include "scale.h"

#include <math.h>   /* isfinite */
#include <string.h> /* memcpy */

enum {
    BLOCK = 128, /* the reference's: stale scales depend on it */
    STEPS = 16,  /* columns updated one by one; the rest of the block gets them together */
    TILE_ROWS = 32,
    TILES_PER_WAVE = 16
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
    const double *importance; /* (k,): by step */
    char *work;
    int64_t first_tile;
} quantize_context;

typedef struct {
    const ql_gptq_result *result;
    const ql_gptq_problem *p;
    const ql_gptq_options *options;
    int64_t row, rows;        /* rows row .. row + rows of W */
    const double *importance; /* (k,): H_jj + damping, by step */
    double *error;      /* (rows, k): w - q of finished steps */
    double *forecast;   /* (rows, k): weights that a group begins with */
    double *z;          /* (rows, BLOCK): the block, with the updates of every finished column */
    double *z_begin;    /* (rows, BLOCK): the same as it was when the block began */
    uint8_t *codes;     /* (rows, k) */
} tile;

static int64_t tile_bytes(int64_t k) {
    int64_t bytes = TILE_ROWS * (2 * k + 2 * BLOCK) * (int64_t)sizeof(double) + TILE_ROWS * k;
    return (bytes + 63) / 64 * 64;
}

int64_t ql_gptq_work_bytes(int64_t k) {
    return TILES_PER_WAVE * tile_bytes(k) + (k * (int64_t)sizeof(double) + 63) / 64 * 64;
}

/* weight of row r at step j */
static inline double weight_at(const tile *t, int64_t r, int64_t j) {
    int64_t column = t->p->order[j];
    return t->p->dead[column] ? 0.0 : t->p->w[(t->row + r) * t->p->k + column];
}

/* group of step j, which has its scale at that place of the row */
static inline int64_t group_at(const tile *t, int64_t j) {
    return (t->options->store_ordered ? j : t->p->order[j]) / t->p->group;
}

static inline int64_t scale_index(const tile *t, int64_t r, int64_t group) {
    int64_t groups = (t->p->k + t->p->group - 1) / t->p->group;
    return (t->row + r) * groups + group;
}

static void store_grid(const tile *t, int64_t r, int64_t group, ql_steps grid) {
    t->result->scales[scale_index(t, r, group)] = (float)grid.scale;
    t->result->zeros[scale_index(t, r, group)] = (uint8_t)grid.zero;
}

/* scales of all groups from W itself, before the first column */
static void fit_fixed_grids(const tile *t) {
    const ql_gptq_problem *p = t->p;
    double *x = t->forecast;
    for (int64_t r = 0; r < t->rows; r++) {
        const float *w = p->w + (t->row + r) * p->k;
        for (int64_t j = 0; j < p->k; j++) { x[j] = p->dead[j] && !t->options->keep_dead ? 0.0 : w[j]; }
        for (int64_t first = 0; first < p->k; first += p->group) {
            int64_t count = first + p->group < p->k ? p->group : p->k - first;
            store_grid(t, r, first / p->group, ql_fit_grid(x + first, p->importance + first, count, t->options));
        }
    }
}

/* z (rows, end - first), row stride ld = the weights of steps first .. end with the updates of the steps before `first` */
static void update_panel(const tile *t, double *z, int64_t ld, int64_t first, int64_t end) {
    int64_t k = t->p->k;
    for (int64_t r = 0; r < t->rows; r++) {
        for (int64_t j = first; j < end; j++) { z[r * ld + j - first] = weight_at(t, r, j); }
    }
    ql_cpu()->feedback_forward(z, t->error, t->p->feedback + first, t->rows, first, end - first, ld, k, k);
}

/* z[i] += error * feedback[i], count values: one finished step updates the steps after it */
static inline void update_row(double *z, const double *feedback, double error, int64_t count) {
    for (int64_t i = 0; i < count; i++) { z[i] += error * feedback[i]; }
}

/* forecast (rows, end - from), row stride k: the weights of steps from .. end once every step before `from` is finished.
 * Steps that move without being rounded have the error w - z, and pass it on like any other. */
static void forecast(const tile *t, int64_t block, int64_t block_end, int64_t from, int64_t end) {
    int64_t k = t->p->k;
    double *z = t->forecast;
    if (end <= block_end) { /* the block holds these columns */
        const double *known = (from == block ? t->z_begin : t->z) + (from - block);
        for (int64_t r = 0; r < t->rows; r++) { memcpy(z + r * k, known + r * BLOCK, (size_t)(end - from) * sizeof *z); }
    } else {
        update_panel(t, z, k, from, end);
    }
    if (from == 0) { return; } /* nothing is finished: W itself */
    for (int64_t step = from, step_end; step < end; step = step_end) {
        double moved[TILE_ROWS * STEPS];
        step_end = step + STEPS < end ? step + STEPS : end;
        for (int64_t j = step; j < step_end; j++) {
            const double *feedback = t->p->feedback + j * k + j + 1;
            for (int64_t r = 0; r < t->rows; r++) {
                double *row = z + r * k + (j - from);
                moved[r * STEPS + (j - step)] = weight_at(t, r, j) - row[0];
                update_row(row + 1, feedback, moved[r * STEPS + (j - step)], step_end - j - 1);
            }
        }
        ql_cpu()->feedback_forward(z + (step_end - from), moved, t->p->feedback + step * k + step_end, t->rows, step_end - step,
                                   end - step_end, k, STEPS, k);
    }
}

/* scales of the group that begins at step j */
static void fit_group(const tile *t, int64_t block, int64_t block_end, int64_t j) {
    int64_t k = t->p->k, end = j + 1, group = group_at(t, j);
    while (end < k && group_at(t, end) == group) { end++; }
    int64_t from = t->options->stale_scales ? block : j;
    forecast(t, block, block_end, from, end);
    for (int64_t r = 0; r < t->rows; r++) {
        const double *x = t->forecast + r * k + (j - from);
        store_grid(t, r, group, ql_fit_grid(x, t->importance + j, end - j, t->options));
    }
}

/* rounds step j of every row and hands its error to the steps before `end` */
static void quantize_step(const tile *t, int64_t block, int64_t end, int64_t j) {
    const ql_gptq_problem *p = t->p;
    int64_t k = p->k, group = group_at(t, j), place = t->options->store_ordered ? j : p->order[j];
    double maxq = (double)((1 << t->options->bits) - 1), half_d2 = 0.5 * p->diagonal[j] * p->diagonal[j];
    for (int64_t r = 0; r < t->rows; r++) {
        double *z = t->z + r * BLOCK + (j - block);
        ql_steps grid = {t->result->scales[scale_index(t, r, group)], t->result->zeros[scale_index(t, r, group)]};
        double code = ql_steps_code(grid, z[0], maxq), q = grid.scale * (code - grid.zero);
        double error = weight_at(t, r, j) - q;
        t->codes[r * k + place] = (uint8_t)code;
        t->error[r * k + j] = error;
        t->result->loss[t->row + r] += (z[0] - q) * (z[0] - q) * half_d2;
        update_row(z + 1, p->feedback + j * k + j + 1, error, end - j - 1);
    }
}

static void pack_codes(const tile *t) {
    int64_t k = t->p->k, words = ql_words_per_row(k, t->options->bits);
    for (int64_t r = 0; r < t->rows; r++) {
        uint32_t *row = t->result->codes + (t->row + r) * words;
        for (int64_t j = 0; j < k; j++) { ql_code_put(row, j, t->options->bits, t->codes[r * k + j]); }
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

static void quantize_tile(void *context, int64_t i) {
    const quantize_context *c = context;
    int64_t k = c->p->k, row = (c->first_tile + i) * TILE_ROWS;
    double *work = (double *)(void *)(c->work + i * tile_bytes(k));
    tile t = {c->result, c->p, c->options, row, c->p->n - row < TILE_ROWS ? c->p->n - row : TILE_ROWS, c->importance,
              work, work + TILE_ROWS * k, work + TILE_ROWS * 2 * k, work + TILE_ROWS * (2 * k + BLOCK),
              (uint8_t *)(work + TILE_ROWS * (2 * k + 2 * BLOCK))};
    if (t.options->fixed_scales) { fit_fixed_grids(&t); }
    for (int64_t block = 0, end; block < k; block = end) {
        end = end_of_block(&t, block);
        update_panel(&t, t.z, BLOCK, block, end);
        memcpy(t.z_begin, t.z, (size_t)(t.rows * BLOCK) * sizeof *t.z);
        for (int64_t step = block, step_end; step < end; step = step_end) {
            if (begins_group(&t, step)) { fit_group(&t, block, end, step); }
            step_end = step + 1;
            while (step_end < end && step_end < step + STEPS && !begins_group(&t, step_end)) { step_end++; }
            for (int64_t j = step; j < step_end; j++) { quantize_step(&t, block, step_end, j); }
            ql_cpu()->feedback_forward(t.z + (step_end - block), t.error + step, t.p->feedback + step * k + step_end, t.rows,
                                       step_end - step, end - step_end, BLOCK, k, k);
        }
    }
    pack_codes(&t);
}

void ql_gptq_quantize(const ql_gptq_result *result, const ql_gptq_problem *problem, const ql_gptq_options *options, void *work) {
    int64_t k = problem->k, tiles = (problem->n + TILE_ROWS - 1) / TILE_ROWS;
    double *importance = work; /* (k,), by step */
    for (int64_t j = 0; j < k; j++) { importance[j] = problem->importance[problem->order[j]]; }
    char *tiles_work = (char *)work + (k * (int64_t)sizeof(double) + 63) / 64 * 64;
    quantize_context context = {result, problem, options, importance, tiles_work, 0};
    for (; context.first_tile < tiles && !ql_call_stopped(); context.first_tile += TILES_PER_WAVE) {
        int64_t left = tiles - context.first_tile;
        ql_parallel_for(left < TILES_PER_WAVE ? left : TILES_PER_WAVE, quantize_tile, &context);
    }
}
