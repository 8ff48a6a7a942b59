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

/* cuda_fetch(out, address): fills out (uint8) from another library's memory on a device */
static PyObject *cuda_fetch(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *out_object;
    unsigned long long address;
    if (!PyArg_ParseTuple(arguments, "OK", &out_object, &address)) { return NULL; }
    PyArrayObject *out = ql_array(out_object, "out", NPY_UINT8, 1);
    if (out == NULL) { return NULL; }
    ql_status status;
    void *host = ql_data(out);
    size_t bytes = ql_nbytes(out);
    Py_BEGIN_ALLOW_THREADS
    status = bytes > 0 ? ql_cuda_fetch(host, (const void *)(uintptr_t)address, bytes) : QL_OK;
    Py_END_ALLOW_THREADS
    if (status != QL_OK) { return ql_raise(status); }
    Py_RETURN_NONE;
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

static const char *const bench_names[QL_BENCH_COUNT] = {
#define X(NAME, name) #name,
    QL_BENCH_OPS(X)
#undef X
};

static int bench_op(ql_bench *bench, const char *name) {
    for (int op = 0; op < QL_BENCH_COUNT; op++) {
        if (strcmp(name, bench_names[op]) == 0) { return bench->op = op, 1; }
    }
    return PyErr_Format(PyExc_ValueError, "op: got '%s', which cannot be timed", name), 0;
}

/* cuda_bench(op, weights, samples, device, format, m, n, k, group, b, keys, hq, hkv, d, rotate) -> float64 (samples,) */
static PyObject *cuda_bench(PyObject *self, PyObject *arguments, PyObject *keywords) {
    (void)self;
    static char *names[] = {"op", "weights", "samples", "device", "format", "m", "n", "k", "group", "b", "keys", "hq", "hkv", "d", "rotate", NULL};
    const char *op, *format = "f32";
    PyObject *weights = NULL;
    int samples = 5, device = 0;
    long long m = 1, n = 1, k = 1, group = 64, b = 1, keys = 1, hq = 1, hkv = 1, d = 2, rotate = 256 << 20;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "s|O!iisLLLLLLLLLL", names, &op, &PyTuple_Type, &weights, &samples, &device,
                                     &format, &m, &n, &k, &group, &b, &keys, &hq, &hkv, &d, &rotate)) {
        return NULL;
    }
    ql_bench bench = {.m = m, .n = n, .k = k, .group = group, .b = b, .keys = keys, .hq = hq, .hkv = hkv, .d = d, .rotate = rotate};
    if (!bench_op(&bench, op) || !ql_format_arg(format, &bench.format)) { return NULL; }
    for (Py_ssize_t i = 0; weights != NULL && i < PyTuple_GET_SIZE(weights); i++) {
        const ql_weight *w = ql_weight_arg(PyTuple_GET_ITEM(weights, i), "weights");
        if (w == NULL || i > 2) { return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "weights: at most 3"); }
        bench.weight[bench.weights++] = w;
    }
    if (samples < 1 || m < 1 || n < 1 || k < 1 || group < 1 || b < 1 || keys < 1 || hq < 1 || hkv < 1 || d < 2) {
        return PyErr_Format(PyExc_ValueError, "sizes: expected at least 1 each");
    }
    PyArrayObject *out = ql_new(1, (int64_t[]){samples}, NPY_FLOAT64);
    if (out == NULL) { return NULL; }
    double *seconds = ql_data(out);
    int stopped;
    ql_status status;
    QL_CALL_BEGIN
    status = ql_cuda_bench(seconds, &bench, samples, device);
    QL_CALL_END(stopped)
    if (stopped || status != QL_OK) { return Py_DECREF(out), stopped ? NULL : ql_raise(status); }
    return (PyObject *)out;
}

static PyMethodDef methods[] = {
    {"cuda_bench", __extension__(PyCFunction)(void (*)(void))cuda_bench, METH_VARARGS | METH_KEYWORDS,
     "cuda_bench(op, weights=(), samples=5, device=0, **sizes) -> seconds (samples,) of one launch"},
    {"cuda_built", cuda_built, METH_NOARGS, "cuda_built() -> bool"},
    {"cuda_info", cuda_info, METH_O, "cuda_info(device) -> {name, capability, total, free, current, peak, …}"},
    {"cuda_reset_peak", cuda_reset_peak, METH_O, "cuda_reset_peak(device): the peak of its memory starts anew"},
    {"cuda_fetch", cuda_fetch, METH_VARARGS, "cuda_fetch(out uint8 (bytes,), address): copies a device's memory"},
    {"cuda_set_folders", cuda_set_folders, METH_O, "cuda_set_folders(text): where CUDA's libraries lie, separated by ':'"},
    {"cuda_library", cuda_library, METH_O, "cuda_library(name) -> path of cublas or cusolver"},
    {"device_select", device_select, METH_O, "device_select(n): single ops run on CUDA device n; -1: on the CPU"},
    {"device_selected", device_selected, METH_NOARGS, "device_selected() -> int; -1: the CPU"},
    {NULL, NULL, 0, NULL},
};

int ql_register_cuda(PyObject *module) { return PyModule_AddFunctions(module, methods); }
