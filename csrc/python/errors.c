/* errors.c: the only map from ql_status to Python exceptions. */
#include "python.h"

static PyObject *numeric_error, *cuda_error;

int ql_errors_register(PyObject *module) {
    numeric_error = PyErr_NewExceptionWithDoc("quantlab.NumericError", "The numbers do not allow an answer.",
                                              PyExc_ArithmeticError, NULL);
    cuda_error = PyErr_NewExceptionWithDoc("quantlab.CudaError", "CUDA is not there, or the device refused.",
                                           PyExc_RuntimeError, NULL);
    if (numeric_error == NULL || cuda_error == NULL) { return -1; }
    if (PyModule_AddObjectRef(module, "NumericError", numeric_error) < 0) { return -1; }
    return PyModule_AddObjectRef(module, "CudaError", cuda_error);
}

PyObject *ql_raise(ql_status status) {
    PyObject *type = NULL;
    switch (status) {
    case QL_EVALUE: type = PyExc_ValueError; break;
    case QL_ETYPE: type = PyExc_TypeError; break;
    case QL_ENOMEM: type = PyExc_MemoryError; break;
    case QL_ENUMERIC: type = numeric_error; break;
    case QL_ECUDA: type = cuda_error; break;
    case QL_EINTERRUPT: /* the poll that stopped the call has set the exception */
        if (PyErr_Occurred() == NULL) { PyErr_SetNone(PyExc_KeyboardInterrupt); }
        return NULL;
    case QL_OK: type = PyExc_SystemError; break;
    }
    PyErr_SetString(type, ql_status_detail());
    return NULL;
}
