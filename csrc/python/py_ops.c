/* py_ops.c: the ops as functions of arrays. Each: parse, validate, release the GIL, call, raise. */
#include "python.h"

#include "../quant/pack.h"

PyObject *ql_finish(PyObject *result, int stopped, ql_status status) {
    if (stopped || status != QL_OK) { return Py_DECREF(result), stopped ? NULL : ql_raise(status); }
    return result;
}

static PyObject *finish(PyArrayObject *out, int stopped, ql_status status) { return ql_finish((PyObject *)out, stopped, status); }
static PyObject *finish_in_place(int stopped, ql_status status) { return ql_finish(Py_NewRef(Py_None), stopped, status); }

/* every id in [0, limit), or `also`, a negative one (0: none) */
static int check_ids(PyArrayObject *ids, const char *name, int64_t limit, int32_t also) {
    const int32_t *data = ql_data(ids);
    for (int64_t i = 0; i < (int64_t)PyArray_SIZE(ids); i++) {
        if ((data[i] < 0 || data[i] >= limit) && (also == 0 || data[i] != also)) {
            PyErr_Format(PyExc_ValueError, "%s: got %d at position %lld, expected 0 to %lld", name, data[i], (long long)i,
                         (long long)limit - 1);
            return 0;
        }
    }
    return 1;
}

/* a second output that the caller may want: a writeable float32 array of the first `ndim` of `dims`, or none */
static int also_out(PyObject *object, const char *name, int ndim, const npy_intp *dims, PyArrayObject **out) {
    int failed = 0;
    *out = ql_array_or_none(object, name, NPY_FLOAT32, ndim, &failed);
    for (int axis = 0; *out != NULL && axis < ndim; axis++) {
        if (!ql_check_dim(*out, name, axis, (int64_t)dims[axis])) { return 0; }
    }
    if (*out != NULL && !PyArray_ISWRITEABLE(*out)) { return PyErr_Format(PyExc_ValueError, "%s: not writeable", name), 0; }
    return !failed;
}

static PyObject *embedding(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *ids_object, *table_object, *out_object = NULL;
    if (!PyArg_ParseTuple(arguments, "OO|O", &ids_object, &table_object, &out_object)) { return NULL; }
    PyArrayObject *ids = ql_array(ids_object, "ids", NPY_INT32, 1);
    const ql_weight *table = ids == NULL ? NULL : ql_table_arg(table_object, "table");
    if (table == NULL || !check_ids(ids, "ids", table->n, 0)) { return NULL; }
    PyArrayObject *out = ql_out(out_object, 2, (int64_t[]){ql_dim(ids, 0), table->k}, NPY_FLOAT32);
    if (out == NULL) { return NULL; }
    int stopped;
    ql_status status;
    QL_CALL_BEGIN
    ql_stage s;
    ql_stage_begin(&s);
    float *to = QL_OUT(&s, out);
    const int32_t *from = QL_IN(&s, ids);
    const ql_weight *staged = ql_stage_weight(&s, table_object);
    if (QL_READY(&s, embedding_forward)) { s.be->embedding_forward(to, from, staged, ql_dim(ids, 0)); }
    status = ql_stage_end(&s);
    QL_CALL_END(stopped)
    return finish(out, stopped, status);
}

static PyObject *rmsnorm(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *x_object, *gain_object, *out_object = NULL, *inv_rms_object = NULL;
    float eps;
    if (!PyArg_ParseTuple(arguments, "OOf|OO", &x_object, &gain_object, &eps, &out_object, &inv_rms_object)) { return NULL; }
    PyArrayObject *x = ql_array(x_object, "x", NPY_FLOAT32, 2);
    PyArrayObject *gain = x == NULL ? NULL : ql_array(gain_object, "gain", NPY_FLOAT32, 1);
    if (gain == NULL || !ql_check_dim(gain, "gain", 0, ql_dim(x, 1))) { return NULL; }
    PyArrayObject *inv_rms = NULL;
    if (!also_out(inv_rms_object, "inv_rms", 1, PyArray_DIMS(x), &inv_rms)) { return NULL; }
    PyArrayObject *out = ql_out(out_object, 2, (int64_t[]){ql_dim(x, 0), ql_dim(x, 1)}, NPY_FLOAT32);
    if (out == NULL) { return NULL; }
    int stopped;
    ql_status status;
    QL_CALL_BEGIN
    ql_stage s;
    ql_stage_begin(&s);
    float *to = QL_OUT(&s, out), *also = QL_OUT(&s, inv_rms);
    const float *from = QL_IN(&s, x), *gains = QL_IN(&s, gain);
    if (QL_READY(&s, rmsnorm_forward)) { s.be->rmsnorm_forward(to, also, from, gains, ql_dim(x, 0), ql_dim(x, 1), eps); }
    status = ql_stage_end(&s);
    QL_CALL_END(stopped)
    return finish(out, stopped, status);
}

