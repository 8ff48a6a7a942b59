/* device_object.h: _core.DeviceArray and _core.DeviceWeight: what stays on a device from one call to the next. */
#ifndef QL_DEVICE_OBJECT_H
#define QL_DEVICE_OBJECT_H

#include "python.h"

typedef enum { QL_DEVICE_FLOAT32, QL_DEVICE_BFLOAT16, QL_DEVICE_FLOAT64, QL_DEVICE_INT32, QL_DEVICE_INT64, QL_DEVICE_TYPES } ql_device_type;

enum { QL_DEVICE_RANK = 3 };

typedef struct {
    PyObject_HEAD
    const ql_backend *be;
    void *memory;
    ql_device_type type;
    int ndim;
    int64_t dim[QL_DEVICE_RANK];
} DeviceArrayObject;

typedef struct {
    PyObject_HEAD
    const ql_backend *be;
    ql_weight weight; /* pointers of the device */
    PyObject *source; /* the Weight: on the host its arrays are used as they are */
} DeviceWeightObject;

/* a new array, not set; NULL with an error */
DeviceArrayObject *ql_device_new(const ql_backend *be, ql_device_type type, int ndim, const int64_t *dim);
/* Borrowed, checked; NULL with an error that names the argument. *be: the device of the arguments before, or NULL. */
DeviceArrayObject *ql_device_array(PyObject *object, const char *name, ql_device_type type, int ndim, const ql_backend **be);
DeviceWeightObject *ql_device_weight(PyObject *object, const char *name, const ql_backend **be);
int ql_device_check_dim(const DeviceArrayObject *array, const char *name, int axis, int64_t expected);

/* A call on a device: what stands between runs without the GIL, with `status` QL_OK at its beginning. */
#define QL_DEVICE_BEGIN(be)                                   \
    int stopped;                                              \
    ql_status status;                                         \
    QL_CALL_BEGIN                                             \
    const ql_backend *call_backend = (be);                    \
    status = call_backend->begin(call_backend->device);       \
    if (status == QL_OK) {
#define QL_DEVICE_END                                         \
        ql_status first = call_backend->end();                \
        status = first != QL_OK ? first : status;             \
    }                                                         \
    QL_CALL_END(stopped)

/* out, or None where it is NULL; NULL with the error, and out released, where the call failed */
PyObject *ql_device_finish(void *out, int stopped, ql_status status);

int ql_register_device(PyObject *module);
int ql_register_calibration(PyObject *module); /* after device */

#endif
