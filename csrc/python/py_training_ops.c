/* py_training_ops.c: the ops of training as functions of arrays: gradients, dropout, AdamW. */
#include "python.h"

#include <math.h> /* pow, sqrt */

/* a new reference to the caller's output of the shape of `like`, or to a new array of zeros */
static PyArrayObject *out_like(PyObject *object, const char *name, PyArrayObject *like) {
    int ndim = PyArray_NDIM(like), failed = 0;
    PyArrayObject *out = ql_array_or_none(object, name, NPY_FLOAT32, ndim, &failed);
    if (failed) { return NULL; }
    if (out == NULL) { return (PyArrayObject *)PyArray_ZEROS(ndim, PyArray_DIMS(like), NPY_FLOAT32, 0); }
    for (int axis = 0; axis < ndim; axis++) {
        if (!ql_check_dim(out, name, axis, ql_dim(like, axis))) { return NULL; }
    }
    if (!PyArray_ISWRITEABLE(out)) { return PyErr_Format(PyExc_ValueError, "%s: not writeable", name), NULL; }
    return (PyArrayObject *)Py_NewRef(out);
}

/* float32 of the shape of `like`; NULL with an error, also where `like` is NULL */
static PyArrayObject *array_like(PyObject *object, const char *name, PyArrayObject *like) {
    PyArrayObject *array = like == NULL ? NULL : ql_array(object, name, NPY_FLOAT32, PyArray_NDIM(like));
    for (int axis = 0; array != NULL && axis < PyArray_NDIM(like); axis++) {
        if (!ql_check_dim(array, name, axis, ql_dim(like, axis))) { return NULL; }
    }
    return array;
}

static PyObject *rmsnorm_backward(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *o[4], *out_object = NULL;
    int accumulate = 0, stopped;
    ql_status status;
    if (!PyArg_ParseTuple(arguments, "OOOO|Op", &o[0], &o[1], &o[2], &o[3], &out_object, &accumulate)) { return NULL; }
    PyArrayObject *dy = ql_array(o[0], "dy", NPY_FLOAT32, 2), *x = array_like(o[1], "x", dy);
    PyArrayObject *gain = x == NULL ? NULL : ql_array(o[2], "gain", NPY_FLOAT32, 1);
    PyArrayObject *inv_rms = gain == NULL ? NULL : ql_array(o[3], "inv_rms", NPY_FLOAT32, 1);
    if (inv_rms == NULL || !ql_check_dim(gain, "gain", 0, ql_dim(x, 1)) || !ql_check_dim(inv_rms, "inv_rms", 0, ql_dim(x, 0))) {
        return NULL;
    }
    if (accumulate && (out_object == NULL || out_object == Py_None)) {
        return PyErr_Format(PyExc_ValueError, "out: missing, accumulate adds to it");
    }
    PyArrayObject *dx = out_like(out_object, "out", x);
    if (dx == NULL) { return NULL; }
    QL_CALL_BEGIN
    ql_stage s;
    ql_stage_begin(&s);
    float *to = QL_INOUT(&s, dx);
    const float *slopes = QL_IN(&s, dy), *from = QL_IN(&s, x), *gains = QL_IN(&s, gain), *inverse = QL_IN(&s, inv_rms);
    if (QL_READY(&s, rmsnorm_backward)) {
        s.be->rmsnorm_backward(to, slopes, from, gains, inverse, ql_dim(x, 0), ql_dim(x, 1), accumulate);
    }
    status = ql_stage_end(&s);
    QL_CALL_END(stopped)
    return ql_finish((PyObject *)dx, stopped, status);
}

/* no key row in two sequences: their gradients would be added at the same time */
static int check_apart(PyArrayObject *starts, PyArrayObject *lengths) {
    const int64_t *start = ql_data(starts), *length = ql_data(lengths);
    for (int64_t i = 0; i < ql_dim(starts, 0); i++) {
        for (int64_t j = 0; j < i; j++) {
            if (start[i] < start[j] + length[j] && start[j] < start[i] + length[i]) {
                return PyErr_Format(PyExc_ValueError, "kv_start: sequences %lld and %lld share rows of k", (long long)j, (long long)i), 0;
            }
        }
    }
    return 1;
}