static PyObject *rope(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *x_object, *cos_object, *sin_object, *positions_object, *out_object = NULL;
    if (!PyArg_ParseTuple(arguments, "OOOO|O", &x_object, &cos_object, &sin_object, &positions_object, &out_object)) { return NULL; }
    PyArrayObject *x = ql_array(x_object, "x", NPY_FLOAT32, 3);
    PyArrayObject *cos = x == NULL ? NULL : ql_array(cos_object, "cos", NPY_FLOAT32, 2);
    PyArrayObject *sin = cos == NULL ? NULL : ql_array(sin_object, "sin", NPY_FLOAT32, 2);
    PyArrayObject *positions = sin == NULL ? NULL : ql_array(positions_object, "positions", NPY_INT32, 1);
    if (positions == NULL || !ql_check_dim(positions, "positions", 0, ql_dim(x, 0)) ||
        !ql_check_dim(sin, "sin", 0, ql_dim(cos, 0)) || !ql_check_dim(sin, "sin", 1, ql_dim(cos, 1)) ||
        !check_ids(positions, "positions", ql_dim(cos, 0), 0)) {
        return NULL;
    }
    if (ql_dim(x, 2) != 2 * ql_dim(cos, 1)) {
        return PyErr_Format(PyExc_ValueError, "x: head size is %lld, expected twice that of cos, %lld",
                            (long long)ql_dim(x, 2), (long long)ql_dim(cos, 1));
    }
    PyArrayObject *out = ql_out(out_object, 3, (int64_t[]){ql_dim(x, 0), ql_dim(x, 1), ql_dim(x, 2)}, NPY_FLOAT32);
    if (out == NULL) { return NULL; }
    if (out != x && PyArray_CopyInto(out, x) < 0) { return Py_DECREF(out), NULL; }
    int stopped;
    ql_status status;
    QL_CALL_BEGIN
    ql_stage s;
    ql_stage_begin(&s);
    float *to = QL_INOUT(&s, out);
    const float *cosines = QL_IN(&s, cos), *sines = QL_IN(&s, sin);
    const int32_t *where = QL_IN(&s, positions);
    if (QL_READY(&s, rope_forward)) {
        s.be->rope_forward(to, cosines, sines, where, ql_dim(x, 0), ql_dim(x, 1), ql_dim(x, 2));
    }
    status = ql_stage_end(&s);
    QL_CALL_END(stopped)
    return finish(out, stopped, status);
}

int ql_check_ranges(PyArrayObject *q, PyArrayObject *k, PyArrayObject *qs, PyArrayObject *ks, PyArrayObject *kl) {
    int64_t b = ql_dim(ks, 0);
    const int64_t *q_start = ql_data(qs), *kv_start = ql_data(ks), *kv_len = ql_data(kl);
    if (!ql_check_dim(qs, "q_start", 0, b + 1) || !ql_check_dim(kl, "kv_len", 0, b)) { return 0; }
    for (int64_t i = 0; i < b; i++) {
        if (q_start[i] < 0 || q_start[i + 1] < q_start[i] || q_start[i + 1] > ql_dim(q, 0) ||
            kv_len[i] < q_start[i + 1] - q_start[i] || kv_len[i] > ql_dim(k, 0) || kv_start[i] < 0 ||
            kv_start[i] > ql_dim(k, 0) - kv_len[i]) {
            PyErr_Format(PyExc_ValueError, "kv_len: sequence %lld has a range outside of q or k", (long long)i);
            return 0;
        }
    }
    return 1;
}

