/* py_device.c: arrays and weights that stay on a device from one call to the next. */
#include "device_object.h"

static PyTypeObject *array_type, *weight_type;

static const struct {
    const char *name;
    int numpy, size;
} types[QL_DEVICE_TYPES] = {
    {"float32", NPY_FLOAT32, 4}, {"bfloat16", NPY_UINT16, 2}, {"float64", NPY_FLOAT64, 8}, {"int32", NPY_INT32, 4}, {"int64", NPY_INT64, 8},
};

PyObject *ql_device_finish(void *out, int stopped, ql_status status) {
    if (stopped || status != QL_OK) {
        Py_XDECREF((PyObject *)out);
        return stopped ? NULL : ql_raise(status);
    }
    if (out == NULL) { Py_RETURN_NONE; }
    return out;
}

/* ---- arrays ---------------------------------------------------------------------------------------------------------- */

static int64_t count_of(const DeviceArrayObject *array) {
    int64_t count = 1;
    for (int axis = 0; axis < array->ndim; axis++) { count *= array->dim[axis]; }
    return count;
}
static size_t bytes_of(const DeviceArrayObject *array) { return (size_t)count_of(array) * (size_t)types[array->type].size; }

DeviceArrayObject *ql_device_new(const ql_backend *be, ql_device_type type, int ndim, const int64_t *dim) {
    DeviceArrayObject *array = (DeviceArrayObject *)array_type->tp_alloc(array_type, 0);
    if (array == NULL) { return NULL; }
    array->be = be, array->type = type, array->ndim = ndim;
    for (int axis = 0; axis < ndim; axis++) { array->dim[axis] = dim[axis]; }
    QL_DEVICE_BEGIN(be)
    status = be->alloc(&array->memory, bytes_of(array));
    QL_DEVICE_END
    return (DeviceArrayObject *)ql_device_finish(array, stopped, status);
}

