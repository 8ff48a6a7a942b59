/* py_weight.c: _core.Weight, a validated ql_weight over NumPy buffers; decode and quantize. */
#include "python.h"

#include "../formats/weight.h"
#include "../quant/pack.h"

PyTypeObject *ql_weight_type;

int ql_format_arg(const char *text, ql_format *format) {
    for (int f = 0; f < QL_FORMAT_COUNT; f++) {
        if (strcmp(text, ql_format_name(f)) == 0) { return *format = f, 1; }
    }
    PyErr_Format(PyExc_ValueError, "format: got '%s', expected f32, f16, bf16, int8, affine, nf4 or fp4", text);
    return 0;
}

const ql_weight *ql_weight_arg(PyObject *object, const char *name) {
    if (PyObject_TypeCheck(object, ql_weight_type)) { return &((WeightObject *)object)->weight; }
    PyErr_Format(PyExc_TypeError, "%s: got %s, expected a _core.Weight", name, Py_TYPE(object)->tp_name);
    return NULL;
}

const ql_weight *ql_table_arg(PyObject *object, const char *name) {
    const ql_weight *w = ql_weight_arg(object, name);
    if (w == NULL || w->perm == NULL) { return w; }
    PyErr_Format(PyExc_ValueError, "%s: its columns are reordered (perm), rows cannot be looked up in it", name);
    return NULL;
}

/* what a format asks of its arrays: NumPy type and number of code elements, scales and zeros */
static int64_t code_count(const ql_weight *w, int *type) {
    switch (w->format) {
    case QL_F32: return *type = NPY_FLOAT32, w->n * w->k;
    case QL_F16: case QL_BF16: return *type = NPY_UINT16, w->n * w->k;
    case QL_INT8: return *type = NPY_INT8, w->n * w->k;
    case QL_AFFINE: return *type = NPY_UINT32, w->n * ql_words_per_row(w->k, w->bits);
    default: return *type = NPY_UINT8, (w->n * w->k + 1) / 2;
    }
}

static int64_t scale_count(const ql_weight *w) {
    switch (w->format) {
    case QL_INT8: return w->n;
    case QL_AFFINE: return w->n * ql_groups_per_row(w);
    case QL_NF4: case QL_FP4: return (w->n * w->k + w->group - 1) / w->group;
    default: return 0;
    }
}

static int check_header(ql_weight *w) {
    int bits_ok = w->format != QL_AFFINE || (w->bits >= 2 && w->bits <= 8);
    if (w->n < 1 || w->k < 1 || w->n > INT32_MAX || w->k > INT32_MAX) {
        return PyErr_Format(PyExc_ValueError, "shape: got (%lld, %lld), expected sizes of 1 to 2^31 - 1",
                            (long long)w->n, (long long)w->k), 0;
    }
    if (!bits_ok) { return PyErr_Format(PyExc_ValueError, "bits: got %d, expected 2 to 8", w->bits), 0; }
    if (w->group < 1 || w->group > INT32_MAX) {
        return PyErr_Format(PyExc_ValueError, "group: got %lld, expected 1 to 2^31 - 1", (long long)w->group), 0;
    }
    return 1;
}

static int check_perm(const ql_weight *w) {
    char *seen = PyMem_Calloc((size_t)w->k, 1);
    if (seen == NULL) { return PyErr_NoMemory(), 0; }
    int ok = 1;
    for (int64_t j = 0; ok && j < w->k; j++) {
        ok = w->perm[j] >= 0 && w->perm[j] < w->k && !seen[w->perm[j]];
        if (ok) { seen[w->perm[j]] = 1; }
    }
    PyMem_Free(seen);
    if (!ok) { PyErr_SetString(PyExc_ValueError, "perm: not a permutation of the columns"); }
    return ok;
}

static int fill_scales(ql_weight *w, PyObject *scales, PyObject *scale_codes, PyObject *scale_absmax, PyObject *scale_map) {
    int failed = 0;
    int64_t count = scale_count(w);
    PyArrayObject *plain = ql_array_or_none(scales, "scales", NPY_FLOAT32, -1, &failed);
    PyArrayObject *codes = ql_array_or_none(scale_codes, "scale_codes", NPY_UINT8, -1, &failed);
    PyArrayObject *absmax = ql_array_or_none(scale_absmax, "scale_absmax", NPY_FLOAT32, -1, &failed);
    PyArrayObject *map = ql_array_or_none(scale_map, "scale_map", NPY_FLOAT32, -1, &failed);
    if (failed) { return 0; }
    if (codes != NULL && absmax != NULL && map != NULL && (w->format == QL_NF4 || w->format == QL_FP4)) {
        if (!ql_check_size(codes, "scale_codes", count) || !ql_check_size(map, "scale_map", 256) ||
            !ql_check_size(absmax, "scale_absmax", (count + QL_SCALE_BLOCK - 1) / QL_SCALE_BLOCK)) {
            return 0;
        }
        w->scale_codes = ql_data(codes), w->scale_absmax = ql_data(absmax), w->scale_map = ql_data(map);
        return 1;
    }
    if (codes != NULL || absmax != NULL || map != NULL) {
        PyErr_SetString(PyExc_ValueError, "scale_codes: double quantization needs scale_codes, scale_absmax and scale_map, and nf4 or fp4");
        return 0;
    }
    if (plain == NULL && count > 0) { return PyErr_SetString(PyExc_ValueError, "scales: missing"), 0; }
    if (plain != NULL && !ql_check_size(plain, "scales", count)) { return 0; }
    w->scales = ql_data(plain);
    return 1;
}

