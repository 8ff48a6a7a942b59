/* py_adapter.c: _core.Adapter, low-rank matrices in one vector that Python owns, and how a model takes it up. */
#include "llama_object.h"

static PyTypeObject *adapter_type;

static const char *const slot_names[QL_SLOTS] = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"};

enum { PART_COLUMNS = 5 };

static int fill_parts(AdapterObject *self, const int64_t *layout, const float *scales) {
    for (int64_t i = 0; i < self->parts; i++, layout += PART_COLUMNS) {
        ql_adapter_part part = {layout[0], layout[1], layout[2], layout[3], layout[4], scales[i]};
        if (part.layer < 0 || part.slot < 0 || part.slot >= QL_SLOTS || part.r < 1 || part.r > INT32_MAX) {
            return PyErr_Format(PyExc_ValueError, "layout: row %lld has layer %lld, slot %lld, rank %lld", (long long)i,
                                (long long)part.layer, (long long)part.slot, (long long)part.r), 0;
        }
        self->part[i] = part;
    }
    return 1;
}

static PyObject *adapter_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"parameters", "layout", "scales", NULL};
    PyObject *parameters_object, *layout_object, *scales_object;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "OOO", names, &parameters_object, &layout_object, &scales_object)) {
        return NULL;
    }
    PyArrayObject *parameters = ql_array(parameters_object, "parameters", NPY_FLOAT32, 1);
    PyArrayObject *layout = parameters == NULL ? NULL : ql_array(layout_object, "layout", NPY_INT64, 2);
    PyArrayObject *scales = layout == NULL ? NULL : ql_array(scales_object, "scales", NPY_FLOAT32, 1);
    if (scales == NULL || !ql_check_dim(layout, "layout", 1, PART_COLUMNS) ||
        !ql_check_dim(scales, "scales", 0, ql_dim(layout, 0))) {
        return NULL;
    }
    AdapterObject *self = (AdapterObject *)type->tp_alloc(type, 0);
    if (self == NULL) { return NULL; }
    self->parameters = (PyArrayObject *)Py_NewRef(parameters_object);
    self->parts = ql_dim(layout, 0);
    self->part = PyMem_Calloc((size_t)self->parts + 1, sizeof *self->part);
    if (self->part == NULL) { return Py_DECREF(self), PyErr_NoMemory(); }
    if (!fill_parts(self, ql_data(layout), ql_data(scales))) { return Py_DECREF(self), NULL; }
    return (PyObject *)self;
}

static void adapter_dealloc(AdapterObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyMem_Free(self->part);
    Py_XDECREF(self->parameters);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

/* `size` floats hold (rows, columns) from `at` on */
static int inside(int64_t at, int64_t rows, int64_t columns, int64_t size) {
    return at >= 0 && rows <= size / columns && at <= size - rows * columns;
}

static int attach_part(LlamaObject *self, const AdapterObject *adapter, const ql_adapter_part *part) {
    const float *values = ql_data(adapter->parameters);
    int64_t size = ql_dim(adapter->parameters, 0);
    if (part->layer >= self->model.layers) {
        return PyErr_Format(PyExc_ValueError, "adapter: layer %lld, the model has %lld", (long long)part->layer,
                            (long long)self->model.layers), 0;
    }
    const ql_weight *w = self->layer[part->layer].matrix[part->slot];
    ql_lora *lora = &self->lora[part->layer * QL_SLOTS + part->slot];
    const char *wrong = NULL;
    if (!inside(part->b_at, w->n, part->r, size)) { wrong = "B lies outside of parameters"; }
    if (!inside(part->a_at, part->r, w->k, size)) { wrong = "A lies outside of parameters"; }
    if (lora->r > 0) { wrong = "has two adapters"; }
    if (wrong != NULL) {
        PyErr_Format(PyExc_ValueError, "adapter: layer %lld %s: %s", (long long)part->layer, slot_names[part->slot], wrong);
        return 0;
    }
    *lora = (ql_lora){.a = ql_float_matrix(values + part->a_at, part->r, w->k), .b = ql_float_matrix(values + part->b_at, w->n, part->r),
                      .r = part->r, .a_at = part->a_at, .b_at = part->b_at, .scale = part->scale};
    self->layer[part->layer].lora = self->lora + part->layer * QL_SLOTS;
    if (part->r > self->model.rank) { self->model.rank = part->r; }
    return 1;
}

int ql_adapter_attach(LlamaObject *self, PyObject *object) {
    if (!PyObject_TypeCheck(object, adapter_type)) {
        return PyErr_Format(PyExc_TypeError, "adapter: got %s, expected a _core.Adapter", Py_TYPE(object)->tp_name), 0;
    }
    const AdapterObject *adapter = (AdapterObject *)object;
    self->lora = PyMem_Calloc((size_t)(self->model.layers * QL_SLOTS) + 1, sizeof *self->lora);
    if (self->lora == NULL) { return PyErr_NoMemory(), 0; }
    self->adapter = Py_NewRef(object);
    for (int64_t i = 0; i < adapter->parts; i++) {
        if (!attach_part(self, adapter, &adapter->part[i])) { return 0; }
    }
    return 1;
}

ql_status ql_adapter_place(LlamaObject *self) {
    if (self->adapter == NULL) { return QL_OK; }
    PyArrayObject *parameters = ((AdapterObject *)self->adapter)->parameters;
    size_t bytes = (size_t)ql_dim(parameters, 0) * sizeof(float);
    ql_status status = self->be->alloc((void **)&self->adapter_memory, bytes);
    if (status == QL_OK) { status = self->be->upload(self->adapter_memory, ql_data(parameters), bytes); }
    for (int64_t i = 0; i < self->model.layers * QL_SLOTS; i++) {
        self->lora[i].a.codes = self->adapter_memory + self->lora[i].a_at;
        self->lora[i].b.codes = self->adapter_memory + self->lora[i].b_at;
    }
    return status;
}

static PyType_Slot slots[] = {
    {Py_tp_doc, "Adapter(parameters (floats,), layout (parts, 5): layer, slot, rank, where A (r, k) and B (n, r) begin, "
                "scales (parts,))"},
    {Py_tp_new, __extension__(void *)adapter_new},
    {Py_tp_dealloc, __extension__(void *)adapter_dealloc},
    {0, NULL},
};
static PyType_Spec spec = {"quantlab._core.Adapter", sizeof(AdapterObject), 0, Py_TPFLAGS_DEFAULT, slots};

int ql_register_adapter(PyObject *module) {
    adapter_type = (PyTypeObject *)PyType_FromSpec(&spec);
    return adapter_type == NULL ? -1 : PyModule_AddObjectRef(module, "Adapter", (PyObject *)adapter_type);
}