enum { DOUT, Q, K, V, OUT, LSE, ACTIVATIONS };

/* the arrays of attention_backward, in the order of its arguments; 0 with an error */
static int attention_arrays(PyObject **o, PyArrayObject **a, PyArrayObject **ranges) {
    static const char *const names[] = {"q_start", "kv_start", "kv_len"};
    a[Q] = ql_array(o[Q], "q", NPY_FLOAT32, 3);
    a[K] = a[Q] == NULL ? NULL : ql_array(o[K], "k", NPY_FLOAT32, 3);
    a[V] = array_like(o[V], "v", a[K]);
    a[DOUT] = a[V] == NULL ? NULL : array_like(o[DOUT], "dout", a[Q]);
    a[OUT] = a[DOUT] == NULL ? NULL : array_like(o[OUT], "out", a[Q]);
    a[LSE] = a[OUT] == NULL ? NULL : ql_array(o[LSE], "lse", NPY_FLOAT32, 2);
    if (a[LSE] == NULL || !ql_check_dim(a[LSE], "lse", 0, ql_dim(a[Q], 0)) || !ql_check_dim(a[LSE], "lse", 1, ql_dim(a[Q], 1)) ||
        !ql_check_dim(a[K], "k", 2, ql_dim(a[Q], 2))) {
        return 0;
    }
    if (ql_dim(a[K], 1) < 1 || ql_dim(a[Q], 1) % ql_dim(a[K], 1) != 0) {
        return PyErr_Format(PyExc_ValueError, "q: %lld heads are no multiple of the %lld heads of k", (long long)ql_dim(a[Q], 1),
                            (long long)ql_dim(a[K], 1)), 0;
    }
    for (int i = 0; i < 3; i++) {
        ranges[i] = ql_array(o[ACTIVATIONS + i], names[i], NPY_INT64, 1);
        if (ranges[i] == NULL) { return 0; }
    }
    return ql_check_ranges(a[Q], a[K], ranges[0], ranges[1], ranges[2]) && check_apart(ranges[1], ranges[2]);
}

static PyObject *attention_backward(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *o[9], *out[3] = {NULL, NULL, NULL};
    PyArrayObject *a[ACTIVATIONS], *ranges[3];
    float scale;
    int stopped;
    ql_status status;
    if (!PyArg_ParseTuple(arguments, "OOOOOOOOOf|OOO", &o[0], &o[1], &o[2], &o[3], &o[4], &o[5], &o[6], &o[7], &o[8], &scale,
                          &out[0], &out[1], &out[2]) ||
        !attention_arrays(o, a, ranges)) {
        return NULL;
    }
    PyArrayObject *dq = out_like(out[0], "dq", a[Q]), *dk = dq == NULL ? NULL : out_like(out[1], "dk", a[K]);
    PyArrayObject *dv = dk == NULL ? NULL : out_like(out[2], "dv", a[V]);
    PyObject *result = dv == NULL ? NULL : PyTuple_Pack(3, dq, dk, dv);
    Py_XDECREF(dq), Py_XDECREF(dk), Py_XDECREF(dv); /* the tuple holds them */
    if (result == NULL) { return NULL; }
    QL_CALL_BEGIN
    ql_stage s;
    ql_stage_begin(&s);
    float *to[3] = {QL_INOUT(&s, dq), QL_INOUT(&s, dk), QL_INOUT(&s, dv)}; /* rows of no sequence keep what is there */
    const float *in[ACTIVATIONS];
    const int64_t *range[3];
    for (int i = 0; i < ACTIVATIONS; i++) { in[i] = QL_IN(&s, a[i]); }
    for (int i = 0; i < 3; i++) { range[i] = QL_IN(&s, ranges[i]); }
    if (QL_READY(&s, attention_backward)) {
        s.be->attention_backward(to[0], to[1], to[2], in[DOUT], in[Q], in[K], in[V], in[OUT], in[LSE], range[0], range[1], range[2],
                                 ql_dim(ranges[1], 0), ql_dim(a[Q], 1), ql_dim(a[K], 1), ql_dim(a[Q], 2), scale);
    }
    status = ql_stage_end(&s);
    QL_CALL_END(stopped)
    return ql_finish(result, stopped, status);
}

