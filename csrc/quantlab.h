/* quantlab.h: the only public C header. Status codes, the one weight, the one list of ops, the backend table.
 *
 * Shapes: W is (n, k): n outputs, k inputs, row-major. Activations are float32, row-major, tokens first.
 * Order of arguments: outputs, inputs, weights, sizes. Sizes are int64_t. Kernels allocate nothing and print nothing. */
#ifndef QUANTLAB_H
#define QUANTLAB_H

#include <stddef.h> /* size_t */
#include <stdint.h> /* int64_t */

#ifdef __cplusplus /* the CUDA files are C++ */
extern "C" {
#endif

/* ---- status ------------------------------------------------------------------------------------------------ */

typedef enum {
    QL_OK = 0,
    QL_EVALUE = -1,      /* an argument has a value that is not accepted -> ValueError */
    QL_ETYPE = -2,       /* an argument has the wrong type               -> TypeError */
    QL_ENOMEM = -3,      /* out of memory                                -> MemoryError */
    QL_ENUMERIC = -4,    /* the numbers do not allow an answer           -> quantlab.NumericError */
    QL_ECUDA = -5,       /* the device refused                           -> quantlab.CudaError */
    QL_EINTERRUPT = -6   /* the user pressed Ctrl-C                      -> KeyboardInterrupt */
} ql_status;

ql_status ql_fail(ql_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));
const char *ql_status_detail(void); /* of the last ql_fail on this thread */

/* ---- threads and interruption (core/parallel.c) ------------------------------------------------------------ */

/* Runs task(context, i) for i in [0, count) on ql_threads() threads. Tasks must be independent, and each must give the
 * same result whoever runs it: so a result never depends on the number of threads. In a forked child it runs serially. */
void ql_parallel_for(int64_t count, void (*task)(void *context, int64_t i), void *context);

typedef struct {
    int64_t count;
    void (*task)(void *context, int64_t i);
    void *context;
} ql_loop;
/* the same of `n` loops, whose tasks are independent of one another, for the price of one */
void ql_parallel_loops(ql_loop *loops, int64_t n);

enum { QL_MAX_THREADS = 4096 };
int ql_threads(void);
void ql_set_threads(int threads); /* < 1: the default (QL_THREADS, else the cores this process may use) */
int ql_default_threads(void);
int ql_asked_threads(void); /* what QL_THREADS asks for; 0: nothing; -1: no number of 1 to QL_MAX_THREADS, and then not used */

/* Products with W (linear) that compute in bfloat16 take integers of 24 bits instead, with a scale for each row and block of k; those that take
 * such integers for a float32 W take float32 */
int ql_precise(void);
void ql_set_precise(int on);

/* At least `bytes` of memory for an op to work in, on 64 bytes: the calling thread's own, its contents last until this
 * thread's next call; NULL: there is none (core/scratch.c) */
void *ql_scratch(size_t bytes);

/* A long call installs a poll (may be NULL) for its own thread; once it returns non-zero, tasks not yet begun are skipped. */
typedef int (*ql_poll)(void);
void ql_call_begin(ql_poll poll);
int ql_call_stopped(void);
int ql_call_end(void); /* non-zero: the call was stopped, its outputs are not complete */

/* ---- formats ----------------------------------------------------------------------------------------------- */

/* name, lower-case name. The meaning of each code is in csrc/formats/<name>.h */
#define QL_FORMATS(X) \
    X(F32, f32)       \
    X(F16, f16)       \
    X(BF16, bf16)     \
    X(INT8, int8)     \
    X(AFFINE, affine) \
    X(NF4, nf4)       \
    X(FP4, fp4)

typedef enum {
#define X(NAME, name) QL_##NAME,
    QL_FORMATS(X)
#undef X
        QL_FORMAT_COUNT
} ql_format;

/* W[i, j] = scale(i, j) * value(code[i, j], zero(i, j)); see formats/weight.h for where each of them is.
 *   F32 F16 BF16  codes (n, k) of 4, 2, 2 bytes; no scales
 *   INT8          codes int8 (n, k); scales (n,): max|row|, value(code) = code / 127
 *   AFFINE        codes uint32 (n, ceil(k * bits / 32)): each row a little-endian bit stream of bits-wide codes;
 *                 scales float32 and zeros uint8 (n, ceil(k / group)); zeros NULL means 2^(bits-1)
 *   NF4 FP4       codes uint8 (ceil(n * k / 2),): flat over the tensor, element 2i in the high nibble; block i of `group`
 *                 elements of the flat tensor has scale i (bitsandbytes' layout) */
