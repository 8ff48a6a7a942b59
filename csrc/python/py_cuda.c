/* py_cuda.c: CUDA devices: what is there, which one single ops use, its memory. */
#include "python.h"

static PyObject *cuda_built(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyBool_FromLong(ql_cuda_built());
}

/* cuda_info(device) -> dict; CudaError with the reason where the device cannot be used */
static PyObject *cuda_info(PyObject *self, PyObject *argument) {
    (void)self;
    int device = (int)PyLong_AsLong(argument);
    if (PyErr_Occurred()) { return NULL; }
    ql_cuda_info info;
    ql_status status;
    Py_BEGIN_ALLOW_THREADS
    status = ql_cuda_get_info(&info, device);
    Py_END_ALLOW_THREADS
    if (status != QL_OK) { return ql_raise(status); }
    return Py_BuildValue("{s:s,s:i,s:(ii),s:i,s:i,s:i,s:L,s:L,s:L,s:L,s:L}", "name", info.name, "count", info.count, "capability",
                         info.major, info.minor, "multiprocessors", info.multiprocessors, "driver", info.driver, "runtime",
                         info.runtime, "total", (long long)info.total, "free", (long long)info.free, "current",
                         (long long)info.current, "peak", (long long)info.peak, "held", (long long)info.held);
}

static PyObject *cuda_reset_peak(PyObject *self, PyObject *argument) {
    (void)self;
    int device = (int)PyLong_AsLong(argument);
    if (PyErr_Occurred()) { return NULL; }
    ql_status status;
    Py_BEGIN_ALLOW_THREADS
    status = ql_cuda_reset_peak(device);
    Py_END_ALLOW_THREADS
    if (status != QL_OK) { return ql_raise(status); }
    Py_RETURN_NONE;
}

static PyObject *cuda_set_folders(PyObject *self, PyObject *argument) {
    (void)self;
    const char *folders = PyUnicode_AsUTF8(argument);
    if (folders == NULL) { return NULL; }
    ql_cuda_set_folders(folders);
    Py_RETURN_NONE;
}

/* cuda_library(name) -> path; CudaError where it is not there */
static PyObject *cuda_library(PyObject *self, PyObject *argument) {
    (void)self;
    const char *name = PyUnicode_AsUTF8(argument), *path;
    if (name == NULL) { return NULL; }
    Py_BEGIN_ALLOW_THREADS
    path = ql_cuda_library(name);
    Py_END_ALLOW_THREADS
    return path != NULL ? PyUnicode_DecodeFSDefault(path) : ql_raise(QL_ECUDA);
}

const ql_backend *ql_device_arg(int device) {
    const ql_backend *be;
    if (device < 0) { return ql_cpu(); }
    Py_BEGIN_ALLOW_THREADS
    be = ql_cuda(device);
    Py_END_ALLOW_THREADS
    if (be == NULL) { ql_raise(QL_ECUDA); }
    return be;
}

static PyObject *device_select(PyObject *self, PyObject *argument) {
    (void)self;
    int device = (int)PyLong_AsLong(argument);
    if (PyErr_Occurred()) { return NULL; }
    const ql_backend *be = device < 0 ? NULL : ql_device_arg(device);
    if (device >= 0 && be == NULL) { return NULL; }
    ql_select(be);
    Py_RETURN_NONE;
}

static PyObject *device_selected(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyLong_FromLong(ql_selected() == ql_cpu() ? -1 : ql_selected()->device);
}

static PyMethodDef methods[] = {
    {"cuda_built", cuda_built, METH_NOARGS, "cuda_built() -> bool"},
    {"cuda_info", cuda_info, METH_O, "cuda_info(device) -> {name, capability, total, free, current, peak, …}"},
    {"cuda_reset_peak", cuda_reset_peak, METH_O, "cuda_reset_peak(device): the peak of its memory starts anew"},
    {"cuda_set_folders", cuda_set_folders, METH_O, "cuda_set_folders(text): where CUDA's libraries lie, separated by ':'"},
    {"cuda_library", cuda_library, METH_O, "cuda_library(name) -> path of cublas or cusolver"},
    {"device_select", device_select, METH_O, "device_select(n): single ops run on CUDA device n; -1: on the CPU"},
    {"device_selected", device_selected, METH_NOARGS, "device_selected() -> int; -1: the CPU"},
    {NULL, NULL, 0, NULL},
};

int ql_register_cuda(PyObject *module) { return PyModule_AddFunctions(module, methods); }
