/* py_roof.c: the roofs of the selected ISA, for benchmarks; the caller takes the time. */
#include "python.h"

#include "../core/roof.h"

typedef struct {
    int64_t (*fma)(int64_t tasks, int64_t rounds);
    void (*read)(const float *x, int64_t count);
    void (*copy)(float *out, const float *x, int64_t count);
} roof_table;

static roof_table selected_roof(void) {
    ql_isa isa = ql_isa_selected();
#ifdef QL_BUILT_AVX512
    if (isa >= QL_ISA_AVX512) { return (roof_table){ql_roof_fma_avx512, ql_roof_read_avx512, ql_roof_copy_avx512}; }
#endif
#ifdef QL_BUILT_AVX2
    if (isa >= QL_ISA_AVX2) { return (roof_table){ql_roof_fma_avx2, ql_roof_read_avx2, ql_roof_copy_avx2}; }
#endif
    (void)isa;
    return (roof_table){ql_roof_fma_scalar, ql_roof_read_scalar, ql_roof_copy_scalar};
}

static PyObject *count_operations(PyObject *arguments, int64_t (*run)(int64_t tasks, int64_t rounds)) {
    long long tasks, rounds;
    if (!PyArg_ParseTuple(arguments, "LL", &tasks, &rounds)) { return NULL; }
    if (tasks < 1 || rounds < 1 || tasks > 1000000 || rounds > 1000000000) {
        return PyErr_Format(PyExc_ValueError, "rounds: got %lld tasks of %lld rounds, expected at least 1 of each", tasks, rounds);
    }
    int64_t flops = 0;
    int stopped;
    QL_CALL_BEGIN
    flops = run(tasks, rounds);
    QL_CALL_END(stopped)
    return stopped ? NULL : PyLong_FromLongLong(flops);
}

static PyObject *roof_fma(PyObject *self, PyObject *arguments) {
    (void)self;
    return count_operations(arguments, selected_roof().fma);
}

/* bfloat16 products: of tiles or of pairs where the selected ISA has them, else there is nothing faster than float32 */
static PyObject *roof_tile(PyObject *self, PyObject *arguments) {
    (void)self;
#ifdef QL_BUILT_AMX
    if (ql_isa_selected() >= QL_ISA_AMX) { return count_operations(arguments, ql_roof_tile_amx); }
#endif
#ifdef QL_BUILT_AVX512_BF16
    if (ql_isa_selected() >= QL_ISA_AVX512_BF16) { return count_operations(arguments, ql_roof_pairs_avx512_bf16); }
#endif
    return count_operations(arguments, selected_roof().fma);
}

static PyObject *roof_read(PyObject *self, PyObject *object) {
    (void)self;
    PyArrayObject *x = ql_array(object, "x", NPY_FLOAT32, 1);
    if (x == NULL) { return NULL; }
    int stopped;
    QL_CALL_BEGIN
    selected_roof().read(ql_data(x), ql_dim(x, 0));
    QL_CALL_END(stopped)
    if (stopped) { return NULL; }
    Py_RETURN_NONE;
}

static PyObject *roof_copy(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *out_object, *x_object;
    if (!PyArg_ParseTuple(arguments, "OO", &out_object, &x_object)) { return NULL; }
    PyArrayObject *x = ql_array(x_object, "x", NPY_FLOAT32, 1);
    PyArrayObject *out = x == NULL ? NULL : ql_out(out_object, 1, (int64_t[]){ql_dim(x, 0)}, NPY_FLOAT32);
    if (out == NULL) { return NULL; }
    int stopped;
    QL_CALL_BEGIN
    selected_roof().copy(ql_data(out), ql_data(x), ql_dim(x, 0));
    QL_CALL_END(stopped)
    if (stopped) { return Py_DECREF(out), NULL; }
    return (PyObject *)out;
}

static PyMethodDef methods[] = {
    {"roof_fma", roof_fma, METH_VARARGS, "roof_fma(tasks, rounds) -> floating-point operations done, all of them in registers"},
    {"roof_tile", roof_tile, METH_VARARGS, "roof_tile(tasks, rounds): the same for bfloat16 tiles; without AMX, roof_fma"},
    {"roof_read", roof_read, METH_O, "roof_read(x (count,)): loads every element once"},
    {"roof_copy", roof_copy, METH_VARARGS, "roof_copy(out, x (count,)) -> out = x, past the caches where the ISA can"},
    {NULL, NULL, 0, NULL},
};

int ql_register_roof(PyObject *module) { return PyModule_AddFunctions(module, methods); }
