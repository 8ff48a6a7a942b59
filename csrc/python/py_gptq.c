/* py_gptq.c: GPTQ's matrix, its factor turned into feedback, and the column loop. LAPACK is called by Python between. */
#include "gptq_args.h"

#include "../core/bits.h"

static int check_square(PyArrayObject *array, const char *name, int64_t k) {
    return ql_check_dim(array, name, 0, k) && ql_check_dim(array, name, 1, k);
}

int ql_gptq_check_order(PyArrayObject *order, int64_t k) {
    const int32_t *values = ql_data(order);
    char *seen = PyMem_Calloc((size_t)(k > 0 ? k : 1), 1);
    if (seen == NULL) { return PyErr_NoMemory(), 0; }
    int good = 1;
    for (int64_t j = 0; j < k && good; j++) {
        good = values[j] >= 0 && values[j] < k && !seen[values[j]];
        if (good) { seen[values[j]] = 1; }
    }
    PyMem_Free(seen);
    if (!good) { PyErr_SetString(PyExc_ValueError, "order: not a permutation of the columns"); }
    return good;
}

/* gptq_matrix(h, order, factor, damp) -> float64 (k, k) */
static PyObject *gptq_matrix(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *h_object, *order_object;
    double factor, damp;
    if (!PyArg_ParseTuple(arguments, "OOdd", &h_object, &order_object, &factor, &damp)) { return NULL; }
    PyArrayObject *h = ql_array(h_object, "h", NPY_FLOAT32, 2);
    PyArrayObject *order = h == NULL ? NULL : ql_array(order_object, "order", NPY_INT32, 1);
    if (order == NULL) { return NULL; }
    int64_t k = ql_dim(h, 0);
    if (!check_square(h, "h", k) || !ql_check_dim(order, "order", 0, k) || !ql_gptq_check_order(order, k)) { return NULL; }
    PyArrayObject *out = ql_new(2, (int64_t[]){k, k}, NPY_FLOAT64);
    if (out == NULL) { return NULL; }
    int stopped;
    ql_status status;
    QL_CALL_BEGIN
    status = ql_gptq_matrix(ql_data(out), ql_data(h), ql_data(order), k, factor, damp);
    QL_CALL_END(stopped)
    if (stopped || status != QL_OK) { return Py_DECREF(out), stopped ? NULL : ql_raise(status); }
    return (PyObject *)out;
}

/* l (k, k), writeable, and a block of its columns */
static PyArrayObject *parse_factor(PyObject *object, long long first, long long count) {
    PyArrayObject *l = ql_array(object, "l", NPY_FLOAT64, 2);
    if (l == NULL || !check_square(l, "l", ql_dim(l, 0))) { return NULL; }
    if (!PyArray_ISWRITEABLE(l)) { return PyErr_SetString(PyExc_ValueError, "l: not writeable"), NULL; }
    if (first < 0 || count < 1 || count > QL_GPTQ_PANEL || first > ql_dim(l, 0) - count) {
        PyErr_Format(PyExc_ValueError, "first, count: got %lld, %lld for %lld columns, at most %d at a time", first, count,
                     (long long)ql_dim(l, 0), QL_GPTQ_PANEL);
        return NULL;
    }
    return l;
}

/* gptq_factor_update(l, first, count) */
static PyObject *gptq_factor_update(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *l_object;
    long long first, count;
    if (!PyArg_ParseTuple(arguments, "OLL", &l_object, &first, &count)) { return NULL; }
    PyArrayObject *l = parse_factor(l_object, first, count);
    if (l == NULL) { return NULL; }
    int stopped;
    ql_status status;
    QL_CALL_BEGIN
    status = ql_gptq_factor_update(ql_data(l), ql_dim(l, 0), first, count);
    QL_CALL_END(stopped)
    if (stopped || status != QL_OK) { return stopped ? NULL : ql_raise(status); }
    Py_RETURN_NONE;
}

/* gptq_factor_solve(l, first, inverse) */
static PyObject *gptq_factor_solve(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *l_object, *inverse_object;
    long long first;
    if (!PyArg_ParseTuple(arguments, "OLO", &l_object, &first, &inverse_object)) { return NULL; }
    PyArrayObject *inverse = ql_array(inverse_object, "inverse", NPY_FLOAT64, 2);
    if (inverse == NULL || !check_square(inverse, "inverse", ql_dim(inverse, 0))) { return NULL; }
    PyArrayObject *l = parse_factor(l_object, first, ql_dim(inverse, 0));
    if (l == NULL) { return NULL; }
    int stopped;
    QL_CALL_BEGIN
    ql_gptq_factor_solve(ql_data(l), ql_data(inverse), ql_dim(l, 0), first, ql_dim(inverse, 0));
    QL_CALL_END(stopped)
    if (stopped) { return NULL; }
    Py_RETURN_NONE;
}

