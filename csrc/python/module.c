/* module.c: quantlab._core, one list of domains. */
#define QL_IMPORT_ARRAY
#include "device_object.h"

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "quantlab._core", "The C core of quantlab.", -1, NULL, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__core(void) {
    import_array();
    PyObject *module = PyModule_Create(&definition);
    if (module == NULL) { return NULL; }
    int (*const domains[])(PyObject *) = {
        ql_errors_register, ql_register_backend, ql_register_cuda,     ql_register_weight, ql_register_ops,
        ql_register_roof,   ql_register_llama,   ql_register_quantize, ql_register_gptq,
        ql_register_generation, ql_register_device, ql_register_calibration, ql_register_training_ops,
        ql_register_adapter, ql_register_training,
    };
    for (size_t i = 0; i < sizeof domains / sizeof *domains; i++) {
        if (domains[i](module) < 0) { return Py_DECREF(module), NULL; }
    }
    if (PyModule_AddStringConstant(module, "sources", QL_SOURCES) < 0) { return Py_DECREF(module), NULL; }
    return module;
}
