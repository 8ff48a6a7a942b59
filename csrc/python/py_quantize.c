/* py_quantize.c: the quantizers that need nothing but the weight. */
#include "python.h"

#include "../core/bits.h"
#include "../quant/gguf.h"
#include "../quant/quantizers.h"

/* quantize_rtn(w, bits, group, sym) -> (codes, scales, zeros or None) */
static PyObject *quantize_rtn(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *object;
    int bits, sym, stopped;
    long long group;
    if (!PyArg_ParseTuple(arguments, "OiLp", &object, &bits, &group, &sym)) { return NULL; }
    PyArrayObject *w = ql_array(object, "w", NPY_FLOAT32, 2);
    if (w == NULL) { return NULL; }
    if (bits < 2 || bits > 8) { return PyErr_Format(PyExc_ValueError, "bits: got %d, expected 2 to 8", bits); }
    if (group < 1) { return PyErr_Format(PyExc_ValueError, "group: got %lld, expected at least 1", group); }
    int64_t n = ql_dim(w, 0), k = ql_dim(w, 1), groups = group < k ? (k + group - 1) / group : 1;
    if (n < 1 || k < 1) { return PyErr_Format(PyExc_ValueError, "w: shape is (%lld, %lld), expected at least 1 by 1", (long long)n, (long long)k); }
    PyArrayObject *codes = ql_new(2, (int64_t[]){n, ql_words_per_row(k, bits)}, NPY_UINT32);
    PyArrayObject *scales = ql_new(2, (int64_t[]){n, groups}, NPY_FLOAT32);
    PyArrayObject *zeros = sym ? NULL : ql_new(2, (int64_t[]){n, groups}, NPY_UINT8);
    if (codes == NULL || scales == NULL || (!sym && zeros == NULL)) {
        return Py_XDECREF(codes), Py_XDECREF(scales), Py_XDECREF(zeros), NULL;
    }
    QL_CALL_BEGIN
    ql_cpu()->quantize_affine_forward(ql_data(codes), ql_data(scales), ql_data(zeros), ql_data(w), n, k, bits,
                                      group < k ? group : k);
    QL_CALL_END(stopped)
    if (stopped) { return Py_DECREF(codes), Py_DECREF(scales), Py_XDECREF(zeros), NULL; }
    if (sym) { return Py_BuildValue("(NNO)", codes, scales, Py_None); }
    return Py_BuildValue("(NNN)", codes, scales, zeros);
}

/* double_quantize(scales) -> (codes, absmax, map, offset) */
static PyObject *double_quantize(PyObject *self, PyObject *object) {
    (void)self;
    int stopped;
    float offset;
    PyArrayObject *scales = ql_array(object, "scales", NPY_FLOAT32, 1);
    if (scales == NULL) { return NULL; }
    int64_t blocks = ql_dim(scales, 0);
    if (blocks < 1) { return PyErr_Format(PyExc_ValueError, "scales: got none, expected at least 1"); }
    PyArrayObject *codes = ql_new(1, (int64_t[]){blocks}, NPY_UINT8);
    PyArrayObject *absmax = ql_new(1, (int64_t[]){(blocks + 255) / 256}, NPY_FLOAT32);
    PyArrayObject *map = ql_new(1, (int64_t[]){256}, NPY_FLOAT32);
    if (codes == NULL || absmax == NULL || map == NULL) {
        return Py_XDECREF(codes), Py_XDECREF(absmax), Py_XDECREF(map), NULL;
    }
    memcpy(ql_data(map), ql_double_quant_map(), 256 * sizeof(float));
    QL_CALL_BEGIN
    ql_double_quantize(ql_data(codes), ql_data(absmax), &offset, ql_data(scales), blocks);
    QL_CALL_END(stopped)
    if (stopped) { return Py_DECREF(codes), Py_DECREF(absmax), Py_DECREF(map), NULL; }
    return Py_BuildValue("(NNNd)", codes, absmax, map, (double)offset);
}

/* first_nonfinite(x) -> flat index of the first NaN or infinity, or -1 */
static PyObject *first_nonfinite(PyObject *self, PyObject *object) {
    (void)self;
    int stopped;
    int64_t index;
    PyArrayObject *x = ql_array(object, "x", NPY_FLOAT32, -1);
    if (x == NULL) { return NULL; }
    QL_CALL_BEGIN
    index = ql_first_nonfinite(ql_data(x), (int64_t)PyArray_SIZE(x));
    QL_CALL_END(stopped)
    return stopped ? NULL : PyLong_FromLongLong(index);
}

/* The names of the types, a new tuple */
static PyObject *gguf_names(void) {
    PyObject *names = PyList_New(0), *tuple = NULL;
    for (const ql_gguf_type *type = ql_gguf_types; names != NULL && type->name != NULL; type++) {
        PyObject *name = PyUnicode_FromString(type->name);
        if (name == NULL || PyList_Append(names, name) < 0) { Py_CLEAR(names); }
        Py_XDECREF(name);
    }
    if (names != NULL) { tuple = PyList_AsTuple(names); }
    Py_XDECREF(names);
    return tuple;
}

static const ql_gguf_type *gguf_type(const char *name) {
    for (const ql_gguf_type *type = ql_gguf_types; type->name != NULL; type++) {
        if (strcmp(name, type->name) == 0) { return type; }
    }
    PyObject *names = gguf_names();
    if (names != NULL) { PyErr_Format(PyExc_ValueError, "kind: got '%s', expected one of %R", name, names); }
    Py_XDECREF(names);
    return NULL;
}

/* gguf_decode(blocks (count, bytes), kind) -> float32 (count, values) */
static PyObject *gguf_decode(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *object;
    const char *name;
    int stopped;
    if (!PyArg_ParseTuple(arguments, "Os", &object, &name)) { return NULL; }
    const ql_gguf_type *type = gguf_type(name);
    PyArrayObject *blocks = type == NULL ? NULL : ql_array(object, "blocks", NPY_UINT8, 2);
    if (blocks == NULL || !ql_check_dim(blocks, "blocks", 1, type->bytes)) { return NULL; }
    PyArrayObject *out = ql_new(2, (int64_t[]){ql_dim(blocks, 0), type->values}, NPY_FLOAT32);
    if (out == NULL) { return NULL; }
    QL_CALL_BEGIN
    ql_gguf_decode(ql_data(out), ql_data(blocks), ql_dim(blocks, 0), type);
    QL_CALL_END(stopped)
    if (stopped) { return Py_DECREF(out), NULL; }
    return (PyObject *)out;
}

static PyMethodDef methods[] = {
    {"quantize_rtn", quantize_rtn, METH_VARARGS, "quantize_rtn(w (n, k), bits, group, sym) -> (codes, scales, zeros or None)"},
    {"double_quantize", double_quantize, METH_O, "double_quantize(scales (blocks,)) -> (codes, absmax, map, offset)"},
    {"gguf_decode", gguf_decode, METH_VARARGS,
     "gguf_decode(blocks uint8 (count, bytes), kind) -> float32 (count, values); kind one of gguf_kinds"},
    {"first_nonfinite", first_nonfinite, METH_O, "first_nonfinite(x) -> flat index of the first NaN or infinity, or -1"},
    {NULL, NULL, 0, NULL},
};

int ql_register_quantize(PyObject *module) {
    PyObject *names = gguf_names();
    int status = names == NULL ? -1 : PyModule_AddObjectRef(module, "gguf_kinds", names);
    Py_XDECREF(names);
    return status < 0 ? -1 : PyModule_AddFunctions(module, methods);
}