static PyObject *attention(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *o[6], *out_object = NULL, *lse_object = NULL;
    float scale;
    if (!PyArg_ParseTuple(arguments, "OOOOOOf|OO", &o[0], &o[1], &o[2], &o[3], &o[4], &o[5], &scale, &out_object, &lse_object)) {
        return NULL;
    }
    PyArrayObject *q = ql_array(o[0], "q", NPY_FLOAT32, 3);
    PyArrayObject *k = q == NULL ? NULL : ql_array(o[1], "k", NPY_FLOAT32, 3);
    PyArrayObject *v = k == NULL ? NULL : ql_array(o[2], "v", NPY_FLOAT32, 3);
    PyArrayObject *q_start = v == NULL ? NULL : ql_array(o[3], "q_start", NPY_INT64, 1);
    PyArrayObject *kv_start = q_start == NULL ? NULL : ql_array(o[4], "kv_start", NPY_INT64, 1);
    PyArrayObject *kv_len = kv_start == NULL ? NULL : ql_array(o[5], "kv_len", NPY_INT64, 1);
    if (kv_len == NULL || !ql_check_dim(k, "k", 2, ql_dim(q, 2)) || !ql_check_ranges(q, k, q_start, kv_start, kv_len)) {
        return NULL;
    }
    for (int axis = 0; axis < 3; axis++) {
        if (!ql_check_dim(v, "v", axis, ql_dim(k, axis))) { return NULL; }
    }
    if (ql_dim(k, 1) < 1 || ql_dim(q, 1) % ql_dim(k, 1) != 0) {
        return PyErr_Format(PyExc_ValueError, "q: %lld heads are no multiple of the %lld heads of k", (long long)ql_dim(q, 1),
                            (long long)ql_dim(k, 1));
    }
    PyArrayObject *lse = NULL;
    if (!also_out(lse_object, "lse", 2, PyArray_DIMS(q), &lse)) { return NULL; }
    PyArrayObject *out = ql_out(out_object, 3, (int64_t[]){ql_dim(q, 0), ql_dim(q, 1), ql_dim(q, 2)}, NPY_FLOAT32);
    if (out == NULL) { return NULL; }
    if (out_object == NULL || out_object == Py_None) { PyArray_FILLWBYTE(out, 0); } /* queries of no sequence */
    int stopped;
    ql_status status;
    QL_CALL_BEGIN
    ql_stage s;
    ql_stage_begin(&s);
    float *to = QL_INOUT(&s, out), *sums = QL_INOUT(&s, lse); /* queries of no sequence keep what is there */
    const float *queries = QL_IN(&s, q), *keys = QL_IN(&s, k), *values = QL_IN(&s, v);
    const int64_t *q_at = QL_IN(&s, q_start), *kv_at = QL_IN(&s, kv_start), *lengths = QL_IN(&s, kv_len);
    if (QL_READY(&s, attention_forward)) {
        s.be->attention_forward(to, sums, queries, keys, values, q_at, kv_at, lengths, ql_dim(kv_len, 0), ql_dim(q, 1),
                                ql_dim(k, 1), ql_dim(q, 2), scale);
    }
    status = ql_stage_end(&s);
    QL_CALL_END(stopped)
    return finish(out, stopped, status);
}

static PyObject *swiglu(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *gate_object, *up_object, *out_object = NULL;
    if (!PyArg_ParseTuple(arguments, "OO|O", &gate_object, &up_object, &out_object)) { return NULL; }
    PyArrayObject *gate = ql_array(gate_object, "gate", NPY_FLOAT32, -1);
    PyArrayObject *up = gate == NULL ? NULL : ql_array(up_object, "up", NPY_FLOAT32, -1);
    if (up == NULL) { return NULL; }
    if (!PyArray_SAMESHAPE(gate, up)) { return PyErr_Format(PyExc_ValueError, "up: its shape is not that of gate"); }
    int64_t dims[8];
    if (PyArray_NDIM(gate) > 8) { return PyErr_Format(PyExc_ValueError, "gate: got %d dimensions, expected at most 8", PyArray_NDIM(gate)); }
    for (int axis = 0; axis < PyArray_NDIM(gate); axis++) { dims[axis] = ql_dim(gate, axis); }
    PyArrayObject *out = ql_out(out_object, PyArray_NDIM(gate), dims, NPY_FLOAT32);
    if (out == NULL) { return NULL; }
    int stopped;
    ql_status status;
    QL_CALL_BEGIN
    ql_stage s;
    ql_stage_begin(&s);
    float *to = QL_OUT(&s, out);
    const float *gates = QL_IN(&s, gate), *ups = QL_IN(&s, up);
    if (QL_READY(&s, swiglu_forward)) { s.be->swiglu_forward(to, gates, ups, PyArray_SIZE(gate)); }
    status = ql_stage_end(&s);
    QL_CALL_END(stopped)
    return finish(out, stopped, status);
}

