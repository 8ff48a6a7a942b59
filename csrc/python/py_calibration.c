/* py_calibration.c: calibration on a device: the parts of a decoder layer over DeviceArrays, the moments of their inputs, and
 * GPTQ from them. Activations are in the backend's own type ("bfloat16"), the residual stream is float32. */
#include "device_object.h"
#include "gptq_args.h"

#include "../core/bits.h"
#include "../quant/gptq_device.h"

#include <math.h> /* sqrtf */

/* as QL_DEVICE_BEGIN, for a call that needs the slot `op` */
#define BEGIN(be, op)                                                                                  \
    QL_DEVICE_BEGIN(be)                                                                                \
    if (call_backend->op == NULL) {                                                                    \
        status = ql_fail(QL_ECUDA, "%s has no kernel on %s", #op, call_backend->name);                 \
    } else {
#define END                                                                                            \
    }                                                                                                  \
    QL_DEVICE_END

#define ARRAY(object, name, type, ndim) ql_device_array(object, name, QL_DEVICE_##type, ndim, &be)

/* ---- parts of a layer ------------------------------------------------------------------------------------------------- */

/* device_embedding(ids (t,), table) -> float32 (t, c); the ids have been checked against the vocabulary */
static PyObject *device_embedding(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *ids_object, *table_object;
    const ql_backend *be = NULL;
    if (!PyArg_ParseTuple(arguments, "OO", &ids_object, &table_object)) { return NULL; }
    DeviceArrayObject *ids = ARRAY(ids_object, "ids", INT32, 1);
    DeviceWeightObject *table = ids == NULL ? NULL : ql_device_weight(table_object, "table", &be);
    DeviceArrayObject *out = table == NULL ? NULL : ql_device_new(be, QL_DEVICE_FLOAT32, 2, (int64_t[]){ids->dim[0], table->weight.k});
    if (out == NULL) { return NULL; }
    BEGIN(be, embedding_forward)
    be->embedding_forward(out->memory, ids->memory, &table->weight, ids->dim[0]);
    END
    return ql_device_finish(out, stopped, status);
}

/* x (t, c) and gain (c,): 0 with an error */
static int norm_args(DeviceArrayObject **x, DeviceArrayObject **gain, PyObject *x_object, PyObject *gain_object, const ql_backend **be) {
    *x = ql_device_array(x_object, "x", QL_DEVICE_FLOAT32, 2, be);
    *gain = *x == NULL ? NULL : ql_device_array(gain_object, "gain", QL_DEVICE_FLOAT32, 1, be);
    return *gain != NULL && ql_device_check_dim(*gain, "gain", 0, (*x)->dim[1]);
}

/* device_norm(x, gain, eps) -> (t, c) */
static PyObject *device_norm(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *x_object, *gain_object;
    DeviceArrayObject *x, *gain;
    const ql_backend *be = NULL;
    float eps;
    if (!PyArg_ParseTuple(arguments, "OOf", &x_object, &gain_object, &eps) || !norm_args(&x, &gain, x_object, gain_object, &be)) { return NULL; }
    DeviceArrayObject *out = ql_device_new(be, QL_DEVICE_BFLOAT16, 2, x->dim);
    if (out == NULL) { return NULL; }
    BEGIN(be, norm_fused_forward)
    be->norm_fused_forward(out->memory, x->memory, gain->memory, x->dim[0], x->dim[1], eps);
    END
    return ql_device_finish(out, stopped, status);
}

static int check_weight(const DeviceWeightObject *w, const char *name, int64_t n, int64_t k) {
    if (w->weight.n == n && w->weight.k == k) { return 1; }
    PyErr_Format(PyExc_ValueError, "%s: shape is (%lld, %lld), expected (%lld, %lld)", name, (long long)w->weight.n,
                 (long long)w->weight.k, (long long)n, (long long)k);
    return 0;
}

typedef struct {
    DeviceArrayObject *x, *gain, *cos, *sin, *positions, *q_start, *kv_start, *kv_len;
    DeviceWeightObject *q, *k, *v;
    int64_t hq, hkv, d, longest;
    float eps;
} attention_args;

static int parse_attention(attention_args *a, PyObject *arguments, const ql_backend **all) {
    PyObject *o[11];
    long long hq, hkv, longest;
    const ql_backend *be = NULL;
    if (!PyArg_ParseTuple(arguments, "OOOOOOOOOOOLLLf", &o[0], &o[1], &o[2], &o[3], &o[4], &o[5], &o[6], &o[7], &o[8], &o[9], &o[10],
                          &hq, &hkv, &longest, &a->eps) ||
        !norm_args(&a->x, &a->gain, o[0], o[1], &be) || (a->q = ql_device_weight(o[2], "q", &be)) == NULL ||
        (a->k = ql_device_weight(o[3], "k", &be)) == NULL || (a->v = ql_device_weight(o[4], "v", &be)) == NULL ||
        (a->cos = ARRAY(o[5], "cos", FLOAT32, 2)) == NULL || (a->sin = ARRAY(o[6], "sin", FLOAT32, 2)) == NULL ||
        (a->positions = ARRAY(o[7], "positions", INT32, 1)) == NULL || (a->q_start = ARRAY(o[8], "q_start", INT64, 1)) == NULL ||
        (a->kv_start = ARRAY(o[9], "kv_start", INT64, 1)) == NULL || (a->kv_len = ARRAY(o[10], "kv_len", INT64, 1)) == NULL) {
        return 0;
    }
    a->hq = hq, a->hkv = hkv, a->d = 2 * a->cos->dim[1], a->longest = longest, *all = be;
    if (hq < 1 || hkv < 1 || hq % hkv != 0) { return PyErr_Format(PyExc_ValueError, "heads: got %lld and %lld", hq, hkv), 0; }
    int64_t c = a->x->dim[1], b = a->kv_len->dim[0];
    return check_weight(a->q, "q", hq * a->d, c) && check_weight(a->k, "k", hkv * a->d, c) && check_weight(a->v, "v", hkv * a->d, c) &&
           ql_device_check_dim(a->sin, "sin", 0, a->cos->dim[0]) && ql_device_check_dim(a->sin, "sin", 1, a->d / 2) &&
           ql_device_check_dim(a->positions, "positions", 0, a->x->dim[0]) && ql_device_check_dim(a->q_start, "q_start", 0, b + 1) &&
           ql_device_check_dim(a->kv_start, "kv_start", 0, b);
}

/* device_attention(x, gain, q, k, v, cos, sin, positions, q_start, kv_start, kv_len, heads, kv_heads, longest, eps) -> (t, hq d):
 * of whole sequences, whose ranges have been checked; longest: tokens of the longest one */
static PyObject *device_attention(PyObject *self, PyObject *arguments) {
    (void)self;
    attention_args a;
    const ql_backend *be = NULL;
    if (!parse_attention(&a, arguments, &be)) { return NULL; }
    int64_t t = a.x->dim[0], keys = a.hkv * a.d, b = a.kv_len->dim[0];
    DeviceArrayObject *out = ql_device_new(be, QL_DEVICE_BFLOAT16, 2, (int64_t[]){t, a.hq * a.d});
    DeviceArrayObject *q = out == NULL ? NULL : ql_device_new(be, QL_DEVICE_BFLOAT16, 2, (int64_t[]){t, a.hq * a.d});
    DeviceArrayObject *k = q == NULL ? NULL : ql_device_new(be, QL_DEVICE_BFLOAT16, 2, (int64_t[]){t, keys});
    DeviceArrayObject *v = k == NULL ? NULL : ql_device_new(be, QL_DEVICE_BFLOAT16, 2, (int64_t[]){t, keys});
    if (v == NULL) { return Py_XDECREF(out), Py_XDECREF(q), Py_XDECREF(k), NULL; }
    ql_norm norm = {a.gain->memory, a.eps, NULL, 0};
    BEGIN(be, qkv_forward)
    be->qkv_forward(q->memory, k->memory, v->memory, a.x->memory, &norm, &a.q->weight, &a.k->weight, &a.v->weight,
                    NULL, a.cos->memory, a.sin->memory, a.positions->memory, NULL, t, a.hq, a.hkv, a.d);
    be->attention_fused_forward(out->memory, NULL, q->memory, k->memory, v->memory, a.q_start->memory, a.kv_start->memory,
                                a.kv_len->memory, t, b, a.hq, a.hkv, a.d, a.longest, a.longest, 1.0f / sqrtf((float)a.d), 0);
    END
    Py_DECREF(q), Py_DECREF(k), Py_DECREF(v);
    return ql_device_finish(out, stopped, status);
}

/* device_gate_up(x, gain, gate, up, eps) -> (t, f) */
static PyObject *device_gate_up(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *x_object, *gain_object, *gate_object, *up_object;
    DeviceArrayObject *x, *gain;
    const ql_backend *be = NULL;
    float eps;
    if (!PyArg_ParseTuple(arguments, "OOOOf", &x_object, &gain_object, &gate_object, &up_object, &eps) ||
        !norm_args(&x, &gain, x_object, gain_object, &be)) {
        return NULL;
    }
    DeviceWeightObject *gate = ql_device_weight(gate_object, "gate", &be);
    DeviceWeightObject *up = gate == NULL ? NULL : ql_device_weight(up_object, "up", &be);
    if (up == NULL || !check_weight(gate, "gate", gate->weight.n, x->dim[1]) || !check_weight(up, "up", gate->weight.n, x->dim[1])) {
        return NULL;
    }
    DeviceArrayObject *out = ql_device_new(be, QL_DEVICE_BFLOAT16, 2, (int64_t[]){x->dim[0], gate->weight.n});
    if (out == NULL) { return NULL; }
    ql_norm norm = {gain->memory, eps, NULL, 0};
    BEGIN(be, gate_up_forward)
    be->gate_up_forward(out->memory, x->memory, &norm, &gate->weight, &up->weight, NULL, x->dim[0], 0);
    END
    return ql_device_finish(out, stopped, status);
}

/* device_add(x, a, w): x (t, n) += a (t, k) W^T */
static PyObject *device_add(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *x_object, *a_object, *w_object;
    const ql_backend *be = NULL;
    if (!PyArg_ParseTuple(arguments, "OOO", &x_object, &a_object, &w_object)) { return NULL; }
    DeviceArrayObject *x = ARRAY(x_object, "x", FLOAT32, 2);
    DeviceArrayObject *a = x == NULL ? NULL : ARRAY(a_object, "a", BFLOAT16, 2);
    DeviceWeightObject *w = a == NULL ? NULL : ql_device_weight(w_object, "w", &be);
    if (w == NULL || !ql_device_check_dim(a, "a", 0, x->dim[0]) || !check_weight(w, "w", x->dim[1], a->dim[1])) { return NULL; }
    BEGIN(be, linear_residual_forward)
    be->linear_residual_forward(x->memory, a->memory, &w->weight, NULL, NULL, x->dim[0], 0);
    END
    return ql_device_finish(NULL, stopped, status);
}

/* ---- moments ---------------------------------------------------------------------------------------------------------- */

/* device_difference(a, b, floats) -> a - b rounded to the backend's type; both float32, or both of that type */
static PyObject *device_difference(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *a_object, *b_object, *floats;
    const ql_backend *be = NULL;
    if (!PyArg_ParseTuple(arguments, "OOO!", &a_object, &b_object, &PyBool_Type, &floats)) { return NULL; }
    ql_device_type type = floats == Py_True ? QL_DEVICE_FLOAT32 : QL_DEVICE_BFLOAT16;
    DeviceArrayObject *a = ql_device_array(a_object, "a", type, 2, &be);
    DeviceArrayObject *b = a == NULL ? NULL : ql_device_array(b_object, "b", type, 2, &be);
    if (b == NULL || !ql_device_check_dim(b, "b", 0, a->dim[0]) || !ql_device_check_dim(b, "b", 1, a->dim[1])) { return NULL; }
    DeviceArrayObject *out = ql_device_new(be, QL_DEVICE_BFLOAT16, 2, a->dim);
    if (out == NULL) { return NULL; }
    BEGIN(be, difference_forward)
    be->difference_forward(out->memory, a->memory, b->memory, a->dim[0] * a->dim[1], floats == Py_True);
    END
    return ql_device_finish(out, stopped, status);
}

/* device_gram(h, a, b, lower): h (ka, kb) += a^T b */
static PyObject *device_gram(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *h_object, *a_object, *b_object;
    const ql_backend *be = NULL;
    int lower;
    if (!PyArg_ParseTuple(arguments, "OOOp", &h_object, &a_object, &b_object, &lower)) { return NULL; }
    DeviceArrayObject *h = ARRAY(h_object, "h", FLOAT32, 2);
    DeviceArrayObject *a = h == NULL ? NULL : ARRAY(a_object, "a", BFLOAT16, 2);
    DeviceArrayObject *b = a == NULL ? NULL : ARRAY(b_object, "b", BFLOAT16, 2);
    if (b == NULL || !ql_device_check_dim(b, "b", 0, a->dim[0]) || !ql_device_check_dim(h, "h", 0, a->dim[1]) ||
        !ql_device_check_dim(h, "h", 1, b->dim[1]) || (lower && !ql_device_check_dim(h, "h", 0, b->dim[1]))) {
        return NULL;
    }
    BEGIN(be, gram_fused_forward)
    be->gram_fused_forward(h->memory, a->memory, b->memory, a->dim[0], a->dim[1], b->dim[1], lower);
    END
    return ql_device_finish(NULL, stopped, status);
}

static DeviceArrayObject *square(PyObject *object, const char *name, ql_device_type type, const ql_backend **be) {
    DeviceArrayObject *array = ql_device_array(object, name, type, 2, be);
    return array != NULL && ql_device_check_dim(array, name, 1, array->dim[0]) ? array : NULL;
}

/* device_diagonal(h) -> NumPy float32 (k,) */
static PyObject *device_diagonal(PyObject *self, PyObject *h_object) {
    (void)self;
    const ql_backend *be = NULL;
    DeviceArrayObject *h = square(h_object, "h", QL_DEVICE_FLOAT32, &be);
    PyArrayObject *out = h == NULL ? NULL : ql_new(1, h->dim, NPY_FLOAT32);
    if (out == NULL) { return NULL; }
    BEGIN(be, gptq)
    status = be->gptq->diagonal(ql_data(out), h->memory, h->dim[0]);
    END
    return ql_device_finish(out, stopped, status);
}

/* device_finite(x) -> bool */
static PyObject *device_finite(PyObject *self, PyObject *x_object) {
    (void)self;
    const ql_backend *be = NULL;
    int finite = 0;
    DeviceArrayObject *x = ARRAY(x_object, "x", FLOAT32, 2);
    if (x == NULL) { return NULL; }
    BEGIN(be, gptq)
    status = be->gptq->finite(&finite, x->memory, x->dim[0] * x->dim[1]);
    END
    if (stopped || status != QL_OK) { return ql_device_finish(NULL, stopped, status); }
    return PyBool_FromLong(finite);
}

/* ---- GPTQ ------------------------------------------------------------------------------------------------------------- */

/* a copy of a small array of the host: *memory is released by the caller */
static ql_status upload(const ql_backend *be, void **memory, PyArrayObject *array) {
    ql_status status = be->alloc(memory, ql_nbytes(array));
    return status == QL_OK ? be->upload(*memory, ql_data(array), ql_nbytes(array)) : status;
}

static PyArrayObject *order_arg(PyObject *object, int64_t k) {
    PyArrayObject *order = ql_array(object, "order", NPY_INT32, 1);
    return order != NULL && ql_check_dim(order, "order", 0, k) && ql_gptq_check_order(order, k) ? order : NULL;
}

/* device_gptq_factor(h, order, factor, damp) -> (matrix, feedback, diagonal), None where it is not positive definite */
static PyObject *device_gptq_factor(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *h_object, *order_object;
    double factor, damp;
    const ql_backend *be = NULL;
    if (!PyArg_ParseTuple(arguments, "OOdd", &h_object, &order_object, &factor, &damp)) { return NULL; }
    DeviceArrayObject *h = square(h_object, "h", QL_DEVICE_FLOAT32, &be);
    PyArrayObject *order = h == NULL ? NULL : order_arg(order_object, h->dim[0]);
    if (order == NULL) { return NULL; }
    DeviceArrayObject *matrix = ql_device_new(be, QL_DEVICE_FLOAT64, 2, h->dim);
    DeviceArrayObject *feedback = matrix == NULL ? NULL : ql_device_new(be, QL_DEVICE_FLOAT64, 2, h->dim);
    DeviceArrayObject *diagonal = feedback == NULL ? NULL : ql_device_new(be, QL_DEVICE_FLOAT64, 1, h->dim);
    if (diagonal == NULL) { return Py_XDECREF(matrix), Py_XDECREF(feedback), NULL; }
    int info = 0;
    BEGIN(be, gptq)
    void *columns = NULL;
    status = upload(be, &columns, order);
    if (status == QL_OK) { status = be->gptq->matrix(matrix->memory, h->memory, columns, h->dim[0], factor, damp); }
    if (status == QL_OK) { status = be->gptq->factor(feedback->memory, diagonal->memory, matrix->memory, h->dim[0], &info); }
    be->release(columns);
    END
    if (!stopped && status == QL_OK && info == 0) { return Py_BuildValue("(NNN)", matrix, feedback, diagonal); }
    Py_DECREF(matrix), Py_DECREF(feedback), Py_DECREF(diagonal);
    return ql_device_finish(NULL, stopped, status);
}

/* device_product(y, x, w): y (n, k) += x (n, k) w (k, k), float32 */
static PyObject *device_product(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *y_object, *x_object, *w_object;
    const ql_backend *be = NULL;
    if (!PyArg_ParseTuple(arguments, "OOO", &y_object, &x_object, &w_object)) { return NULL; }
    DeviceArrayObject *y = ARRAY(y_object, "y", FLOAT32, 2);
    DeviceArrayObject *x = y == NULL ? NULL : ARRAY(x_object, "x", FLOAT32, 2);
    DeviceArrayObject *w = x == NULL ? NULL : square(w_object, "w", QL_DEVICE_FLOAT32, &be);
    if (w == NULL || !ql_device_check_dim(x, "x", 0, y->dim[0]) || !ql_device_check_dim(x, "x", 1, w->dim[0]) ||
        !ql_device_check_dim(y, "y", 1, w->dim[0])) {
        return NULL;
    }
    ql_weight weight = {.format = QL_F32, .bits = 32, .n = w->dim[0], .k = w->dim[0], .group = w->dim[0], .codes = w->memory};
    BEGIN(be, linear_backward_input[QL_F32])
    be->linear_backward_input[QL_F32](y->memory, x->memory, &weight, x->dim[0], 1);
    END
    return ql_device_finish(NULL, stopped, status);
}

/* device_gptq_correct(w, moments, matrix, order, scale): w += scale * moments (H + damp)^-1 */
static PyObject *device_gptq_correct(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *w_object, *moments_object, *matrix_object, *order_object;
    double scale;
    const ql_backend *be = NULL;
    if (!PyArg_ParseTuple(arguments, "OOOOd", &w_object, &moments_object, &matrix_object, &order_object, &scale)) { return NULL; }
    DeviceArrayObject *w = ARRAY(w_object, "w", FLOAT32, 2);
    DeviceArrayObject *moments = w == NULL ? NULL : ARRAY(moments_object, "moments", FLOAT32, 2);
    DeviceArrayObject *matrix = moments == NULL ? NULL : square(matrix_object, "matrix", QL_DEVICE_FLOAT64, &be);
    PyArrayObject *order = matrix == NULL ? NULL : order_arg(order_object, matrix->dim[0]);
    if (order == NULL || !ql_device_check_dim(w, "w", 1, matrix->dim[0]) || !ql_device_check_dim(moments, "moments", 0, w->dim[0]) ||
        !ql_device_check_dim(moments, "moments", 1, w->dim[1])) {
        return NULL;
    }
    BEGIN(be, gptq)
    void *columns = NULL;
    status = upload(be, &columns, order);
    if (status == QL_OK) {
        status = be->gptq->correct(w->memory, moments->memory, matrix->memory, columns, w->dim[0], w->dim[1], scale);
    }
    be->release(columns);
    END
    return ql_device_finish(NULL, stopped, status);
}

/* device_gptq_supports(device, k, group, fixed, stale) -> bool */
static PyObject *device_gptq_supports(PyObject *self, PyObject *arguments) {
    (void)self;
    int device;
    long long k, group;
    ql_gptq_options options = {.bits = 4};
    if (!PyArg_ParseTuple(arguments, "iLLpp", &device, &k, &group, &options.fixed_scales, &options.stale_scales)) { return NULL; }
    const ql_backend *be = ql_device_arg(device);
    if (be == NULL) { return NULL; }
    ql_gptq_problem problem = {.n = 1, .k = k, .group = group};
    return PyBool_FromLong(be->gptq != NULL && be->gptq->supports(&problem, &options));
}

typedef struct {
    DeviceArrayObject *w, *feedback, *diagonal;
    PyArrayObject *order, *importance, *dead;
    ql_gptq_options options;
    int64_t n, k, group;
} quantize_args;

static int parse_quantize(quantize_args *a, PyObject *arguments, const ql_backend **all) {
    PyObject *o[6];
    long long group;
    int search;
    ql_gptq_options *x = &a->options;
    const ql_backend *be = NULL;
    if (!PyArg_ParseTuple(arguments, "OOOOOOLipippppp", &o[0], &o[1], &o[2], &o[3], &o[4], &o[5], &group, &x->bits, &x->symmetric,
                          &search, &x->fixed_scales, &x->keep_dead, &x->stale_scales, &x->half_scales, &x->store_ordered) ||
        (a->w = ARRAY(o[0], "w", FLOAT32, 2)) == NULL || (a->feedback = square(o[1], "feedback", QL_DEVICE_FLOAT64, &be)) == NULL ||
        (a->diagonal = ARRAY(o[2], "diagonal", FLOAT64, 1)) == NULL) {
        return 0;
    }
    a->n = a->w->dim[0], a->k = a->w->dim[1], a->group = group, x->search = (ql_scale_search)search, *all = be;
    if (!ql_device_check_dim(a->feedback, "feedback", 0, a->k) || !ql_device_check_dim(a->diagonal, "diagonal", 0, a->k) ||
        (a->order = order_arg(o[3], a->k)) == NULL || (a->importance = ql_array(o[4], "importance", NPY_FLOAT64, 1)) == NULL ||
        (a->dead = ql_array(o[5], "dead", NPY_UINT8, 1)) == NULL || !ql_check_dim(a->importance, "importance", 0, a->k) ||
        !ql_check_dim(a->dead, "dead", 0, a->k)) {
        return 0;
    }
    ql_gptq_problem host = {.n = a->n, .k = a->k, .group = group, .order = ql_data(a->order)};
    return ql_gptq_check_options(&host, x);
}

/* the loop, with the small inputs and the results beside it on the device for as long as it runs; out: codes, scales, zeros, loss */
static ql_status run_quantize(const quantize_args *a, PyArrayObject *const out[4], const ql_backend *be) {
    void *in[3] = {NULL, NULL, NULL}, *results[4] = {NULL, NULL, NULL, NULL};
    PyArrayObject *const inputs[3] = {a->order, a->importance, a->dead};
    ql_status status = QL_OK;
    for (int i = 0; i < 3 && status == QL_OK; i++) { status = upload(be, &in[i], inputs[i]); }
    for (int i = 0; i < 4 && status == QL_OK; i++) {
        status = be->alloc(&results[i], ql_nbytes(out[i]));
        if (status == QL_OK) { status = be->fill(results[i], 0, ql_nbytes(out[i])); }
    }
    if (status == QL_OK) {
        ql_gptq_problem problem = {a->w->memory, a->feedback->memory, a->diagonal->memory, in[0], in[1], in[2], a->n, a->k, a->group};
        ql_gptq_result result = {results[0], results[1], results[2], results[3]};
        status = be->gptq->quantize(&result, &problem, &a->options, ql_data(a->order));
    }
    for (int i = 0; i < 4; i++) {
        if (status == QL_OK) { status = be->download(ql_data(out[i]), results[i], ql_nbytes(out[i])); }
        be->release(results[i]);
    }
    for (int i = 0; i < 3; i++) { be->release(in[i]); }
    return status;
}

/* device_gptq_quantize(w, feedback, diagonal, …): as gptq_quantize, with these three on the device */
static PyObject *device_gptq_quantize(PyObject *self, PyObject *arguments) {
    (void)self;
    quantize_args a;
    const ql_backend *be = NULL;
    if (!parse_quantize(&a, arguments, &be)) { return NULL; }
    int64_t groups = (a.k + a.group - 1) / a.group, words = ql_words_per_row(a.k, a.options.bits);
    PyArrayObject *out[4] = {ql_new(2, (int64_t[]){a.n, words}, NPY_UINT32), ql_new(2, (int64_t[]){a.n, groups}, NPY_FLOAT32),
                             ql_new(2, (int64_t[]){a.n, groups}, NPY_UINT8), ql_new(1, (int64_t[]){a.n}, NPY_FLOAT64)};
    int stopped_or_failed = 1;
    if (out[0] != NULL && out[1] != NULL && out[2] != NULL && out[3] != NULL) {
        BEGIN(be, gptq)
        status = run_quantize(&a, out, be);
        END
        stopped_or_failed = stopped || status != QL_OK;
        if (stopped_or_failed && !stopped) { ql_raise(status); }
    }
    if (!stopped_or_failed) { return Py_BuildValue("(NNNN)", out[0], out[1], out[2], out[3]); }
    for (int i = 0; i < 4; i++) { Py_XDECREF(out[i]); }
    return NULL;
}

static PyMethodDef methods[] = {
    {"device_embedding", device_embedding, METH_VARARGS, "device_embedding(ids, table) -> float32 (t, c)"},
    {"device_norm", device_norm, METH_VARARGS, "device_norm(x, gain, eps) -> (t, c)"},
    {"device_attention", device_attention, METH_VARARGS,
     "device_attention(x, gain, q, k, v, cos, sin, positions, q_start, kv_start, kv_len, heads, kv_heads, longest, eps) -> (t, hq d)"},
    {"device_gate_up", device_gate_up, METH_VARARGS, "device_gate_up(x, gain, gate, up, eps) -> (t, f)"},
    {"device_add", device_add, METH_VARARGS, "device_add(x (t, n), a (t, k), w): x += a W^T"},
    {"device_difference", device_difference, METH_VARARGS, "device_difference(a, b, floats) -> a - b"},
    {"device_gram", device_gram, METH_VARARGS, "device_gram(h float32 (ka, kb), a, b, lower): h += a^T b"},
    {"device_diagonal", device_diagonal, METH_O, "device_diagonal(h) -> NumPy float32 (k,)"},
    {"device_finite", device_finite, METH_O, "device_finite(x) -> bool"},
    {"device_gptq_factor", device_gptq_factor, METH_VARARGS,
     "device_gptq_factor(h, order, factor, damp) -> (matrix, feedback, diagonal), or None: not positive definite"},
    {"device_product", device_product, METH_VARARGS, "device_product(y, x, w): y += x w, float32"},
    {"device_gptq_correct", device_gptq_correct, METH_VARARGS,
     "device_gptq_correct(w, moments, matrix, order, scale): w += scale * moments (H + damp)^-1"},
    {"device_gptq_supports", device_gptq_supports, METH_VARARGS, "device_gptq_supports(device, k, group, fixed, stale) -> bool"},
    {"device_gptq_quantize", device_gptq_quantize, METH_VARARGS,
     "device_gptq_quantize(w, feedback, diagonal, …): as gptq_quantize, these three on the device"},
    {NULL, NULL, 0, NULL},
};

int ql_register_calibration(PyObject *module) { return PyModule_AddFunctions(module, methods); }