/* gptq_feedback(l) -> diagonal (k,); l becomes the feedback */
static PyObject *gptq_feedback(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *l_object;
    if (!PyArg_ParseTuple(arguments, "O", &l_object)) { return NULL; }
    PyArrayObject *l = ql_array(l_object, "l", NPY_FLOAT64, 2);
    if (l == NULL) { return NULL; }
    int64_t k = ql_dim(l, 0);
    if (!check_square(l, "l", k)) { return NULL; }
    if (!PyArray_ISWRITEABLE(l)) { return PyErr_Format(PyExc_ValueError, "l: not writeable"); }
    PyArrayObject *diagonal = ql_new(1, (int64_t[]){k}, NPY_FLOAT64);
    if (diagonal == NULL) { return NULL; }
    int stopped;
    QL_CALL_BEGIN
    ql_gptq_feedback(ql_data(l), ql_data(diagonal), k);
    QL_CALL_END(stopped)
    if (stopped) { return Py_DECREF(diagonal), NULL; }
    return (PyObject *)diagonal;
}

static int parse_problem(ql_gptq_problem *p, PyObject *const o[6]) {
    PyArrayObject *w = ql_array(o[0], "w", NPY_FLOAT32, 2);
    PyArrayObject *feedback = w == NULL ? NULL : ql_array(o[1], "feedback", NPY_FLOAT64, 2);
    PyArrayObject *diagonal = feedback == NULL ? NULL : ql_array(o[2], "diagonal", NPY_FLOAT64, 1);
    PyArrayObject *order = diagonal == NULL ? NULL : ql_array(o[3], "order", NPY_INT32, 1);
    PyArrayObject *importance = order == NULL ? NULL : ql_array(o[4], "importance", NPY_FLOAT64, 1);
    PyArrayObject *dead = importance == NULL ? NULL : ql_array(o[5], "dead", NPY_UINT8, 1);
    if (dead == NULL) { return 0; }
    p->n = ql_dim(w, 0), p->k = ql_dim(w, 1);
    if (!check_square(feedback, "feedback", p->k) || !ql_check_dim(diagonal, "diagonal", 0, p->k) ||
        !ql_check_dim(order, "order", 0, p->k) || !ql_check_dim(importance, "importance", 0, p->k) ||
        !ql_check_dim(dead, "dead", 0, p->k) || !ql_gptq_check_order(order, p->k)) {
        return 0;
    }
    p->w = ql_data(w), p->feedback = ql_data(feedback), p->diagonal = ql_data(diagonal);
    p->order = ql_data(order), p->importance = ql_data(importance), p->dead = ql_data(dead);
    return 1;
}

/* Scales are fixed, or the steps of a group follow each other: then a group is never begun twice. */
static int check_groups(const ql_gptq_problem *p, const ql_gptq_options *options) {
    int64_t begun = 1;
    for (int64_t j = 1; j < p->k; j++) { begun += p->order[j] / p->group != p->order[j - 1] / p->group; }
    int scattered = begun != (p->k + p->group - 1) / p->group;
    if (options->fixed_scales ? !options->store_ordered : options->store_ordered || !scattered) { return 1; }
    PyErr_SetString(PyExc_ValueError, options->fixed_scales ? "store_ordered: fixed scales belong to columns in their own order"
                                                            : "order: the columns of a group do not follow each other");
    return 0;
}

int ql_gptq_check_options(const ql_gptq_problem *p, const ql_gptq_options *options) {
    if (options->bits < 2 || options->bits > 8) {
        return PyErr_Format(PyExc_ValueError, "bits: got %d, expected 2 to 8", options->bits), 0;
    }
    if ((int)options->search < 0 || options->search > QL_SEARCH_HESSIAN) {
        return PyErr_Format(PyExc_ValueError, "search: got %d, expected 0, 1 or 2", (int)options->search), 0;
    }
    if (p->n < 1 || p->k < 1 || p->group < 1 || p->group > p->k) {
        return PyErr_Format(PyExc_ValueError, "group: got %lld for a weight of %lld by %lld", (long long)p->group,
                            (long long)p->n, (long long)p->k), 0;
    }
    return check_groups(p, options);
}

