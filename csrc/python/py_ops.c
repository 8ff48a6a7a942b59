/* py_ops.c: the ops as functions of arrays. Each: parse, validate, release the GIL, call, raise. */
#include "python.h"

#include "../quant/pack.h"

static PyObject *finish(PyArrayObject *out, int stopped) {
    if (stopped) { return Py_DECREF(out), NULL; }
    return (PyObject *)out;
}

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
    QL_CALL_BEGIN
    ql_cpu()->embedding_forward(ql_data(out), ql_data(ids), table, ql_dim(ids, 0));
    QL_CALL_END(stopped)
    return finish(out, stopped);
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
    QL_CALL_BEGIN
    ql_cpu()->rmsnorm_forward(ql_data(out), ql_data(inv_rms), ql_data(x), ql_data(gain), ql_dim(x, 0), ql_dim(x, 1), eps);
    QL_CALL_END(stopped)
    return finish(out, stopped);
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
    QL_CALL_BEGIN
    ql_cpu()->rope_forward(ql_data(out), ql_data(cos), ql_data(sin), ql_data(positions), ql_dim(x, 0), ql_dim(x, 1), ql_dim(x, 2));
    QL_CALL_END(stopped)
    return finish(out, stopped);
}

/* attention(q, k, v, q_start, kv_start, kv_len, scale) -> out (t, hq, d); ranges are checked against q, k, v */
static int check_ranges(PyArrayObject *q, PyArrayObject *k, PyArrayObject *qs, PyArrayObject *ks, PyArrayObject *kl) {
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
    if (kv_len == NULL || !ql_check_dim(k, "k", 2, ql_dim(q, 2)) || !check_ranges(q, k, q_start, kv_start, kv_len)) {
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
    QL_CALL_BEGIN
    ql_cpu()->attention_forward(ql_data(out), ql_data(lse), ql_data(q), ql_data(k), ql_data(v), ql_data(q_start), ql_data(kv_start),
                                ql_data(kv_len), ql_dim(kv_len, 0), ql_dim(q, 1), ql_dim(k, 1), ql_dim(q, 2), scale);
    QL_CALL_END(stopped)
    return finish(out, stopped);
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
    QL_CALL_BEGIN
    ql_cpu()->swiglu_forward(ql_data(out), ql_data(gate), ql_data(up), PyArray_SIZE(gate));
    QL_CALL_END(stopped)
    return finish(out, stopped);
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
    QL_CALL_BEGIN
    ql_cpu()->add_forward(ql_data(y), ql_data(x), PyArray_SIZE(y));
    QL_CALL_END(stopped)
    if (stopped) { return NULL; }
    Py_RETURN_NONE;
}

static PyObject *linear_like(PyObject *arguments, int backward) {
    PyObject *x_object, *w_object, *out_object = NULL;
    int accumulate = 0;
    if (!PyArg_ParseTuple(arguments, "OO|Op", &x_object, &w_object, &out_object, &accumulate)) { return NULL; }
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
    QL_CALL_BEGIN
    if (!backward && m <= QL_GEMV_ROWS) { ql_weight_pack(&((WeightObject *)w_object)->weight); }
    if (backward) {
        ql_cpu()->linear_backward_input[w->format](ql_data(out), ql_data(x), w, m, accumulate);
    } else {
        ql_cpu()->linear_forward[w->format](ql_data(out), ql_data(x), w, m, accumulate);
    }
    QL_CALL_END(stopped)
    return finish(out, stopped);
}

static PyObject *linear(PyObject *self, PyObject *arguments) { return (void)self, linear_like(arguments, 0); }
static PyObject *linear_backward_input(PyObject *self, PyObject *arguments) { return (void)self, linear_like(arguments, 1); }

static PyObject *cross_entropy(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *logits_object, *targets_object;
    int gradient = 0, stopped;
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
    ql_cpu()->cross_entropy_forward(ql_data(loss), ql_data(dlogits), ql_data(logits), ql_data(targets), ql_dim(logits, 0), ql_dim(logits, 1));
    QL_CALL_END(stopped)
    if (stopped) { return Py_DECREF(loss), Py_XDECREF(dlogits), NULL; }
    return gradient ? Py_BuildValue("(NN)", loss, dlogits) : (PyObject *)loss;
}

/* gram_into(h, a, b, lower): h += a^T b in place */
static PyObject *gram_into(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *h_object, *a_object, *b_object;
    int lower, stopped;
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
    ql_cpu()->gram_forward(ql_data(h), ql_data(a), ql_data(b), ql_dim(a, 0), ql_dim(a, 1), ql_dim(b, 1), lower);
    QL_CALL_END(stopped)
    if (stopped) { return NULL; }
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"embedding", embedding, METH_VARARGS, "embedding(ids int32 (t,), table, out=None) -> (t, c)"},
    {"rmsnorm", rmsnorm, METH_VARARGS, "rmsnorm(x (t, c), gain (c,), eps, out=None, inv_rms=None) -> (t, c)"},
    {"rope", rope, METH_VARARGS, "rope(x (t, heads, d), cos, sin (positions, d/2), positions int32 (t,), out=None) -> (t, heads, d)"},
    {"attention", attention, METH_VARARGS, "attention(q (t, hq, d), k, v (rows, hkv, d), q_start, kv_start, kv_len int64, scale, out=None, lse=None) -> (t, hq, d)"},
    {"swiglu", swiglu, METH_VARARGS, "swiglu(gate, up, out=None) -> gate * sigmoid(gate) * up"},
    {"add_into", add_into, METH_VARARGS, "add_into(y, x): y += x"},
    {"linear", linear, METH_VARARGS, "linear(x (m, k), weight, out=None, accumulate=False) -> x W^T (m, n)"},
    {"linear_backward_input", linear_backward_input, METH_VARARGS, "linear_backward_input(dy (m, n), weight, out=None, accumulate=False) -> dy W (m, k)"},
    {"cross_entropy", cross_entropy, METH_VARARGS, "cross_entropy(logits (t, v), targets int32 (t,), gradient=False) -> loss (t,) or (loss, dlogits)"},
    {"gram_into", gram_into, METH_VARARGS, "gram_into(h (ka, kb), a (t, ka), b (t, kb), lower): h += a^T b"},
    {NULL, NULL, 0, NULL},
};

int ql_register_ops(PyObject *module) { return PyModule_AddFunctions(module, methods); }
