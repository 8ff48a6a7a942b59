/* py_backend.c: what is built, what is usable, which variant runs. */
#include "python.h"

#define ISA_NAMES "scalar, avx2, avx512, avx512_vnni, avx512_bf16 or amx"

static PyObject *isa_info(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    PyObject *all = PyDict_New();
    for (int isa = 0; all != NULL && isa < QL_ISA_COUNT; isa++) {
        PyObject *one = Py_BuildValue("{s:O,s:O,s:s}", "built", ql_isa_built(isa) ? Py_True : Py_False, "usable",
                                      ql_isa_usable(isa) ? Py_True : Py_False, "why_not", ql_isa_why_not(isa));
        if (one == NULL || PyDict_SetItemString(all, ql_isa_name(isa), one) < 0) { Py_CLEAR(all); }
        Py_XDECREF(one);
    }
    return all;
}

static PyObject *isa_selected(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyUnicode_FromString(ql_isa_name(ql_isa_selected()));
}

static PyObject *isa_select(PyObject *self, PyObject *argument) {
    (void)self;
    if (!PyUnicode_Check(argument)) {
        return PyErr_Format(PyExc_TypeError, "isa: got %s, expected " ISA_NAMES, Py_TYPE(argument)->tp_name);
    }
    const char *name = PyUnicode_AsUTF8(argument);
    if (name == NULL) { return NULL; }
    for (int isa = 0; isa < QL_ISA_COUNT; isa++) {
        if (strcmp(name, ql_isa_name(isa)) != 0) { continue; }
        ql_status status = ql_isa_select(isa);
        if (status != QL_OK) { return ql_raise(status); }
        Py_RETURN_NONE;
    }
    return PyErr_Format(PyExc_ValueError, "isa: got '%s', expected " ISA_NAMES, name);
}

static PyObject *threads_get(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyLong_FromLong(ql_threads());
}

static PyObject *threads_set(PyObject *self, PyObject *argument) {
    (void)self;
    if (!PyLong_Check(argument) || PyBool_Check(argument)) {
        return PyErr_Format(PyExc_TypeError, "threads: got %s, expected an int", Py_TYPE(argument)->tp_name);
    }
    int overflow;
    long threads = PyLong_AsLongAndOverflow(argument, &overflow);
    if (overflow != 0 || threads < 1 || threads > QL_MAX_THREADS) {
        return PyErr_Format(PyExc_ValueError, "threads: got %S, expected 1 to %d", argument, QL_MAX_THREADS);
    }
    ql_set_threads((int)threads);
    Py_RETURN_NONE;
}

static PyObject *precise_get(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyBool_FromLong(ql_precise());
}

static PyObject *precise_set(PyObject *self, PyObject *argument) {
    (void)self;
    if (!PyBool_Check(argument)) {
        return PyErr_Format(PyExc_TypeError, "precise: got %s, expected a bool", Py_TYPE(argument)->tp_name);
    }
    ql_set_precise(argument == Py_True);
    Py_RETURN_NONE;
}

static PyObject *op_table(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    PyObject *table = PyDict_New();
    for (int op = 0; table != NULL && op < ql_op_count(); op++) {
        PyObject *row = PyDict_New();
        int formats = ql_op_has_formats(op) ? QL_FORMAT_COUNT : 1;
        for (int f = 0; row != NULL && f < formats; f++) {
            PyObject *variant = PyUnicode_FromString(ql_op_variant(op, f));
            const char *key = ql_op_has_formats(op) ? ql_format_name(f) : "f32";
            if (variant == NULL || PyDict_SetItemString(row, key, variant) < 0) { Py_CLEAR(row); }
            Py_XDECREF(variant);
        }
        if (row == NULL || PyDict_SetItemString(table, ql_op_name(op), row) < 0) { Py_CLEAR(table); }
        Py_XDECREF(row);
    }
    return table;
}

static PyObject *gemv_rows(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyLong_FromLong(ql_selected()->gemv_rows);
}

static PyMethodDef methods[] = {
    {"isa_info", isa_info, METH_NOARGS, "isa_info() -> {isa: {built, usable, why_not}}"},
    {"isa_selected", isa_selected, METH_NOARGS, "isa_selected() -> str"},
    {"isa_select", isa_select, METH_O, "isa_select(name): use the kernels of this ISA"},
    {"threads", threads_get, METH_NOARGS, "threads() -> int"},
    {"set_threads", threads_set, METH_O, "set_threads(n)"},
    {"precise", precise_get, METH_NOARGS, "precise() -> bool"},
    {"set_precise", precise_set, METH_O, "set_precise(on): products of 24-bit integers for bfloat16's, float32 for theirs"},
    {"gemv_rows", gemv_rows, METH_NOARGS, "gemv_rows() -> int: products with so few rows may add in another order"},
    {"op_table", op_table, METH_NOARGS, "op_table() -> {op: {format: variant}}"},
    {NULL, NULL, 0, NULL},
};

/* a wrong QL_THREADS or QL_ISA does not stop the import: one thread a core, the best usable ISA is taken, and that is said */
static int warn_about_environment(void) {
    if (ql_asked_threads() < 0 &&
        PyErr_WarnFormat(PyExc_RuntimeWarning, 1, "QL_THREADS: '%s' is not used: expected 1 to %d; using %d",
                         getenv("QL_THREADS"), QL_MAX_THREADS, ql_default_threads()) < 0) {
        return -1;
    }
    const char *wanted = getenv("QL_ISA"), *selected = ql_isa_name(ql_isa_selected());
    if (wanted == NULL || *wanted == '\0' || strcmp(wanted, selected) == 0) { return 0; }
    const char *why_not = "expected " ISA_NAMES;
    for (int isa = 0; isa < QL_ISA_COUNT; isa++) {
        if (strcmp(wanted, ql_isa_name(isa)) == 0) { why_not = ql_isa_why_not(isa); }
    }
    return PyErr_WarnFormat(PyExc_RuntimeWarning, 1, "QL_ISA: '%s' is not used: %s; using %s", wanted, why_not, selected);
}

int ql_register_backend(PyObject *module) {
    if (warn_about_environment() < 0) { return -1; }
    if (PyModule_AddStringConstant(module, "compiler", QL_COMPILER) < 0) { return -1; }
    return PyModule_AddFunctions(module, methods);
}