/* add_into(y, x): y += x in place */
static PyObject *add_into(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *y_object, *x_object;
    if (!PyArg_ParseTuple(arguments, "OO", &y_object, &x_object)) { return NULL; }
    PyArrayObject *y = ql_array(y_object, "y", NPY_FLOAT32, -1);
    PyArrayObject *x = y == NULL ? NULL : ql_array(x_object, "x", NPY_FLOAT32, -1);
    if (x == NULL) { return NULL; }
    if (!PyArray_SAMESHAPE(y, x) || !PyArray_ISWRITEABLE(y)) {
        return PyErr_Format(PyExc_ValueError, "y: not writeable, or its shape is not that of x");
    }
    int stopped;
    ql_status status;
    QL_CALL_BEGIN
    ql_stage s;
    ql_stage_begin(&s);
    float *to = QL_INOUT(&s, y);
    const float *from = QL_IN(&s, x);
    if (QL_READY(&s, add_forward)) { s.be->add_forward(to, from, PyArray_SIZE(y)); }
    status = ql_stage_end(&s);
    QL_CALL_END(stopped)
    return finish_in_place(stopped, status);
}

PyObject *ql_linear_on(const ql_backend *be, PyObject *x_object, PyObject *w_object, PyObject *out_object, int accumulate, int backward) {
    const char *name = backward ? "dy" : "x";
    PyArrayObject *x = ql_array(x_object, name, NPY_FLOAT32, 2);
    const ql_weight *w = x == NULL ? NULL : ql_weight_arg(w_object, "weight");
    if (w == NULL || !ql_check_dim(x, name, 1, backward ? w->n : w->k)) { return NULL; }
    if (accumulate && (out_object == NULL || out_object == Py_None)) {
        return PyErr_Format(PyExc_ValueError, "out: missing, accumulate adds to it");
    }
    int64_t m = ql_dim(x, 0);
    PyArrayObject *out = ql_out(out_object, 2, (int64_t[]){m, backward ? w->k : w->n}, NPY_FLOAT32);
    if (out == NULL) { return NULL; }
    int stopped;
    ql_status status;
    QL_CALL_BEGIN
    ql_stage s;
    ql_stage_begin_on(&s, be);
    if (!s.staged && !backward) { ql_weight_pack(&((WeightObject *)w_object)->weight, m); }
    float *to = ql_stage_out(&s, ql_data(out), ql_nbytes(out), accumulate);
    const float *from = QL_IN(&s, x);
    const ql_weight *staged = ql_stage_weight(&s, w_object);
    if (backward && QL_READY(&s, linear_backward_input[w->format])) {
        s.be->linear_backward_input[w->format](to, from, staged, m, accumulate);
    } else if (!backward && QL_READY(&s, linear_forward[w->format])) {
        s.be->linear_forward[w->format](to, from, staged, m, accumulate);
    }
    status = ql_stage_end(&s);
    QL_CALL_END(stopped)
    return finish(out, stopped, status);
}

static PyObject *linear_like(PyObject *arguments, int backward) {
    PyObject *x, *weight, *out = NULL;
    int accumulate = 0;
    if (!PyArg_ParseTuple(arguments, "OO|Op", &x, &weight, &out, &accumulate)) { return NULL; }
    return ql_linear_on(ql_selected(), x, weight, out, accumulate, backward);
}

static PyObject *linear(PyObject *self, PyObject *arguments) { return (void)self, linear_like(arguments, 0); }
static PyObject *linear_backward_input(PyObject *self, PyObject *arguments) { return (void)self, linear_like(arguments, 1); }

