/* py_llama.c: _core.Llama, a model over validated weights, and its forward pass. */
#include "python.h"

#include "../model/llama.h"
#include "../quant/pack.h"

typedef struct {
    PyObject_HEAD
    ql_llama model;
    ql_llama_layer *layer;
    int64_t vocabulary;
    PyObject *parts; /* tuple that keeps weights and gains alive */
} LlamaObject;

enum { LAYER_PARTS = 9 };
static const char *const part_names[LAYER_PARTS] = {"input_layernorm", "q_proj", "k_proj", "v_proj", "o_proj",
                                                    "post_attention_layernorm", "gate_proj", "up_proj", "down_proj"};

static const float *gain_arg(PyObject *object, const char *name, int64_t c) {
    PyArrayObject *array = ql_array(object, name, NPY_FLOAT32, 1);
    return array != NULL && ql_check_dim(array, name, 0, c) ? ql_data(array) : NULL;
}

static const ql_weight *shaped_weight(PyObject *object, const char *name, int64_t n, int64_t k) {
    const ql_weight *w = ql_weight_arg(object, name);
    if (w == NULL || (w->n == n && w->k == k)) { return w; }
    PyErr_Format(PyExc_ValueError, "%s: shape is (%lld, %lld), expected (%lld, %lld)", name, (long long)w->n, (long long)w->k,
                 (long long)n, (long long)k);
    return NULL;
}

static int fill_layer(ql_llama_layer *layer, const ql_llama *m, PyObject *parts, int64_t index) {
    if (!PyTuple_Check(parts) || PyTuple_GET_SIZE(parts) != LAYER_PARTS) {
        return PyErr_Format(PyExc_TypeError, "layers: item %lld is not a tuple of %d parts", (long long)index, LAYER_PARTS), 0;
    }
    int64_t q = m->hq * m->d, kv = m->hkv * m->d;
    const int64_t n[LAYER_PARTS] = {0, q, kv, kv, m->c, 0, m->f, m->f, m->c};
    const int64_t k[LAYER_PARTS] = {0, m->c, m->c, m->c, q, 0, m->c, m->c, m->f};
    const ql_weight **weights[LAYER_PARTS] = {NULL, &layer->q, &layer->k, &layer->v, &layer->o, NULL, &layer->gate, &layer->up, &layer->down};
    for (int i = 0; i < LAYER_PARTS; i++) {
        char name[64];
        PyObject *part = PyTuple_GET_ITEM(parts, i);
        PyOS_snprintf(name, sizeof name, "layer %lld %s", (long long)index, part_names[i]);
        if (weights[i] == NULL) {
            const float *gain = gain_arg(part, name, m->c);
            if (gain == NULL) { return 0; }
            *(i == 0 ? &layer->input_norm : &layer->post_norm) = gain;
        } else if ((*weights[i] = shaped_weight(part, name, n[i], k[i])) == NULL) {
            return 0;
        }
    }
    return 1;
}

static int check_sizes(const ql_llama *m) {
    if (m->hq >= 1 && m->hkv >= 1 && m->hq % m->hkv == 0 && m->d >= 2 && m->d % 2 == 0 && m->d <= 4096 &&
        m->hq <= INT32_MAX / m->d && m->f >= 1 && m->f <= INT32_MAX) {
        return 1;
    }
    PyErr_Format(PyExc_ValueError, "config: %lld heads, %lld key-value heads, head size %lld, intermediate size %lld are not accepted",
                 (long long)m->hq, (long long)m->hkv, (long long)m->d, (long long)m->f);
    return 0;
}