typedef struct {
    ql_format format;
    uint8_t bits;
    int64_t n, k;
    int64_t group;              /* columns (NF4, FP4: flat elements) that share a scale; the last one may be shorter */
    const void *codes;
    const float *scales;        /* NULL with double quantization */
    const uint8_t *zeros;
    const int32_t *perm;        /* (k,) or NULL: stored column j is column perm[j] of W (act-order) */
    /* double quantization: scale(b) = scale_map[scale_codes[b]] * scale_absmax[b / 256] + scale_offset */
    const uint8_t *scale_codes;
    const float *scale_absmax;
    const float *scale_map;     /* (256,) */
    float scale_offset;
    void *packed;               /* backend-private prepacked copy, rebuildable, never saved */
} ql_weight;

/* a product x W^T */
typedef struct {
    float *y; /* (m, n) */
    const ql_weight *w;
} ql_linear_product;
enum { QL_PRODUCTS = 3 }; /* that are given to an op at once, at most */

/* some steps of GPTQ's column loop on a tile; scale, zero and w are (count, QL_GPTQ_ROWS) */
enum { QL_GPTQ_ROWS = 48 };
typedef struct {
    const float *w;
    const double *a;        /* (count, count) with row stride lda: feedback of step j to step i > j at a[j lda + i] */
    const double *diagonal; /* (count,) */
    const double *scale, *zero;
    double maxq;
    int64_t lda, count;
} ql_gptq_steps;

/* what a step of AdamW (Loshchilov and Hutter 2019) takes beside its arrays */
typedef struct {
    double lr, beta1, beta2, eps, weight_decay; /* double: float32's 1 - beta2 would have 5 digits */
    double correction1, correction2; /* 1 - beta1^t, 1 - beta2^t of step t, from 1 */
    double max_norm;                 /* gradients longer than it are scaled down to it; 0: they are taken as they are */
} ql_adamw_step;

/* a low-rank adapter beside a weight (n, k): W x becomes W x + scale B A dropout(x) (Hu et al. 2021) */
typedef struct {
    const float *a, *b; /* (r, k) (n, r); r 0: there is none */
    int64_t r;
    float scale;
    float dropout; /* its share, with the seed and the stream of dropout_forward */
    uint64_t seed;
    int64_t stream;
} ql_low_rank;

/* ---- ops --------------------------------------------------------------------------------------------------- */

