/* python.h: what every py_<domain>.c shares: arguments, errors, calls. The only place with Python.h and NumPy. */
#ifndef QL_PYTHON_H
#define QL_PYTHON_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define NPY_NO_DEPRECATED_API NPY_1_22_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL quantlab_core_array_api
#ifndef QL_IMPORT_ARRAY
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include "../quantlab.h"

/* ---- errors.c: the only map from ql_status to exceptions ---------------------------------------------------- */

int ql_errors_register(PyObject *module);
PyObject *ql_raise(ql_status status); /* raises with ql_status_detail(); returns NULL */

/* ---- args.c: parse and validate ----------------------------------------------------------------------------- */

/* A borrowed view of `object` if it is a C-contiguous, aligned array of this type and rank; else NULL with an error
 * that names the argument. ndim < 0: any rank. */
PyArrayObject *ql_array(PyObject *object, const char *name, int type, int ndim);
PyArrayObject *ql_array_or_none(PyObject *object, const char *name, int type, int ndim, int *failed);
/* 1 if dimension `axis` is `expected`; else 0 with a ValueError */
int ql_check_dim(PyArrayObject *array, const char *name, int axis, int64_t expected);
int ql_check_size(PyArrayObject *array, const char *name, int64_t expected); /* total number of elements, at least */
PyArrayObject *ql_new(int ndim, const int64_t *dims, int type);               /* new uninitialized array */
/* a new reference to the caller's `out`, where given: an array of exactly this shape, apart from the inputs; else a new one */
PyArrayObject *ql_out(PyObject *object, int ndim, const int64_t *dims, int type);

static inline int64_t ql_dim(PyArrayObject *array, int axis) { return (int64_t)PyArray_DIM(array, axis); }
static inline void *ql_data(PyArrayObject *array) { return array == NULL ? NULL : PyArray_DATA(array); }

/* ---- calls: release the GIL, let Ctrl-C through, raise ------------------------------------------------------ */

ql_poll ql_signal_poll(void); /* the poll for this thread: only the main thread hears signals */

#define QL_CALL_BEGIN                     \
    {                                     \
        ql_poll call_poll = ql_signal_poll(); \
        Py_BEGIN_ALLOW_THREADS            \
        ql_call_begin(call_poll);

/* sets `stopped` (an int in scope) where the call was interrupted; the exception is then already set */
#define QL_CALL_END(stopped)     \
        stopped = ql_call_end(); \
        Py_END_ALLOW_THREADS     \
    }

/* ---- placed.c: a weight's copies on devices ------------------------------------------------------------------ */

typedef struct ql_placed {
    ql_weight weight; /* pointers of the device */
    const ql_backend *be;
    int64_t users;
    int kept; /* one of the users is the weight itself, since an op has used it */
    struct ql_placed *next;
} ql_placed;

/* ---- py_weight.c -------------------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    ql_weight weight;
    PyObject *arrays; /* tuple that keeps the buffers of `weight` alive */
    ql_placed *placed;
} WeightObject;

extern PyTypeObject *ql_weight_type;
const ql_weight *ql_weight_arg(PyObject *object, const char *name); /* NULL with a TypeError */
const ql_weight *ql_table_arg(PyObject *object, const char *name);  /* for rows by id: NULL with an error, also for act-order */
int ql_format_arg(const char *text, ql_format *format);             /* 0 with a ValueError */

/* Both between begin and end of `be`, whose lock guards the list. NULL with a detail where the upload failed. A copy without
 * users is released. */
ql_placed *ql_place(WeightObject *weight, const ql_backend *be);
void ql_unplace(WeightObject *weight, ql_placed *placed);
void ql_unplace_all(WeightObject *weight); /* takes the locks itself; without the GIL */

/* ---- py_cuda.c ------------------------------------------------------------------------------------------------- */

const ql_backend *ql_device_arg(int device); /* -1: the CPU; NULL with an error where the device cannot be used */

/* ---- stage.c: arrays of the host for one op on the selected backend; all of it without the GIL ------------------- */

enum { QL_STAGED_ARRAYS = 12 };

typedef struct {
    void *memory, *host;
    size_t bytes;
    int output;
} ql_staged;

typedef struct {
    const ql_backend *be;
    ql_status status, begun;
    int staged, count;
    ql_staged part[QL_STAGED_ARRAYS];
} ql_stage;

void ql_stage_begin(ql_stage *s); /* on the selected backend */
void ql_stage_begin_on(ql_stage *s, const ql_backend *be);
const void *ql_stage_in(ql_stage *s, const void *host, size_t bytes);
void *ql_stage_out(ql_stage *s, void *host, size_t bytes, int keep); /* keep: its contents are an input too */
const ql_weight *ql_stage_weight(ql_stage *s, PyObject *weight);     /* of a checked _core.Weight */
int ql_stage_ready(ql_stage *s, int present, const char *op);        /* 0: the op must not be called */
ql_status ql_stage_end(ql_stage *s);                                 /* outputs are back */

static inline size_t ql_nbytes(PyArrayObject *array) { return array == NULL ? 0 : (size_t)PyArray_NBYTES(array); }
#define QL_IN(s, array) ql_stage_in(s, ql_data(array), ql_nbytes(array))
#define QL_OUT(s, array) ql_stage_out(s, ql_data(array), ql_nbytes(array), 0)
#define QL_INOUT(s, array) ql_stage_out(s, ql_data(array), ql_nbytes(array), 1)
#define QL_READY(s, op) ql_stage_ready(s, (s)->be->op != NULL, #op) /* the backend has the op, and all arrays are there */

/* py_ops.c: the end of a call of ops: `result`, or its release and the error */
PyObject *ql_finish(PyObject *result, int stopped, ql_status status);
/* attention's ranges q_start (b + 1,), kv_start, kv_len (b,) against q and k; 0 with a ValueError */
int ql_check_ranges(PyArrayObject *q, PyArrayObject *k, PyArrayObject *q_start, PyArrayObject *kv_start, PyArrayObject *kv_len);

/* py_training_ops.c: sets what follows from a step's number, from 1; 0 with an error */
int ql_adamw_number(ql_adamw_step *step, long long number);

/* x W^T or, backward, x W on a backend (py_ops.c) */
PyObject *ql_linear_on(const ql_backend *be, PyObject *x, PyObject *weight, PyObject *out, int accumulate, int backward);

/* ---- domains: each adds its functions and types to the module ------------------------------------------------ */

int ql_register_backend(PyObject *module);
int ql_register_cuda(PyObject *module);
int ql_register_weight(PyObject *module);
int ql_register_quantize(PyObject *module);
int ql_register_ops(PyObject *module);
int ql_register_training_ops(PyObject *module);
int ql_register_roof(PyObject *module);
int ql_register_gptq(PyObject *module);
int ql_register_llama(PyObject *module);
int ql_register_adapter(PyObject *module);
int ql_register_training(PyObject *module); /* after llama and adapter */
int ql_register_generation(PyObject *module); /* after llama */

#endif