static PyObject *llama_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"heads", "kv_heads", "head_dim", "intermediate", "eps", "embed", "norm", "layers", NULL};
    long long hq, hkv, d, f;
    float eps;
    PyObject *embed, *norm, *layers;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "LLLLfOOO!", names, &hq, &hkv, &d, &f, &eps, &embed, &norm,
                                     &PyTuple_Type, &layers)) {
        return NULL;
    }
    const ql_weight *table = ql_table_arg(embed, "embed");
    if (table == NULL) { return NULL; }
    ql_llama m = {.layers = PyTuple_GET_SIZE(layers), .c = table->k, .f = f, .hq = hq, .hkv = hkv, .d = d, .eps = eps, .embed = table};
    if (!check_sizes(&m) || (m.norm = gain_arg(norm, "norm", m.c)) == NULL) { return NULL; }
    LlamaObject *self = (LlamaObject *)type->tp_alloc(type, 0);
    if (self == NULL) { return NULL; }
    self->layer = PyMem_Calloc((size_t)m.layers + 1, sizeof *self->layer);
    if (self->layer == NULL) { return Py_DECREF(self), PyErr_NoMemory(); }
    for (int64_t i = 0; i < m.layers; i++) {
        if (!fill_layer(&self->layer[i], &m, PyTuple_GET_ITEM(layers, i), i)) { return Py_DECREF(self), NULL; }
    }
    self->model = m;
    self->model.layer = self->layer;
    self->vocabulary = table->n;
    self->parts = PyTuple_Pack(3, embed, norm, layers);
    if (self->parts == NULL) { return Py_DECREF(self), NULL; }
    return (PyObject *)self;
}