/* One line an op: name, parameters. Each is void: arguments are validated above (model, python). */
#define QL_OPS(X)                                                                                                       \
    /* out[t, :] = row ids[t] of table (vocabulary, c) */                                                               \
    X(embedding_forward, (float *out, const int32_t *ids, const ql_weight *table, int64_t t))                           \
    /* out = x / sqrt(mean(x^2) + eps) * gain; (t, c); inv_rms (t,) or NULL is kept for the backward pass */            \
    X(rmsnorm_forward,                                                                                                  \
      (float *out, float *inv_rms, const float *x, const float *gain, int64_t t, int64_t c, float eps))                 \
    /* for each of `count` products, QL_PRODUCTS at most: y (m, n) = x (m, k) W^T, as linear_forward; all have one k */ \
    X(linear_many_forward, (const ql_linear_product *products, int64_t count, const float *x, int64_t m))               \
    /* x (t, heads, d), rotated in place, half-split layout; cos, sin (positions, d/2); positions (t,) rows of them */  \
    X(rope_forward, (float *x, const float *cos, const float *sin, const int32_t *positions, int64_t t, int64_t heads,  \
                     int64_t d))                                                                                        \
    /* Causal attention over ragged sequences. Sequence b has queries [q_start[b], q_start[b+1]) of q (t, hq, d) and    \
     * keys and values rows [kv_start[b], kv_start[b] + kv_len[b]) of k, v (rows, hkv, d); its last query sees all of   \
     * them. out (t, hq, d); lse (t, hq) or NULL: log-sum-exp of the scaled scores. hq is a multiple of hkv. */         \
    X(attention_forward, (float *out, float *lse, const float *q, const float *k, const float *v,                       \
                          const int64_t *q_start, const int64_t *kv_start, const int64_t *kv_len, int64_t b,            \
                          int64_t hq, int64_t hkv, int64_t d, float scale))                                             \
    /* out = gate * sigmoid(gate) * up, count elements */                                                               \
    X(swiglu_forward, (float *out, const float *gate, const float *up, int64_t count))                                  \
    /* y += x, count elements */                                                                                        \
    X(add_forward, (float *y, const float *x, int64_t count))                                                           \
    /* row rows[i] of out = row i of x (t, c); out has enough rows */                                                   \
    X(scatter_rows_forward, (float *out, const float *x, const int32_t *rows, int64_t t, int64_t c))                    \
    /* row i of out (t, c) = row rows[i] of x */                                                                        \
    X(gather_rows_forward, (float *out, const float *x, const int32_t *rows, int64_t t, int64_t c))                     \
    /* tokens[i] = a choice from row i of logits (b, v). temperature 0: the largest, the first of equals. Else a draw   \
     * from softmax(logits / temperature) over the top_k largest (0: all), of them the smallest set of largest with a   \
     * share of at least top_p; what equals the last of a set belongs to it, NaN counts as less than all. The draw      \
     * walks the set in order of index until its share passes ql_uniform(seed, streams[i], step[0]) (core/random.h);    \
     * streams (b,), step (1,) */                                                                                       \
    X(sample_forward, (int32_t *tokens, const float *logits, const int32_t *streams, const int64_t *step, int64_t b,    \
                       int64_t v, float temperature, int64_t top_k, float top_p, uint64_t seed))                        \
    /* after a step of b sequences: row step[0] of history (steps, b) = tokens; ids = tokens; positions, rows and       \
     * kv_len (b,) grow by one, and so does step[0] */                                                                  \
    X(advance_forward, (int32_t *history, int32_t *ids, int32_t *positions, int32_t *rows, int64_t *kv_len,             \
                        int64_t *step, const int32_t *tokens, int64_t b))                                               \
    /* loss[i] = logsumexp(logits[i]) - logits[i, target[i]], 0 where target is -100; logits (t, v); dlogits (t, v) or  \
     * NULL is set to softmax - onehot (0 in ignored rows); it may be logits */                                         \
    X(cross_entropy_forward,                                                                                            \
      (float *loss, float *dlogits, const float *logits, const int32_t *targets, int64_t t, int64_t v))                 \
    /* dx (t, c) = the gradient of x from dy, that of out, or += where accumulate is set; dx may be dy */               \
    X(rmsnorm_backward, (float *dx, const float *dy, const float *x, const float *gain, const float *inv_rms,           \
                         int64_t t, int64_t c, int accumulate))                                                         \
    /* dq, dk, dv = the gradients of q, k, v from dout (t, hq, d); out and lse are those of attention_forward. Rows of  \
     * no sequence are left as they are; no key row may belong to two sequences */                                      \
    X(attention_backward, (float *dq, float *dk, float *dv, const float *dout, const float *q, const float *k,          \
                           const float *v, const float *out, const float *lse, const int64_t *q_start,                  \
                           const int64_t *kv_start, const int64_t *kv_len, int64_t b, int64_t hq, int64_t hkv,          \
                           int64_t d, float scale))                                                                     \
    /* dgate, dup = the gradients of gate, up from dy; each may be any of the inputs */                                 \
    X(swiglu_backward, (float *dgate, float *dup, const float *dy, const float *gate, const float *up, int64_t count))  \
    /* out[i] = x[i] / (1 - p) where ql_uniform(seed, stream, i) >= p, else 0 (Srivastava et al. 2014); out may be x */ \
    X(dropout_forward, (float *out, const float *x, int64_t count, float p, uint64_t seed, int64_t stream))             \
    /* x *= factor, count elements */                                                                                   \
    X(scale_forward, (float *x, float factor, int64_t count))                                                           \
    /* sum (1,) = the sum of x[i]^2 */                                                                                  \
    X(square_sum_forward, (double *sum, const float *x, int64_t count))                                                 \
    /* a step of AdamW on w with gradient g and moments m, v (count,). squares (1,): the sum of g's squares, or that of \
     * a larger g which this is a part of; where it is not finite nothing changes */                                    \
    X(adamw_forward, (float *w, float *m, float *v, const float *g, const double *squares, int64_t count,               \
                      const ql_adamw_step *s))                                                                          \
    /* Round to nearest on an n-bit grid: w (n, k) -> codes (n, words of a row), all of it, scales (n, groups) float16     \
     * values, zeros (n, groups) or NULL: symmetric */                                                                  \
    X(quantize_affine_forward, (uint32_t *codes, float *scales, uint8_t *zeros, const float *w, int64_t n, int64_t k,   \
                                int bits, int64_t group))                                                               \
    /* h += a^T b; a (t, ka), b (t, kb), h (ka, kb). lower: only elements with row >= column are written (ka == kb) */  \
    X(gram_forward, (float *h, const float *a, const float *b, int64_t t, int64_t ka, int64_t kb, int lower))           \
    /* z (rows, width) += e (rows, depth) a (depth, width), float64 with row strides: Cholesky factor of a Hessian */   \
    X(feedback_forward, (double *z, const double *e, const double *a, int64_t rows, int64_t depth, int64_t width,       \
                         int64_t ldz, int64_t lde, int64_t lda))                                                        \
    /* The next four work on a tile of QL_GPTQ_ROWS rows of W, float64: an array (m, rows) has a column of W in each of  \
     * its m rows. z (width, rows) += a^T e; a (depth, width) with row stride lda, e (depth, rows) */                   \
    X(gptq_panel_forward, (double *z, const double *e, const double *a, int64_t depth, int64_t width, int64_t lda))     \
    /* step j of s->count: q = the value that z[j] is stored as, by codes[j]; e[j] = w[j] - q; loss (rows,) += (z[j] -  \
     * q)^2 diagonal[j]^2 / 2; z[i] += a[j, i] e[j] for i > j. codes NULL: q = z[j], nothing is stored or lost */       \
    X(gptq_steps_forward, (uint8_t *codes, double *e, double *z, double *loss, const ql_gptq_steps *s))                 \
    /* error (rows,) = sum over j < count of importance[j] (q - x[j])^2, q = what x[j] is stored as; x (count, rows) */ \
    X(gptq_error_forward, (double *error, const double *x, const double *importance, const double *scale,               \
                           const double *zero, double maxq, int64_t count))                                             \
    /* error (rows,) = sum over j < count of |q - x[j]|^2.4, in float32, each power to 2^-17 of itself: x (count, rows)  \
     * between -1 and 1. A sum may end where it is above its `enough` (rows,) */                                        \
    X(gptq_power_forward, (float *error, const float *enough, const float *x, const float *scale, const float *zero,    \
                           float maxq, int64_t count))