/* gptq_quantize(w, feedback, diagonal, order, importance, dead, group, bits, sym, search, fixed, keep_dead, stale, half,
 * store_ordered) -> (codes, scales, zeros, loss) */
static PyObject *gptq_quantize(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *o[6];
    long long group;
    int search;
    ql_gptq_problem problem;
    ql_gptq_options x;
    if (!PyArg_ParseTuple(arguments, "OOOOOOLipippppp", &o[0], &o[1], &o[2], &o[3], &o[4], &o[5], &group, &x.bits,
                          &x.symmetric, &search, &x.fixed_scales, &x.keep_dead, &x.stale_scales, &x.half_scales,
                          &x.store_ordered) ||
        !parse_problem(&problem, o)) {
        return NULL;
    }
    problem.group = group, x.search = (ql_scale_search)search;
    if (!ql_gptq_check_options(&problem, &x)) { return NULL; }
    int64_t n = problem.n, groups = (problem.k + group - 1) / group, words = ql_words_per_row(problem.k, x.bits);
    npy_intp code_shape[2] = {(npy_intp)n, (npy_intp)words};
    PyArrayObject *codes = (PyArrayObject *)PyArray_ZEROS(2, code_shape, NPY_UINT32, 0);
    PyArrayObject *scales = ql_new(2, (int64_t[]){n, groups}, NPY_FLOAT32);
    PyArrayObject *zeros = ql_new(2, (int64_t[]){n, groups}, NPY_UINT8);
    PyArrayObject *loss = (PyArrayObject *)PyArray_ZEROS(1, code_shape, NPY_FLOAT64, 0);
    int64_t work_bytes = ql_gptq_work_bytes(problem.k);
    PyArrayObject *work = ql_new(1, (int64_t[]){work_bytes + 63}, NPY_UINT8);
    if (codes == NULL || scales == NULL || zeros == NULL || loss == NULL || work == NULL) {
        return Py_XDECREF(codes), Py_XDECREF(scales), Py_XDECREF(zeros), Py_XDECREF(loss), Py_XDECREF(work), NULL;
    }
    ql_gptq_result result = {ql_data(codes), ql_data(scales), ql_data(zeros), ql_data(loss)};
    char *aligned = (char *)(((uintptr_t)ql_data(work) + 63) & ~(uintptr_t)63);
    int stopped;
    QL_CALL_BEGIN
    ql_gptq_quantize(&result, &problem, &x, aligned, work_bytes);
    QL_CALL_END(stopped)
    Py_DECREF(work);
    if (stopped) { return Py_DECREF(codes), Py_DECREF(scales), Py_DECREF(zeros), Py_DECREF(loss), NULL; }
    return Py_BuildValue("(NNNN)", codes, scales, zeros, loss);
}

static PyMethodDef methods[] = {
    {"gptq_matrix", gptq_matrix, METH_VARARGS,
     "gptq_matrix(h float32 (k, k) lower, order int32 (k,), factor, damp) -> float64 (k, k): lower triangle of the reversed matrix"},
    {"gptq_factor_update", gptq_factor_update, METH_VARARGS,
     "gptq_factor_update(l float64 (k, k), first, count): l[first:, first:first+count] -= l[first:, :first] "
     "l[first:first+count, :first]^T"},
    {"gptq_factor_solve", gptq_factor_solve, METH_VARARGS,
     "gptq_factor_solve(l float64 (k, k), first, inverse (count, count)): l[first+count:, first:first+count] is multiplied by it"},
    {"gptq_feedback", gptq_feedback, METH_VARARGS, "gptq_feedback(l float64 (k, k)) -> diagonal (k,); l is overwritten by the feedback"},
    {"gptq_quantize", gptq_quantize, METH_VARARGS,
     "gptq_quantize(w float32 (n, k), feedback, diagonal, order, importance, dead, group, bits, sym, search, fixed, keep_dead, "
     "stale, half, store_ordered) -> (codes, scales, zeros, loss)"},
    {NULL, NULL, 0, NULL},
};

int ql_register_gptq(PyObject *module) {
    if (PyModule_AddIntConstant(module, "gptq_panel", QL_GPTQ_PANEL) < 0) { return -1; }
    return PyModule_AddFunctions(module, methods);
}
