/* args.c: arrays in and out, and the signal poll of a call. */
#include "../core/pages.h"
#include "python.h"

#include <stdlib.h> /* realloc */
#include <string.h> /* memset */
#include <unistd.h> /* getpid */

static const char *type_name(int type) {
    switch (type) {
    case NPY_FLOAT32: return "float32";
    case NPY_FLOAT64: return "float64";
    case NPY_INT8: return "int8";
    case NPY_UINT8: return "uint8";
    case NPY_UINT16: return "uint16";
    case NPY_INT32: return "int32";
    case NPY_UINT32: return "uint32";
    case NPY_INT64: return "int64";
    default: return "another type";
    }
}

/* the native enum differs between platforms for equal sizes (long, long long): compare by equivalence */
PyArrayObject *ql_array(PyObject *object, const char *name, int type, int ndim) {
    if (!PyArray_Check(object)) {
        return PyErr_Format(PyExc_TypeError, "%s: got %s, expected a NumPy array of %s", name, Py_TYPE(object)->tp_name,
                            type_name(type)), NULL;
    }
    PyArrayObject *array = (PyArrayObject *)object;
    if (!PyArray_EquivTypenums(PyArray_TYPE(array), type) || !PyArray_ISNOTSWAPPED(array)) {
        return PyErr_Format(PyExc_TypeError, "%s: got dtype %S, expected %s", name, (PyObject *)PyArray_DESCR(array),
                            type_name(type)), NULL;
    }
    if (ndim >= 0 && PyArray_NDIM(array) != ndim) {
        return PyErr_Format(PyExc_ValueError, "%s: got %d dimensions, expected %d", name, PyArray_NDIM(array), ndim), NULL;
    }
    if (!PyArray_IS_C_CONTIGUOUS(array) || !PyArray_ISALIGNED(array)) {
        return PyErr_Format(PyExc_ValueError, "%s: the array must be C-contiguous and aligned", name), NULL;
    }
    return array;
}

PyArrayObject *ql_array_or_none(PyObject *object, const char *name, int type, int ndim, int *failed) {
    if (object == NULL || object == Py_None) { return NULL; }
    PyArrayObject *array = ql_array(object, name, type, ndim);
    if (array == NULL) { *failed = 1; }
    return array;
}

int ql_check_dim(PyArrayObject *array, const char *name, int axis, int64_t expected) {
    if (ql_dim(array, axis) == expected) { return 1; }
    PyErr_Format(PyExc_ValueError, "%s: dimension %d is %lld, expected %lld", name, axis, (long long)ql_dim(array, axis),
                 (long long)expected);
    return 0;
}

int ql_check_size(PyArrayObject *array, const char *name, int64_t expected) {
    if ((int64_t)PyArray_SIZE(array) >= expected) { return 1; }
    PyErr_Format(PyExc_ValueError, "%s: %lld elements, expected %lld", name, (long long)PyArray_SIZE(array),
                 (long long)expected);
    return 0;
}

/* ---- new arrays: on cache lines; numpy's own lie 16 bytes off, where kernels are slower (NEP 49) -------------------------- */

static void *take(void *context, size_t bytes) { return (void)context, ql_lines_take(bytes); }

static void *take_zeros(void *context, size_t count, size_t bytes) {
    if (bytes > 0 && count > SIZE_MAX / bytes) { return NULL; }
    void *memory = take(context, count * bytes);
    return memory != NULL ? memset(memory, 0, count * bytes) : NULL;
}

static void *resize(void *context, void *memory, size_t bytes) { return (void)context, realloc(memory, bytes > 0 ? bytes : 1); }
static void give_back(void *context, void *memory, size_t bytes) { (void)context, (void)bytes, ql_lines_release(memory); }

static PyDataMem_Handler on_cache_lines = {"quantlab", 1, {NULL, take, take_zeros, resize, give_back}};

PyArrayObject *ql_new(int ndim, const int64_t *dims, int type) {
    npy_intp shape[8];
    for (int i = 0; i < ndim; i++) { shape[i] = (npy_intp)dims[i]; }
    PyObject *handler = PyCapsule_New(&on_cache_lines, "mem_handler", NULL), *before = NULL;
    if (handler == NULL || (before = PyDataMem_SetHandler(handler)) == NULL) { return Py_XDECREF(handler), NULL; }
    PyArrayObject *array = (PyArrayObject *)PyArray_SimpleNew(ndim, shape, type);
    PyObject *ours = PyDataMem_SetHandler(before);
    Py_XDECREF(ours);
    Py_DECREF(before);
    Py_DECREF(handler);
    if (ours == NULL) { Py_CLEAR(array); }
    return array;
}

PyArrayObject *ql_out(PyObject *object, int ndim, const int64_t *dims, int type) {
    if (object == NULL || object == Py_None) { return ql_new(ndim, dims, type); }
    PyArrayObject *out = ql_array(object, "out", type, ndim);
    if (out == NULL) { return NULL; }
    for (int axis = 0; axis < ndim; axis++) {
        if (!ql_check_dim(out, "out", axis, dims[axis])) { return NULL; }
    }
    if (!PyArray_ISWRITEABLE(out)) { return PyErr_SetString(PyExc_ValueError, "out: not writeable"), NULL; }
    return (PyArrayObject *)Py_NewRef(out);
}

static int check_signals(void) {
    PyGILState_STATE state = PyGILState_Ensure();
    int interrupted = PyErr_CheckSignals() != 0;
    PyGILState_Release(state);
    return interrupted;
}

ql_poll ql_signal_poll(void) {
    static unsigned long main_thread; /* asked once a process: after a fork, the thread that forked is the main thread */
    static pid_t process;
    if (main_thread == 0 || process != getpid()) {
        process = getpid();
        PyObject *threading = PyImport_ImportModule("threading");
        PyObject *thread = threading == NULL ? NULL : PyObject_CallMethod(threading, "main_thread", NULL);
        PyObject *ident = thread == NULL ? NULL : PyObject_GetAttrString(thread, "ident");
        main_thread = ident == NULL ? 0 : PyLong_AsUnsignedLong(ident);
        Py_XDECREF(ident);
        Py_XDECREF(thread);
        Py_XDECREF(threading);
        PyErr_Clear();
    }
    return PyThread_get_thread_ident() == main_thread ? check_signals : NULL;
}