/* The same, one slot a format. */
#define QL_FORMAT_OPS(X)                                                                                                \
    /* out (i1 - i0, j1 - j0), row stride ld: stored rows i0..i1 and stored columns j0..j1 (perm is not applied) */     \
    X(decode_forward, (float *out, int64_t ld, const ql_weight *w, int64_t i0, int64_t i1, int64_t j0, int64_t j1))     \
    /* y (m, n) = x (m, k) W^T, or += where accumulate is set */                                                        \
    X(linear_forward, (float *y, const float *x, const ql_weight *w, int64_t m, int accumulate))                        \
    /* dx (m, k) = dy (m, n) W, or += where accumulate is set */                                                        \
    X(linear_backward_input, (float *dx, const float *dy, const ql_weight *w, int64_t m, int accumulate))               \
    /* NF4, FP4: x flat (count,) -> codes (ceil(count / 2),), scales (ceil(count / group),). INT8: x (count / group,    \
     * group) -> codes int8, scales (count / group,). Other formats: not called. */                                     \
    X(quantize_forward, (void *codes, float *scales, const float *x, ql_format format, int64_t count, int64_t group))

/* The RMSNorm of the residual stream x (t, c) ahead of a product. An op that adds to x may prepare it, where it has the memory. */
typedef struct {
    const float *gain; /* (c,) */
    float eps;
    void *memory; /* of the backend, t c floats; NULL: nothing is prepared */
    int prepared; /* whether memory holds what the op that prepared it left, for x as it is */
} ql_norm;