static void array_dealloc(DeviceArrayObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    if (self->memory != NULL) {
        Py_BEGIN_ALLOW_THREADS
        if (self->be->begin(self->be->device) == QL_OK) {
            self->be->release(self->memory);
            (void)self->be->end();
        }
        Py_END_ALLOW_THREADS
    }
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static int same_device(const ql_backend *be, const char *name, const ql_backend **all) {
    if (*all == NULL) { *all = be; }
    if (*all == be) { return 1; }
    PyErr_Format(PyExc_ValueError, "%s: it is on another device than the arguments before it", name);
    return 0;
}

DeviceArrayObject *ql_device_array(PyObject *object, const char *name, ql_device_type type, int ndim, const ql_backend **be) {
    if (!PyObject_TypeCheck(object, array_type)) {
        return PyErr_Format(PyExc_TypeError, "%s: got %s, expected a DeviceArray of %s", name, Py_TYPE(object)->tp_name, types[type].name), NULL;
    }
    DeviceArrayObject *array = (DeviceArrayObject *)object;
    if (array->type != type) {
        return PyErr_Format(PyExc_TypeError, "%s: got %s, expected %s", name, types[array->type].name, types[type].name), NULL;
    }
    if (array->ndim != ndim) {
        return PyErr_Format(PyExc_ValueError, "%s: got %d dimensions, expected %d", name, array->ndim, ndim), NULL;
    }
    return same_device(array->be, name, be) ? array : NULL;
}

int ql_device_check_dim(const DeviceArrayObject *array, const char *name, int axis, int64_t expected) {
    if (array->dim[axis] == expected) { return 1; }
    PyErr_Format(PyExc_ValueError, "%s: dimension %d is %lld, expected %lld", name, axis, (long long)array->dim[axis], (long long)expected);
    return 0;
}

/* device_array(device, array) */
static PyObject *device_array(PyObject *self, PyObject *arguments) {
    (void)self;
    int device, found = 0;
    PyObject *object;
    if (!PyArg_ParseTuple(arguments, "iO", &device, &object)) { return NULL; }
    if (!PyArray_Check(object)) { return PyErr_Format(PyExc_TypeError, "array: got %s, expected a NumPy array", Py_TYPE(object)->tp_name); }
    while (found < QL_DEVICE_TYPES && !PyArray_EquivTypenums(PyArray_TYPE((PyArrayObject *)object), types[found].numpy)) { found++; }
    if (found == QL_DEVICE_TYPES) { return PyErr_Format(PyExc_TypeError, "array: dtype %S has no place on a device", (PyObject *)PyArray_DESCR((PyArrayObject *)object)); }
    PyArrayObject *from = ql_array(object, "array", types[found].numpy, -1);
    const ql_backend *be = from == NULL ? NULL : ql_device_arg(device);
    if (be == NULL) { return NULL; }
    if (PyArray_NDIM(from) > QL_DEVICE_RANK) { return PyErr_Format(PyExc_ValueError, "array: more than %d dimensions", QL_DEVICE_RANK); }
    int64_t dim[QL_DEVICE_RANK];
    for (int axis = 0; axis < PyArray_NDIM(from); axis++) { dim[axis] = ql_dim(from, axis); }
    DeviceArrayObject *out = ql_device_new(be, (ql_device_type)found, PyArray_NDIM(from), dim);
    if (out == NULL) { return NULL; }
    QL_DEVICE_BEGIN(be)
    status = be->upload(out->memory, ql_data(from), ql_nbytes(from));
    QL_DEVICE_END
    return ql_device_finish(out, stopped, status);
}

/* device_zeros(device, m, n) -> float32 (m, n) */
static PyObject *device_zeros(PyObject *self, PyObject *arguments) {
    (void)self;
    int device;
    long long m, n;
    if (!PyArg_ParseTuple(arguments, "iLL", &device, &m, &n)) { return NULL; }
    if (m < 0 || n < 0) { return PyErr_Format(PyExc_ValueError, "shape: got (%lld, %lld)", m, n); }
    const ql_backend *be = ql_device_arg(device);
    DeviceArrayObject *out = be == NULL ? NULL : ql_device_new(be, QL_DEVICE_FLOAT32, 2, (int64_t[]){m, n});
    if (out == NULL) { return NULL; }
    QL_DEVICE_BEGIN(be)
    status = be->fill(out->memory, 0, bytes_of(out));
    QL_DEVICE_END
    return ql_device_finish(out, stopped, status);
}

static PyObject *array_numpy(DeviceArrayObject *self, PyObject *unused) {
    (void)unused;
    PyArrayObject *out = ql_new(self->ndim, self->dim, types[self->type].numpy);
    if (out == NULL) { return NULL; }
    QL_DEVICE_BEGIN(self->be)
    status = self->be->download(ql_data(out), self->memory, bytes_of(self));
    QL_DEVICE_END
    return ql_device_finish(out, stopped, status);
}

static PyObject *array_copy(DeviceArrayObject *self, PyObject *unused) {
    (void)unused;
    DeviceArrayObject *out = ql_device_new(self->be, self->type, self->ndim, self->dim);
    if (out == NULL) { return NULL; }
    QL_DEVICE_BEGIN(self->be)
    status = self->be->copy(out->memory, self->memory, bytes_of(self));
    QL_DEVICE_END
    return ql_device_finish(out, stopped, status);
}

static PyObject *array_shape(DeviceArrayObject *self, void *closure) {
    (void)closure;
    PyObject *shape = PyTuple_New(self->ndim);
    for (int axis = 0; shape != NULL && axis < self->ndim; axis++) {
        PyObject *size = PyLong_FromLongLong(self->dim[axis]);
        if (size == NULL) { Py_CLEAR(shape); } else { PyTuple_SET_ITEM(shape, axis, size); }
    }
    return shape;
}

static Py_ssize_t array_length(DeviceArrayObject *self) { return self->ndim > 0 ? (Py_ssize_t)self->dim[0] : 0; }
static PyObject *array_ndim(DeviceArrayObject *self, void *closure) { return (void)closure, PyLong_FromLong(self->ndim); }
static PyObject *array_nbytes(DeviceArrayObject *self, void *closure) { return (void)closure, PyLong_FromSize_t(bytes_of(self)); }
static PyObject *array_device(DeviceArrayObject *self, void *closure) { return (void)closure, PyLong_FromLong(self->be->device); }
static PyObject *array_dtype(DeviceArrayObject *self, void *closure) { return (void)closure, PyUnicode_FromString(types[self->type].name); }

static PyMethodDef array_methods[] = {
    {"numpy", (PyCFunction)(void (*)(void))array_numpy, METH_NOARGS, "numpy() -> a NumPy array; bfloat16 as uint16"},
    {"copy", (PyCFunction)(void (*)(void))array_copy, METH_NOARGS, "copy() -> DeviceArray"},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef array_properties[] = {
    {"shape", (getter)(void (*)(void))array_shape, NULL, "sizes", NULL},
    {"ndim", (getter)(void (*)(void))array_ndim, NULL, "number of dimensions", NULL},
    {"nbytes", (getter)(void (*)(void))array_nbytes, NULL, "bytes on the device", NULL},
    {"device", (getter)(void (*)(void))array_device, NULL, "number of its device", NULL},
    {"dtype", (getter)(void (*)(void))array_dtype, NULL, "float32, bfloat16, float64, int32 or int64", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot array_slots[] = {
    {Py_tp_doc, "An array on a device; made by device_array, device_zeros, and what calibration computes."},
    {Py_tp_dealloc, __extension__(void *)array_dealloc},
    {Py_tp_methods, array_methods},
    {Py_tp_getset, array_properties},
    {Py_sq_length, __extension__(void *)array_length},
    {0, NULL},
};
static PyType_Spec array_spec = {"quantlab._core.DeviceArray", sizeof(DeviceArrayObject), 0,
                                 Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, array_slots};

/* ---- weights ---------------------------------------------------------------------------------------------------------- */

static PyObject *device_weight_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"device", "weight", NULL};
    int device;
    PyObject *object;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "iO", names, &device, &object)) { return NULL; }
    const ql_weight *weight = ql_weight_arg(object, "weight");
    const ql_backend *be = weight == NULL ? NULL : ql_device_arg(device);
    DeviceWeightObject *out = be == NULL ? NULL : (DeviceWeightObject *)type->tp_alloc(type, 0);
    if (out == NULL) { return NULL; }
    QL_DEVICE_BEGIN(be)
    status = be->weight_upload(&out->weight, weight);
    if (status == QL_OK) { out->be = be, out->source = object; }
    QL_DEVICE_END
    Py_XINCREF(out->source);
    return ql_device_finish(out, stopped, status);
}