static PyObject *swiglu_backward(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *dy_object, *gate_object, *up_object, *dgate_object = NULL, *dup_object = NULL;
    int stopped;
    ql_status status;
    if (!PyArg_ParseTuple(arguments, "OOO|OO", &dy_object, &gate_object, &up_object, &dgate_object, &dup_object)) { return NULL; }
    PyArrayObject *dy = ql_array(dy_object, "dy", NPY_FLOAT32, -1), *gate = array_like(gate_object, "gate", dy);
    PyArrayObject *up = gate == NULL ? NULL : array_like(up_object, "up", dy);
    PyArrayObject *dgate = up == NULL ? NULL : out_like(dgate_object, "dgate", dy);
    PyArrayObject *dup = dgate == NULL ? NULL : out_like(dup_object, "dup", dy);
    PyObject *result = dup == NULL ? NULL : PyTuple_Pack(2, dgate, dup);
    Py_XDECREF(dgate), Py_XDECREF(dup); /* the tuple holds them */
    if (result == NULL) { return NULL; }
    QL_CALL_BEGIN
    ql_stage s;
    ql_stage_begin(&s);
    float *to_gate = QL_OUT(&s, dgate), *to_up = QL_OUT(&s, dup);
    const float *slopes = QL_IN(&s, dy), *gates = QL_IN(&s, gate), *ups = QL_IN(&s, up);
    if (QL_READY(&s, swiglu_backward)) { s.be->swiglu_backward(to_gate, to_up, slopes, gates, ups, PyArray_SIZE(dy)); }
    status = ql_stage_end(&s);
    QL_CALL_END(stopped)
    return ql_finish(result, stopped, status);
}

static PyObject *dropout(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *x_object, *out_object = NULL;
    float p;
    unsigned long long seed;
    long long stream;
    int stopped;
    ql_status status;
    if (!PyArg_ParseTuple(arguments, "OfKL|O", &x_object, &p, &seed, &stream, &out_object)) { return NULL; }
    PyArrayObject *x = ql_array(x_object, "x", NPY_FLOAT32, -1);
    if (x == NULL) { return NULL; }
    if (!(p >= 0.0f && p < 1.0f)) { return PyErr_Format(PyExc_ValueError, "p: got %S, expected 0 <= p < 1", PyTuple_GET_ITEM(arguments, 1)); }
    PyArrayObject *out = out_like(out_object, "out", x);
    if (out == NULL) { return NULL; }
    QL_CALL_BEGIN
    ql_stage s;
    ql_stage_begin(&s);
    float *to = QL_OUT(&s, out);
    const float *from = QL_IN(&s, x);
    if (QL_READY(&s, dropout_forward)) { s.be->dropout_forward(to, from, PyArray_SIZE(x), p, seed, stream); }
    status = ql_stage_end(&s);
    QL_CALL_END(stopped)
    return ql_finish((PyObject *)out, stopped, status);
}

static PyObject *scale_into(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *x_object;
    float factor;
    int stopped;
    ql_status status;
    if (!PyArg_ParseTuple(arguments, "Of", &x_object, &factor)) { return NULL; }
    PyArrayObject *x = ql_array(x_object, "x", NPY_FLOAT32, -1);
    if (x == NULL) { return NULL; }
    if (!PyArray_ISWRITEABLE(x)) { return PyErr_Format(PyExc_ValueError, "x: not writeable"); }
    QL_CALL_BEGIN
    ql_stage s;
    ql_stage_begin(&s);
    float *to = QL_INOUT(&s, x);
    if (QL_READY(&s, scale_forward)) { s.be->scale_forward(to, factor, PyArray_SIZE(x)); }
    status = ql_stage_end(&s);
    QL_CALL_END(stopped)
    return ql_finish(Py_NewRef(Py_None), stopped, status);
}

static PyObject *square_sum(PyObject *self, PyObject *x_object) {
    (void)self;
    PyArrayObject *x = ql_array(x_object, "x", NPY_FLOAT32, -1);
    if (x == NULL) { return NULL; }
    double sum = 0.0;
    int stopped;
    ql_status status;
    QL_CALL_BEGIN
    ql_stage s;
    ql_stage_begin(&s);
    double *to = ql_stage_out(&s, &sum, sizeof sum, 0);
    const float *from = QL_IN(&s, x);
    if (QL_READY(&s, square_sum_forward)) { s.be->square_sum_forward(to, from, PyArray_SIZE(x)); }
    status = ql_stage_end(&s);
    QL_CALL_END(stopped)
    return ql_finish(PyFloat_FromDouble(sum), stopped, status);
}