/* Parts of the model in one op each. NULL where a backend has none (the CPU): the model then composes it from the ops
 * above. `void *` is an activation in the backend's own type (CUDA: bfloat16); x, the residual stream, is float32.
 * ordered: the columns of the activation between two of them stand in the order in which the product reads them fastest;
 * only where takes_ordered says so of the product's weight. */
#define QL_FUSED_OPS(X)                                                                                                 \
    /* h = norm of x; q (t, hq, d) = rope(h Wq^T); rows[i] (rows NULL: i) of k and of v (rows, hkv, d) =         \
     * rope(h Wk^T), h Wv^T of token i. Here and in the products below: each with the part of its adapter, l (3,) in    \
     * the order of the weights, without dropout; l NULL: there is none */                                              \
    X(qkv_forward, (void *q, void *k, void *v, const float *x, const ql_norm *norm, const ql_weight *wq,                \
                    const ql_weight *wk, const ql_weight *wv, const ql_low_rank *l, const float *cos, const float *sin, \
                    const int32_t *positions, const int32_t *rows, int64_t t, int64_t hq, int64_t hkv, int64_t d))      \
    /* attention_forward; lse may be NULL. max_queries, max_keys: bounds of what a sequence has, known to the host: a   \
     * recorded step may be replayed with other kv_len up to them */                                                    \
    X(attention_fused_forward, (void *out, float *lse, const void *q, const void *k, const void *v,                     \
                                const int64_t *q_start, const int64_t *kv_start, const int64_t *kv_len, int64_t t,      \
                                int64_t b, int64_t hq, int64_t hkv, int64_t d, int64_t max_queries, int64_t max_keys,   \
                                float scale, int ordered))                                                              \
    /* a (t, f) = swiglu(h Wgate^T, h Wup^T), h = norm of x */                                                          \
    X(gate_up_forward, (void *a, const float *x, const ql_norm *norm, const ql_weight *gate, const ql_weight *up,       \
                        const ql_low_rank *l, int64_t t, int ordered))                                                  \
    /* x (t, n) += a (t, k) W^T; next: the norm that x goes through after it, or NULL. Sets next->prepared */           \
    X(linear_residual_forward, (float *x, const void *a, const ql_weight *w, const ql_low_rank *l, ql_norm *next,       \
                                int64_t t, int ordered))                                                                \
    /* out (t, c) = rmsnorm(x, gain) */                                                                                 \
    X(norm_fused_forward, (void *out, const float *x, const float *gain, int64_t t, int64_t c, float eps))              \
    /* out = a - b, count elements: float32 where floats is set, else of the backend's type */                          \
    X(difference_forward, (void *out, const void *a, const void *b, int64_t count, int floats))                         \
    /* h (ka, kb) float32 += a^T b; a (t, ka), b (t, kb). lower (ka == kb): elements with row < column may be left      \
     * without it */                                                                                                    \
    X(gram_fused_forward, (float *h, const void *a, const void *b, int64_t t, int64_t ka, int64_t kb, int lower))       \
    /* The rest is for training. y (t, n) = x (t, k) W^T with the adapter's part; y NULL: sum (t, n) += it. u (t, r)    \
     * keeps scale dropout(x) A^T, where l->r is not 0 */                                                               \
    X(adapted_forward, (void *y, float *sum, float *u, const void *x, const ql_weight *w, const ql_low_rank *l,         \
                        int64_t t))                                                                                     \
    /* From dy (t, n): da (r, k), db (n, r) += the gradients of A and B; dx (t, k) = that of x; dx NULL: sum (t, k) = it \
     * or, where accumulate is set, += it; both NULL: it is not wanted. Works in du (t, r) */                           \
    X(adapted_backward, (void *dx, float *sum, float *da, float *db, const void *dy, const void *x, const float *u,     \
                         float *du, const ql_weight *w, const ql_low_rank *l, int64_t t, int accumulate))               \
    /* attention_backward; bounds as in attention_fused_forward */                                                      \
    X(attention_fused_backward, (void *dq, void *dk, void *dv, const void *dout, const void *q, const void *k,          \
                                 const void *v, const void *out, const float *lse, const int64_t *q_start,              \
                                 const int64_t *kv_start, const int64_t *kv_len, int64_t t, int64_t b, int64_t hq,      \
                                 int64_t hkv, int64_t d, int64_t max_queries, int64_t max_keys, float scale))           \
    /* dx (t, c) += the gradient of x from dy, that of rmsnorm(x, gain); copy (t, c) = the new dx */                    \
    X(rmsnorm_fused_backward, (float *dx, void *copy, const float *dy, const float *x, const float *gain, int64_t t,    \
                               int64_t c, float eps))                                                                   \
    X(rope_fused_forward, (void *x, const float *cos, const float *sin, const int32_t *positions, int64_t t,            \
                           int64_t heads, int64_t d))                                                                   \
    X(swiglu_fused_forward, (void *out, const void *gate, const void *up, int64_t count))                               \
    X(swiglu_fused_backward, (void *dgate, void *dup, const void *dy, const void *gate, const void *up, int64_t count)) \
    /* out = x, count elements */                                                                                       \
    X(round_forward, (void *out, const float *x, int64_t count))