static PyObject *weight_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"format", "bits", "n", "k", "group", "codes", "scales", "zeros", "perm",
                            "scale_codes", "scale_absmax", "scale_map", "scale_offset", NULL};
    const char *format;
    int bits, code_type, failed = 0;
    long long n, k, group;
    float offset = 0.0f;
    PyObject *codes, *scales = NULL, *zeros = NULL, *perm = NULL, *scale_codes = NULL, *scale_absmax = NULL, *scale_map = NULL;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "siLLLO|OOOOOOf", names, &format, &bits, &n, &k, &group, &codes,
                                     &scales, &zeros, &perm, &scale_codes, &scale_absmax, &scale_map, &offset)) {
        return NULL;
    }
    ql_weight w = {.bits = (uint8_t)bits, .n = n, .k = k, .group = group, .scale_offset = offset};
    if (bits < 1 || bits > 32) { return PyErr_Format(PyExc_ValueError, "bits: got %d", bits); }
    if (!ql_format_arg(format, &w.format) || !check_header(&w)) { return NULL; }
    int64_t count = code_count(&w, &code_type);
    PyArrayObject *code_array = ql_array(codes, "codes", code_type, -1);
    if (code_array == NULL || !ql_check_size(code_array, "codes", count)) { return NULL; }
    w.codes = ql_data(code_array);
    if (!fill_scales(&w, scales, scale_codes, scale_absmax, scale_map)) { return NULL; }
    PyArrayObject *zero_array = ql_array_or_none(zeros, "zeros", NPY_UINT8, -1, &failed);
    PyArrayObject *perm_array = ql_array_or_none(perm, "perm", NPY_INT32, 1, &failed);
    if (failed) { return NULL; }
    if (zero_array != NULL && (w.format != QL_AFFINE || !ql_check_size(zero_array, "zeros", scale_count(&w)))) {
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "zeros: only the affine format has them");
    }
    if (perm_array != NULL && !ql_check_dim(perm_array, "perm", 0, w.k)) { return NULL; }
    w.zeros = ql_data(zero_array), w.perm = ql_data(perm_array);
    if (w.perm != NULL && !check_perm(&w)) { return NULL; }
    WeightObject *self = (WeightObject *)type->tp_alloc(type, 0);
    if (self == NULL) { return NULL; }
    self->weight = w;
#define OR_NONE(object) (object) == NULL ? Py_None : (object)
    self->arrays = PyTuple_Pack(7, codes, OR_NONE(scales), OR_NONE(zeros), OR_NONE(perm), OR_NONE(scale_codes),
                                OR_NONE(scale_absmax), OR_NONE(scale_map));
    if (self->arrays == NULL) { return Py_DECREF(self), NULL; }
    return (PyObject *)self;
}