static void weight_dealloc(DeviceWeightObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    if (self->be != NULL) {
        Py_BEGIN_ALLOW_THREADS
        if (self->be->begin(self->be->device) == QL_OK) {
            self->be->weight_release(&self->weight);
            (void)self->be->end();
        }
        Py_END_ALLOW_THREADS
    }
    Py_XDECREF(self->source);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

DeviceWeightObject *ql_device_weight(PyObject *object, const char *name, const ql_backend **be) {
    if (!PyObject_TypeCheck(object, weight_type)) {
        return PyErr_Format(PyExc_TypeError, "%s: got %s, expected a DeviceWeight", name, Py_TYPE(object)->tp_name), NULL;
    }
    DeviceWeightObject *weight = (DeviceWeightObject *)object;
    return same_device(weight->be, name, be) ? weight : NULL;
}

static PyObject *weight_floats(DeviceWeightObject *self, PyObject *unused) {
    (void)unused;
    const ql_weight *w = &self->weight;
    if (w->perm != NULL) { return PyErr_Format(PyExc_ValueError, "weight: its columns are reordered"); }
    DeviceArrayObject *out = ql_device_new(self->be, QL_DEVICE_FLOAT32, 2, (int64_t[]){w->n, w->k});
    if (out == NULL) { return NULL; }
    QL_DEVICE_BEGIN(self->be)
    self->be->decode_forward[w->format](out->memory, w->k, w, 0, w->n, 0, w->k);
    QL_DEVICE_END
    return ql_device_finish(out, stopped, status);
}

static PyMethodDef weight_methods[] = {
    {"floats", (PyCFunction)(void (*)(void))weight_floats, METH_NOARGS, "floats() -> DeviceArray float32 (n, k)"},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot weight_slots[] = {
    {Py_tp_doc, "DeviceWeight(device, weight): a copy of a Weight on a device, as long as it lives"},
    {Py_tp_new, __extension__(void *)device_weight_new},
    {Py_tp_dealloc, __extension__(void *)weight_dealloc},
    {Py_tp_methods, weight_methods},
    {0, NULL},
};
static PyType_Spec weight_spec = {"quantlab._core.DeviceWeight", sizeof(DeviceWeightObject), 0, Py_TPFLAGS_DEFAULT, weight_slots};

static PyMethodDef methods[] = {
    {"device_array", device_array, METH_VARARGS, "device_array(device, array) -> DeviceArray: a copy there"},
    {"device_zeros", device_zeros, METH_VARARGS, "device_zeros(device, m, n) -> DeviceArray float32 (m, n)"},
    {NULL, NULL, 0, NULL},
};

int ql_register_device(PyObject *module) {
    array_type = (PyTypeObject *)PyType_FromSpec(&array_spec);
    weight_type = (PyTypeObject *)PyType_FromSpec(&weight_spec);
    if (array_type == NULL || weight_type == NULL || PyModule_AddObjectRef(module, "DeviceArray", (PyObject *)array_type) < 0 ||
        PyModule_AddObjectRef(module, "DeviceWeight", (PyObject *)weight_type) < 0) {
        return -1;
    }
    return PyModule_AddFunctions(module, methods);
}