/* Memory, order and errors of a backend. All but begin are called between begin and end, by the thread that began. What
 * is issued runs in the order of its issue; ops, fill and copy do not wait for it. The first failure is kept and told by end. */
typedef struct ql_step ql_step; /* a recorded sequence of ops */
#define QL_DEVICE_OPS(X)                                                                                                \
    X(ql_status, begin, (int device))              /* waits until no other thread is in a call; calls may nest */       \
    X(ql_status, end, (void))                      /* the first failure since begin */                                  \
    X(ql_status, finish, (void))                   /* waits for all that was issued */                                  \
    X(ql_status, alloc, (void **memory, size_t bytes))                                                                  \
    X(void, release, (void *memory))               /* NULL is fine; what was issued before may still use it */          \
    X(ql_status, alloc_shared, (void **memory, size_t bytes)) /* on the host, and ops may write it */                   \
    X(void, release_shared, (void *memory))                                                                             \
    X(ql_status, upload, (void *memory, const void *host, size_t bytes)) /* host is free again at return */             \
    X(ql_status, download, (void *host, const void *memory, size_t bytes)) /* waits */                                  \
    X(ql_status, fill, (void *memory, int byte, size_t bytes))                                                          \
    X(ql_status, copy, (void *to, const void *from, size_t bytes)) /* within the backend */                             \
    X(ql_status, weight_upload, (ql_weight *to, const ql_weight *from)) /* pointers of the backend */  \
    X(void, weight_release, (ql_weight *weight))                                                                        \
    /* What is issued between record and record_end is kept in *step and not run. Scratch memory must have its size by  \
     * then: issue the same once before. replay issues it; 0 from step_valid: scratch memory has moved, record again */ \
    X(ql_status, record, (void))                                                                                        \
    X(ql_status, record_end, (ql_step **step))                                                                          \
    X(int, step_valid, (const ql_step *step))                                                                           \
    X(ql_status, replay, (ql_step *step))                                                                               \
    X(void, step_release, (ql_step *step))                                                                              \
    X(int, takes_ordered, (const ql_weight *w, const ql_low_rank *l, int64_t t)) /* see QL_FUSED_OPS */                 \
    /* marks 0 .. QL_MARKS - 1: mark notes how far the issue is, wait waits until what came before it has run */        \
    X(ql_status, mark, (int i))                                                                                         \
    X(ql_status, wait, (int i))

enum { QL_MARKS = 8 };

typedef struct {
    const char *name; /* "cpu" or "cuda" */
    int device;       /* number of the device, 0 on the CPU */
    int kv_bytes;     /* size of the backend's own type: 4 float32, 2 bfloat16 */
    int gemv_rows;  /* products with at most so many rows of x may have kernels that add in another order, on packed weights */
    int records;      /* whether steps can be recorded */
    const struct ql_gptq_device *gptq; /* quant/gptq_device.h; NULL on the CPU */
#define X(op, params) void(*op) params;
    QL_OPS(X)
    QL_FUSED_OPS(X)
#undef X
#define X(op, params) void(*op[QL_FORMAT_COUNT]) params;
    QL_FORMAT_OPS(X)
#undef X
#define X(result, op, params) result(*op) params;
    QL_DEVICE_OPS(X)
#undef X
} ql_backend;

/* The scalar reference of every op is the specification: csrc/ops/<op>.c. */
#define X(op, params) void ql_##op##_scalar params;
QL_OPS(X)
QL_FORMAT_OPS(X)
#undef X