/* outs[i] = the i-th of `weights` on x; a tuple, or NULL with an error */
static PyObject *outputs_of(PyArrayObject *x, PyObject *weights, PyObject *outs) {
    Py_ssize_t count = PyTuple_GET_SIZE(weights);
    if (count < 1 || count > QL_PRODUCTS) {
        return PyErr_Format(PyExc_ValueError, "weights: got %zd, expected 1 to %d", count, QL_PRODUCTS);
    }
    if (outs != NULL && PyTuple_GET_SIZE(outs) != count) {
        return PyErr_Format(PyExc_ValueError, "outs: got %zd, expected one for each of %zd weights", PyTuple_GET_SIZE(outs), count);
    }
    PyObject *result = PyTuple_New(count);
    for (Py_ssize_t i = 0; result != NULL && i < count; i++) {
        const ql_weight *w = ql_weight_arg(PyTuple_GET_ITEM(weights, i), "weights");
        PyArrayObject *out = NULL;
        if (w != NULL && ql_check_dim(x, "x", 1, w->k)) {
            out = ql_out(outs != NULL ? PyTuple_GET_ITEM(outs, i) : NULL, 2, (int64_t[]){ql_dim(x, 0), w->n}, NPY_FLOAT32);
        }
        if (out == NULL) { return Py_DECREF(result), NULL; }
        PyTuple_SET_ITEM(result, i, (PyObject *)out);
    }
    return result;
}

static PyObject *linear_many(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *x_object, *weights, *outs = NULL;
    if (!PyArg_ParseTuple(arguments, "OO!|O", &x_object, &PyTuple_Type, &weights, &outs)) { return NULL; }
    if (outs == Py_None) { outs = NULL; }
    if (outs != NULL && !PyTuple_Check(outs)) { return PyErr_Format(PyExc_TypeError, "outs: got %s, expected a tuple", Py_TYPE(outs)->tp_name); }
    PyArrayObject *x = ql_array(x_object, "x", NPY_FLOAT32, 2);
    PyObject *result = x == NULL ? NULL : outputs_of(x, weights, outs);
    if (result == NULL) { return NULL; }
    int64_t count = PyTuple_GET_SIZE(result), m = ql_dim(x, 0);
    ql_linear_product products[QL_PRODUCTS];
    int stopped;
    ql_status status;
    QL_CALL_BEGIN
    ql_stage s;
    ql_stage_begin(&s);
    for (int64_t i = 0; i < count; i++) {
        PyObject *weight = PyTuple_GET_ITEM(weights, i);
        PyArrayObject *out = (PyArrayObject *)PyTuple_GET_ITEM(result, i);
        if (!s.staged) { ql_weight_pack(&((WeightObject *)weight)->weight, m); }
        products[i] = (ql_linear_product){QL_OUT(&s, out), ql_stage_weight(&s, weight)};
    }
    const float *from = QL_IN(&s, x);
    if (QL_READY(&s, linear_many_forward)) { s.be->linear_many_forward(products, count, from, m); }
    status = ql_stage_end(&s);
    QL_CALL_END(stopped)
    return ql_finish(result, stopped, status);
}

static PyObject *cross_entropy(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *logits_object, *targets_object;
    int gradient = 0, stopped;
    ql_status status;
    if (!PyArg_ParseTuple(arguments, "OO|p", &logits_object, &targets_object, &gradient)) { return NULL; }
    PyArrayObject *logits = ql_array(logits_object, "logits", NPY_FLOAT32, 2);
    PyArrayObject *targets = logits == NULL ? NULL : ql_array(targets_object, "targets", NPY_INT32, 1);
    if (targets == NULL || !ql_check_dim(targets, "targets", 0, ql_dim(logits, 0)) ||
        !check_ids(targets, "targets", ql_dim(logits, 1), -100)) {
        return NULL;
    }
    if (ql_dim(logits, 1) < 1) { return PyErr_Format(PyExc_ValueError, "logits: got no classes, expected at least 1"); }
    PyArrayObject *loss = ql_new(1, (int64_t[]){ql_dim(logits, 0)}, NPY_FLOAT32);
    PyArrayObject *dlogits = gradient ? ql_new(2, (int64_t[]){ql_dim(logits, 0), ql_dim(logits, 1)}, NPY_FLOAT32) : NULL;
    if (loss == NULL || (gradient && dlogits == NULL)) { return Py_XDECREF(loss), Py_XDECREF(dlogits), NULL; }
    QL_CALL_BEGIN
    ql_stage s;
    ql_stage_begin(&s);
    float *to = QL_OUT(&s, loss), *slopes = QL_OUT(&s, dlogits);
    const float *from = QL_IN(&s, logits);
    const int32_t *wanted = QL_IN(&s, targets);
    if (QL_READY(&s, cross_entropy_forward)) {
        s.be->cross_entropy_forward(to, slopes, from, wanted, ql_dim(logits, 0), ql_dim(logits, 1));
    }
    status = ql_stage_end(&s);
    QL_CALL_END(stopped)
    if (stopped || status != QL_OK) { return Py_DECREF(loss), Py_XDECREF(dlogits), stopped ? NULL : ql_raise(status); }
    return gradient ? Py_BuildValue("(NN)", loss, dlogits) : (PyObject *)loss;
}