static void weight_dealloc(WeightObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    if (self->placed != NULL) {
        Py_BEGIN_ALLOW_THREADS
        ql_unplace_all(self);
        Py_END_ALLOW_THREADS
    }
    Py_XDECREF(self->arrays);
    ql_weight_unpack(&self->weight);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyObject *packed_nbytes(PyObject *self, void *closure) {
    (void)closure;
    const ql_weight *w = &((WeightObject *)self)->weight;
    return PyLong_FromLongLong(w->packed == NULL ? 0 : (long long)ql_packed_nbytes(w));
}

static PyGetSetDef properties[] = {
    {"packed_nbytes", packed_nbytes, NULL, "bytes of the copy that products with few rows stream; 0 before the first of them", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "Weight(format, bits, n, k, group, codes, scales=None, zeros=None, perm=None, scale_codes=None, "
                "scale_absmax=None, scale_map=None, scale_offset=0.0): a validated view of NumPy buffers"},
    {Py_tp_new, __extension__(void *)weight_new},
    {Py_tp_dealloc, __extension__(void *)weight_dealloc},
    {Py_tp_getset, properties},
    {0, NULL},
};
static PyType_Spec spec = {"quantlab._core.Weight", sizeof(WeightObject), 0, Py_TPFLAGS_DEFAULT, slots};

/* rows of stored columns -> columns in the order of W */
static ql_status reorder_rows(float *out, const ql_weight *w, int64_t rows) {
    if (w->perm == NULL) { return QL_OK; }
    float *stored = PyMem_RawMalloc((size_t)w->k * sizeof *stored);
    if (stored == NULL) { return ql_fail(QL_ENOMEM, "out of memory"); }
    for (int64_t i = 0; i < rows; i++, out += w->k) {
        memcpy(stored, out, (size_t)w->k * sizeof *stored);
        for (int64_t j = 0; j < w->k; j++) { out[w->perm[j]] = stored[j]; }
    }
    PyMem_RawFree(stored);
    return QL_OK;
}

/* decode(weight, i0, i1, out=None) -> float32 (i1 - i0, k), columns in the order of W */
static PyObject *decode(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *object, *out_object = NULL;
    long long i0, i1;
    if (!PyArg_ParseTuple(arguments, "OLL|O", &object, &i0, &i1, &out_object)) { return NULL; }
    const ql_weight *w = ql_weight_arg(object, "weight");
    if (w == NULL) { return NULL; }
    if (i0 < 0 || i1 < i0 || i1 > w->n) {
        return PyErr_Format(PyExc_ValueError, "rows: got %lld to %lld, expected 0 to %lld", i0, i1, (long long)w->n);
    }
    PyArrayObject *out = ql_out(out_object, 2, (int64_t[]){i1 - i0, w->k}, NPY_FLOAT32);
    if (out == NULL) { return NULL; }
    int stopped;
    ql_status status;
    QL_CALL_BEGIN
    ql_stage s;
    ql_stage_begin(&s);
    const ql_weight *staged = ql_stage_weight(&s, object);
    float *to = QL_OUT(&s, out);
    if (!s.staged) {
        ql_decode_rows(to, w, i0, i1);
    } else if (ql_stage_ready(&s, s.be->decode_forward[w->format] != NULL, "decode_forward")) {
        s.be->decode_forward[w->format](to, w->k, staged, i0, i1, 0, w->k);
    }
    status = ql_stage_end(&s);
    if (s.staged && status == QL_OK) { status = reorder_rows(ql_data(out), w, i1 - i0); }
    QL_CALL_END(stopped)
    if (stopped || status != QL_OK) { return Py_DECREF(out), stopped ? NULL : ql_raise(status); }
    return (PyObject *)out;
}

/* quantize(x, format, group) -> (codes, scales) for nf4, fp4 (flat blocks) and int8 (rows) */
static PyObject *quantize(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *object;
    const char *name;
    long long group;
    ql_format format;
    if (!PyArg_ParseTuple(arguments, "OsL", &object, &name, &group) || !ql_format_arg(name, &format)) { return NULL; }
    PyArrayObject *x = ql_array(object, "x", NPY_FLOAT32, -1);
    if (x == NULL) { return NULL; }
    if (format != QL_NF4 && format != QL_FP4 && format != QL_INT8) {
        return PyErr_Format(PyExc_ValueError, "format: got %s, expected nf4, fp4 or int8", name);
    }
    int64_t count = PyArray_SIZE(x);
    if (group < 1 || group > INT32_MAX || count < 1 || (format == QL_INT8 && count % group != 0)) {
        return PyErr_Format(PyExc_ValueError, "group: got %lld over %lld elements", group, (long long)count);
    }
    PyArrayObject *codes = format == QL_INT8 ? ql_new(1, (int64_t[]){count}, NPY_INT8) : ql_new(1, (int64_t[]){(count + 1) / 2}, NPY_UINT8);
    PyArrayObject *scales = ql_new(1, (int64_t[]){(count + group - 1) / group}, NPY_FLOAT32);
    if (codes == NULL || scales == NULL) { return Py_XDECREF(codes), Py_XDECREF(scales), NULL; }
    int stopped;
    ql_status status;
    QL_CALL_BEGIN
    ql_stage s;
    ql_stage_begin(&s);
    void *to = QL_OUT(&s, codes), *to_scales = QL_OUT(&s, scales);
    const float *from = QL_IN(&s, x);
    if (ql_stage_ready(&s, s.be->quantize_forward[format] != NULL, "quantize_forward")) {
        s.be->quantize_forward[format](to, to_scales, from, format, count, group);
    }
    status = ql_stage_end(&s);
    QL_CALL_END(stopped)
    if (stopped || status != QL_OK) { return Py_DECREF(codes), Py_DECREF(scales), stopped ? NULL : ql_raise(status); }
    return Py_BuildValue("(NN)", codes, scales);
}

static PyMethodDef methods[] = {
    {"decode", decode, METH_VARARGS, "decode(weight, i0, i1, out=None) -> float32 (i1 - i0, k)"},
    {"quantize", quantize, METH_VARARGS, "quantize(x, format, group) -> (codes, scales); format nf4, fp4 or int8"},
    {NULL, NULL, 0, NULL},
};

int ql_register_weight(PyObject *module) {
    ql_weight_type = (PyTypeObject *)PyType_FromSpec(&spec);
    if (ql_weight_type == NULL || PyModule_AddObjectRef(module, "Weight", (PyObject *)ql_weight_type) < 0) { return -1; }
    return PyModule_AddFunctions(module, methods);
}