/* out (i1 - i0, k): rows i0..i1 of W as float32, columns in the order of W, in parallel (quant/decode.c) */
void ql_decode_rows(float *out, const ql_weight *w, int64_t i0, int64_t i1);

/* ---- dispatch ---------------------------------------------------------------------------------------------- */

typedef enum { QL_ISA_SCALAR, QL_ISA_AVX2, QL_ISA_AVX512, QL_ISA_AVX512_VNNI, QL_ISA_AVX512_BF16, QL_ISA_AMX, QL_ISA_COUNT } ql_isa;

const char *ql_isa_name(ql_isa isa);
int ql_isa_built(ql_isa isa);
int ql_isa_usable(ql_isa isa);          /* built, and this machine and its system allow it */
const char *ql_isa_why_not(ql_isa isa); /* "" where usable */
ql_isa ql_isa_selected(void);
ql_status ql_isa_select(ql_isa isa);
const ql_backend *ql_cpu(void);         /* the table of the selected ISA */
const ql_backend *ql_selected(void);    /* the table that single ops use: the CPU's, or that of a device chosen by ql_select */
void ql_select(const ql_backend *table); /* NULL: the CPU's */
/* the variant in use of op `op` (0 .. ql_op_count()), format ignored for plain ops: "scalar", "avx2", … or "" if empty */
int ql_op_count(void);
const char *ql_op_name(int op);
int ql_op_has_formats(int op);
const char *ql_op_variant(int op, ql_format format);
const char *ql_format_name(ql_format format);

/* ---- CUDA (cuda/backend.cu; dispatch.c in a build without it) ------------------------------------------------ */

typedef struct {
    char name[256];
    int count;                   /* devices of this machine */
    int major, minor;            /* compute capability */
    int multiprocessors;
    int driver, runtime;         /* versions, 1000 major + 10 minor */
    int64_t total, free;         /* bytes of the device */
    int64_t current, peak, held; /* bytes in use by us, most since the last reset, held by our pool */
} ql_cuda_info;

int ql_cuda_built(void);
const ql_backend *ql_cuda(int device); /* NULL where it cannot be used: ql_status_detail() says why */
ql_status ql_cuda_get_info(ql_cuda_info *info, int device);
ql_status ql_cuda_reset_peak(int device);
/* Where CUDA's libraries lie (folders, separated by ':'), tried before the loader's own places. */
void ql_cuda_set_folders(const char *folders);
/* An array of another library's on a device (of __cuda_array_interface__), once all work there has ended. */
ql_status ql_cuda_fetch(void *host, const void *memory, size_t bytes);
/* What cuda/bench.cu times. Sizes as in the ops; roofs: n bytes are read, or half read and half written, by m blocks a
 * multiprocessor. */
#define QL_BENCH_OPS(X)                                                                                          \
    X(READ, read) X(COPY, copy) X(MATMUL, matmul) X(MATMUL_BACKWARD, matmul_backward) X(DEQUANTIZE, dequantize)  \
    X(QUANTIZE, quantize) X(LINEAR, linear) X(LINEAR_BACKWARD, linear_backward_input) X(RESIDUAL, residual)      \
    X(GATE_UP, gate_up) X(QKV, qkv) X(ATTENTION, attention) X(ATTENTION_BACKWARD, attention_backward)
typedef enum {
#define X(NAME, name) QL_BENCH_##NAME,
    QL_BENCH_OPS(X)
#undef X
        QL_BENCH_COUNT
} ql_bench_op;
typedef struct {
    int op; /* ql_bench_op */
    const ql_weight *weight[3]; /* of the host */
    int weights;
    ql_format format; /* quantize */
    int64_t m, n, k, group;
    int64_t b, keys, hq, hkv, d; /* attention: b sequences of m queries and `keys` keys; qkv: hq, hkv, d */
    int64_t rotate;              /* bytes that the copies of the arrays have together, at least */
} ql_bench;
/* seconds (samples,) of one launch */
ql_status ql_cuda_bench(double *seconds, const ql_bench *bench, int samples, int device);
/* "cublas", "cusolver": its file, or NULL where it is not there: ql_status_detail() says why. Opens it. */
const char *ql_cuda_library(const char *name);

#ifdef __cplusplus
}
#endif

#endif