static void llama_dealloc(LlamaObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyMem_Free(self->layer);
    Py_XDECREF(self->parts);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

/* every index the kernels will follow is checked here */
static int check_batch(const ql_llama_batch *batch, int64_t vocabulary, int64_t positions, int64_t kv_rows) {
    for (int64_t i = 0; i < batch->t; i++) {
        if (batch->ids[i] < 0 || batch->ids[i] >= vocabulary) {
            return PyErr_Format(PyExc_ValueError, "input_ids: got %d, expected 0 to %lld", batch->ids[i], (long long)vocabulary - 1), 0;
        }
        if (batch->positions[i] < 0 || batch->positions[i] >= positions) {
            return PyErr_Format(PyExc_ValueError, "positions: got %d, expected 0 to %lld", batch->positions[i], (long long)positions - 1), 0;
        }
    }
    int64_t next = 0;
    for (int64_t b = 0; b < batch->b; b++) {
        int64_t end = batch->q_start[b + 1];
        if (batch->q_start[b] != next || end < next || batch->kv_len[b] < end - next || batch->kv_len[b] > kv_rows ||
            batch->kv_start[b] < 0 || batch->kv_start[b] > kv_rows - batch->kv_len[b]) {
            return PyErr_Format(PyExc_ValueError, "q_start, kv_start, kv_len: sequence %lld is out of range", (long long)b), 0;
        }
        next = end;
    }
    if (next != batch->t) { return PyErr_SetString(PyExc_ValueError, "q_start: does not end at the number of tokens"), 0; }
    return 1;
}

static int cache_arg(ql_kv_cache *cache, PyObject *k_object, PyObject *v_object, const ql_llama *m) {
    PyArrayObject *k = ql_array(k_object, "cache_k", NPY_FLOAT32, 4);
    PyArrayObject *v = k == NULL ? NULL : ql_array(v_object, "cache_v", NPY_FLOAT32, 4);
    if (v == NULL || !ql_check_dim(k, "cache_k", 0, m->layers) || !ql_check_dim(k, "cache_k", 2, m->hkv) ||
        !ql_check_dim(k, "cache_k", 3, m->d) || !PyArray_SAMESHAPE(k, v) || ql_dim(k, 1) > INT32_MAX ||
        !PyArray_ISWRITEABLE(k) || !PyArray_ISWRITEABLE(v)) {
        if (!PyErr_Occurred()) { PyErr_SetString(PyExc_ValueError, "cache_v: not writeable, or its shape is not that of cache_k"); }
        return 0;
    }
    *cache = (ql_kv_cache){ql_data(k), ql_data(v), ql_dim(k, 1)};
    return 1;
}

static int batch_arg(ql_llama_batch *batch, PyObject **o, const ql_llama *m, int64_t *positions) {
    PyArrayObject *ids = ql_array(o[0], "input_ids", NPY_INT32, 1);
    PyArrayObject *where = ids == NULL ? NULL : ql_array(o[1], "positions", NPY_INT32, 1);
    PyArrayObject *q_start = where == NULL ? NULL : ql_array(o[2], "q_start", NPY_INT64, 1);
    PyArrayObject *kv_start = q_start == NULL ? NULL : ql_array(o[3], "kv_start", NPY_INT64, 1);
    PyArrayObject *kv_len = kv_start == NULL ? NULL : ql_array(o[4], "kv_len", NPY_INT64, 1);
    PyArrayObject *cos = kv_len == NULL ? NULL : ql_array(o[5], "cos", NPY_FLOAT32, 2);
    PyArrayObject *sin = cos == NULL ? NULL : ql_array(o[6], "sin", NPY_FLOAT32, 2);
    if (sin == NULL || !ql_check_dim(where, "positions", 0, ql_dim(ids, 0)) ||
        !ql_check_dim(q_start, "q_start", 0, ql_dim(kv_len, 0) + 1) || !ql_check_dim(kv_start, "kv_start", 0, ql_dim(kv_len, 0)) ||
        !ql_check_dim(cos, "cos", 1, m->d / 2) || !ql_check_dim(sin, "sin", 1, m->d / 2) ||
        !ql_check_dim(sin, "sin", 0, ql_dim(cos, 0))) {
        return 0;
    }
    *batch = (ql_llama_batch){ql_data(ids), ql_data(where), ql_data(q_start), ql_data(kv_start), ql_data(kv_len),
                              ql_data(cos), ql_data(sin), ql_dim(ids, 0), ql_dim(kv_len, 0)};
    *positions = ql_dim(cos, 0);
    return 1;
}

/* a step of generation: its products read packed weights */
static void pack_weights(const ql_llama *m) {
    for (int64_t i = 0; i < m->layers; i++) {
        const ql_llama_layer *layer = &m->layer[i];
        const ql_weight *weights[] = {layer->q, layer->k, layer->v, layer->o, layer->gate, layer->up, layer->down};
        for (int j = 0; j < 7; j++) { ql_weight_pack((ql_weight *)weights[j]); }
    }
}

static PyObject *llama_forward(PyObject *object, PyObject *arguments) {
    LlamaObject *self = (LlamaObject *)object;
    const ql_llama *m = &self->model;
    PyObject *o[7], *cache_k = Py_None, *cache_v = Py_None;
    ql_llama_batch batch;
    ql_kv_cache cache;
    int64_t positions;
    if (!PyArg_ParseTuple(arguments, "OOOOOOO|OO", &o[0], &o[1], &o[2], &o[3], &o[4], &o[5], &o[6], &cache_k, &cache_v) ||
        !batch_arg(&batch, o, m, &positions)) {
        return NULL;
    }
    int cached = cache_k != Py_None;
    if (cached && !cache_arg(&cache, cache_k, cache_v, m)) { return NULL; }
    if (!check_batch(&batch, self->vocabulary, positions, cached ? cache.rows : batch.t)) { return NULL; }
    PyArrayObject *out = ql_new(2, (int64_t[]){batch.t, m->c}, NPY_FLOAT32);
    float *workspace = PyMem_RawCalloc((size_t)ql_llama_workspace(m, batch.t) + 1, sizeof(float)); /* padding rows: 0 */
    if (out == NULL || workspace == NULL) { return Py_XDECREF(out), PyMem_RawFree(workspace), PyErr_NoMemory(); }
    int stopped;
    QL_CALL_BEGIN
    if (cached && batch.t <= QL_GEMV_ROWS) { pack_weights(m); }
    ql_llama_forward(ql_data(out), m, &batch, cached ? &cache : NULL, workspace, ql_cpu());
    QL_CALL_END(stopped)
    PyMem_RawFree(workspace);
    if (stopped) { return Py_DECREF(out), ql_raise(QL_EINTERRUPT); }
    return (PyObject *)out;
}

static PyMethodDef llama_methods[] = {
    {"forward", llama_forward, METH_VARARGS,
     "forward(input_ids (t,), positions (t,), q_start (b+1,), kv_start (b,), kv_len (b,), cos, sin, cache_k=None, "
     "cache_v=None) -> hidden states after the final norm (t, c)"},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "Llama(heads, kv_heads, head_dim, intermediate, eps, embed, norm, layers): a model over _core.Weight and gains"},
    {Py_tp_new, __extension__(void *)llama_new},
    {Py_tp_dealloc, __extension__(void *)llama_dealloc},
    {Py_tp_methods, llama_methods},
    {0, NULL},
};
static PyType_Spec spec = {"quantlab._core.Llama", sizeof(LlamaObject), 0, Py_TPFLAGS_DEFAULT, slots};

int ql_register_llama(PyObject *module) {
    PyObject *type = PyType_FromSpec(&spec);
    if (type == NULL) { return -1; }
    int status = PyModule_AddObjectRef(module, "Llama", type);
    Py_DECREF(type);
    return status;
}