/* gram_into(h, a, b, lower): h += a^T b in place */
static PyObject *gram_into(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *h_object, *a_object, *b_object;
    int lower, stopped;
    ql_status status;
    if (!PyArg_ParseTuple(arguments, "OOOp", &h_object, &a_object, &b_object, &lower)) { return NULL; }
    PyArrayObject *h = ql_array(h_object, "h", NPY_FLOAT32, 2);
    PyArrayObject *a = h == NULL ? NULL : ql_array(a_object, "a", NPY_FLOAT32, 2);
    PyArrayObject *b = a == NULL ? NULL : ql_array(b_object, "b", NPY_FLOAT32, 2);
    if (b == NULL || !ql_check_dim(b, "b", 0, ql_dim(a, 0)) || !ql_check_dim(h, "h", 0, ql_dim(a, 1)) ||
        !ql_check_dim(h, "h", 1, ql_dim(b, 1)) || (lower && !ql_check_dim(a, "a", 1, ql_dim(b, 1)))) {
        return NULL;
    }
    if (!PyArray_ISWRITEABLE(h)) { return PyErr_Format(PyExc_ValueError, "h: not writeable"); }
    QL_CALL_BEGIN
    ql_stage s;
    ql_stage_begin(&s);
    float *to = QL_INOUT(&s, h);
    const float *left = QL_IN(&s, a), *right = QL_IN(&s, b);
    if (QL_READY(&s, gram_forward)) { s.be->gram_forward(to, left, right, ql_dim(a, 0), ql_dim(a, 1), ql_dim(b, 1), lower); }
    status = ql_stage_end(&s);
    QL_CALL_END(stopped)
    return finish_in_place(stopped, status);
}

static PyObject *move_rows(PyObject *arguments, int gather) {
    PyObject *out_object, *x_object, *rows_object;
    if (!PyArg_ParseTuple(arguments, "OOO", &out_object, &x_object, &rows_object)) { return NULL; }
    PyArrayObject *out = ql_array(out_object, "out", NPY_FLOAT32, 2);
    PyArrayObject *x = out == NULL ? NULL : ql_array(x_object, "x", NPY_FLOAT32, 2);
    PyArrayObject *rows = x == NULL ? NULL : ql_array(rows_object, "rows", NPY_INT32, 1);
    if (rows == NULL || !ql_check_dim(x, "x", 1, ql_dim(out, 1)) ||
        !ql_check_dim(rows, "rows", 0, ql_dim(gather ? out : x, 0)) || !check_ids(rows, "rows", ql_dim(gather ? x : out, 0), 0)) {
        return NULL;
    }
    if (!PyArray_ISWRITEABLE(out)) { return PyErr_Format(PyExc_ValueError, "out: not writeable"); }
    int stopped;
    ql_status status;
    QL_CALL_BEGIN
    ql_stage s;
    ql_stage_begin(&s);
    float *to = QL_INOUT(&s, out);
    const float *from = QL_IN(&s, x);
    const int32_t *where = QL_IN(&s, rows);
    if (gather && QL_READY(&s, gather_rows_forward)) { s.be->gather_rows_forward(to, from, where, ql_dim(rows, 0), ql_dim(x, 1)); }
    if (!gather && QL_READY(&s, scatter_rows_forward)) { s.be->scatter_rows_forward(to, from, where, ql_dim(rows, 0), ql_dim(x, 1)); }
    status = ql_stage_end(&s);
    QL_CALL_END(stopped)
    return finish_in_place(stopped, status);
}

static PyObject *scatter_rows_into(PyObject *self, PyObject *arguments) { return (void)self, move_rows(arguments, 0); }
static PyObject *gather_rows_into(PyObject *self, PyObject *arguments) { return (void)self, move_rows(arguments, 1); }