int ql_adamw_number(ql_adamw_step *step, long long number) {
    if (number < 1) { return PyErr_Format(PyExc_ValueError, "step: got %lld, expected 1 or more", number), 0; }
    step->correction1 = 1.0 - pow(step->beta1, (double)number), step->correction2 = 1.0 - pow(step->beta2, (double)number);
    return 1;
}

/* adamw(w, m, v, g, lr, beta1, beta2, eps, weight_decay, step, max_norm) -> norm of g */
static PyObject *adamw(PyObject *self, PyObject *arguments) {
    (void)self;
    static const char *const names[] = {"w", "m", "v", "g"};
    PyObject *o[4];
    PyArrayObject *a[4];
    ql_adamw_step step;
    long long number;
    if (!PyArg_ParseTuple(arguments, "OOOOdddddLd", &o[0], &o[1], &o[2], &o[3], &step.lr, &step.beta1, &step.beta2, &step.eps,
                          &step.weight_decay, &number, &step.max_norm)) {
        return NULL;
    }
    for (int i = 0; i < 4; i++) {
        a[i] = i == 0 ? ql_array(o[i], names[i], NPY_FLOAT32, 1) : array_like(o[i], names[i], a[0]);
        if (a[i] == NULL) { return NULL; }
        if (i < 3 && !PyArray_ISWRITEABLE(a[i])) { return PyErr_Format(PyExc_ValueError, "%s: not writeable", names[i]); }
    }
    if (!ql_adamw_number(&step, number)) { return NULL; }
    double squares = 0.0;
    int64_t count = ql_dim(a[0], 0);
    ql_status status;
    Py_BEGIN_ALLOW_THREADS
    ql_call_begin(NULL); /* Ctrl-C waits: half a step would be lost */
    ql_stage s;
    ql_stage_begin(&s);
    float *w = QL_INOUT(&s, a[0]), *m = QL_INOUT(&s, a[1]), *v = QL_INOUT(&s, a[2]);
    const float *g = QL_IN(&s, a[3]);
    double *sum = ql_stage_out(&s, &squares, sizeof squares, 0);
    if (QL_READY(&s, square_sum_forward) && QL_READY(&s, adamw_forward)) {
        s.be->square_sum_forward(sum, g, count);
        s.be->adamw_forward(w, m, v, g, sum, count, &step);
    }
    status = ql_stage_end(&s);
    ql_call_end();
    Py_END_ALLOW_THREADS
    return ql_finish(PyFloat_FromDouble(sqrt(squares)), 0, status);
}

static PyMethodDef methods[] = {
    {"rmsnorm_backward", rmsnorm_backward, METH_VARARGS, "rmsnorm_backward(dy (t, c), x, gain (c,), inv_rms (t,), out=None, accumulate=False) -> dx (t, c)"},
    {"attention_backward", attention_backward, METH_VARARGS, "attention_backward(dout (t, hq, d), q, k, v (rows, hkv, d), out, lse (t, hq), q_start, kv_start, kv_len int64, scale, dq=None, dk=None, dv=None) -> (dq, dk, dv)"},
    {"swiglu_backward", swiglu_backward, METH_VARARGS, "swiglu_backward(dy, gate, up, dgate=None, dup=None) -> (dgate, dup)"},
    {"dropout", dropout, METH_VARARGS, "dropout(x, p, seed, stream, out=None) -> x / (1 - p), or 0 where the number of its place is below p"},
    {"scale_into", scale_into, METH_VARARGS, "scale_into(x, factor): x *= factor"},
    {"square_sum", square_sum, METH_O, "square_sum(x) -> the sum of squares, a float"},
    {"adamw", adamw, METH_VARARGS, "adamw(w (count,), m, v, g, lr, beta1, beta2, eps, weight_decay, step, max_norm) -> the norm of g; one step in place"},
    {NULL, NULL, 0, NULL},
};

int ql_register_training_ops(PyObject *module) { return PyModule_AddFunctions(module, methods); }