/* sample(logits, streams, step, temperature, top_k, top_p, seed) -> tokens */
static PyObject *sample(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *logits_object, *streams_object;
    long long step, top_k;
    float temperature, top_p;
    unsigned long long seed;
    if (!PyArg_ParseTuple(arguments, "OOLfLfK", &logits_object, &streams_object, &step, &temperature, &top_k, &top_p, &seed)) { return NULL; }
    PyArrayObject *logits = ql_array(logits_object, "logits", NPY_FLOAT32, 2);
    PyArrayObject *streams = logits == NULL ? NULL : ql_array(streams_object, "streams", NPY_INT32, 1);
    if (streams == NULL || !ql_check_dim(streams, "streams", 0, ql_dim(logits, 0))) { return NULL; }
    if (ql_dim(logits, 1) < 1) { return PyErr_Format(PyExc_ValueError, "logits: got no classes, expected at least 1"); }
    if (!(temperature >= 0) || top_k < 0 || !(top_p > 0 && top_p <= 1)) {
        return PyErr_Format(PyExc_ValueError, "temperature, top_k or top_p: out of range");
    }
    PyArrayObject *out = ql_new(1, (int64_t[]){ql_dim(logits, 0)}, NPY_INT32);
    if (out == NULL) { return NULL; }
    int64_t now = step;
    int stopped;
    ql_status status;
    QL_CALL_BEGIN
    ql_stage s;
    ql_stage_begin(&s);
    int32_t *to = QL_OUT(&s, out);
    const float *from = QL_IN(&s, logits);
    const int32_t *stream = QL_IN(&s, streams);
    const int64_t *at = ql_stage_in(&s, &now, sizeof now);
    if (QL_READY(&s, sample_forward)) {
        s.be->sample_forward(to, from, stream, at, ql_dim(logits, 0), ql_dim(logits, 1), temperature, top_k, top_p, seed);
    }
    status = ql_stage_end(&s);
    QL_CALL_END(stopped)
    return finish(out, stopped, status);
}

static PyMethodDef methods[] = {
    {"scatter_rows_into", scatter_rows_into, METH_VARARGS, "scatter_rows_into(out (rows, c), x (t, c), rows int32 (t,)): out[rows[i]] = x[i]"},
    {"gather_rows_into", gather_rows_into, METH_VARARGS, "gather_rows_into(out (t, c), x, rows int32 (t,)): out[i] = x[rows[i]]"},
    {"sample", sample, METH_VARARGS, "sample(logits (b, v), streams int32 (b,), step, temperature, top_k, top_p, seed) -> int32 (b,)"},
    {"embedding", embedding, METH_VARARGS, "embedding(ids int32 (t,), table, out=None) -> (t, c)"},
    {"rmsnorm", rmsnorm, METH_VARARGS, "rmsnorm(x (t, c), gain (c,), eps, out=None, inv_rms=None) -> (t, c)"},
    {"rope", rope, METH_VARARGS, "rope(x (t, heads, d), cos, sin (positions, d/2), positions int32 (t,), out=None) -> (t, heads, d)"},
    {"attention", attention, METH_VARARGS, "attention(q (t, hq, d), k, v (rows, hkv, d), q_start, kv_start, kv_len int64, scale, out=None, lse=None) -> (t, hq, d)"},
    {"swiglu", swiglu, METH_VARARGS, "swiglu(gate, up, out=None) -> gate * sigmoid(gate) * up"},
    {"add_into", add_into, METH_VARARGS, "add_into(y, x): y += x"},
    {"linear", linear, METH_VARARGS, "linear(x (m, k), weight, out=None, accumulate=False) -> x W^T (m, n)"},
    {"linear_many", linear_many, METH_VARARGS, "linear_many(x (m, k), weights, outs=None) -> x W^T (m, n) of each of 1 to 3 weights; tuples"},
    {"linear_backward_input", linear_backward_input, METH_VARARGS, "linear_backward_input(dy (m, n), weight, out=None, accumulate=False) -> dy W (m, k)"},
    {"cross_entropy", cross_entropy, METH_VARARGS, "cross_entropy(logits (t, v), targets int32 (t,), gradient=False) -> loss (t,) or (loss, dlogits)"},
    {"gram_into", gram_into, METH_VARARGS, "gram_into(h (ka, kb), a (t, ka), b (t, kb), lower): h += a^T b"},
    {NULL, NULL, 0, NULL},
};

int ql_register_ops(PyObject *module) { return PyModule_AddFunctions(module, methods); }
