/* py_llama.c: _core.Llama, a model over validated weights, and its forward pass. */
#include "llama_object.h"

#include "../quant/pack.h"

PyTypeObject *ql_llama_type;

enum { LAYER_PARTS = 9 };
static const char *const part_names[LAYER_PARTS] = {"input_layernorm", "q_proj", "k_proj", "v_proj", "o_proj",
                                                    "post_attention_layernorm", "gate_proj", "up_proj", "down_proj"};
static const int part_slots[LAYER_PARTS] = {-1, QL_SLOT_Q, QL_SLOT_K, QL_SLOT_V, QL_SLOT_O, -1, QL_SLOT_GATE, QL_SLOT_UP, QL_SLOT_DOWN};

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
    for (int i = 0; i < LAYER_PARTS; i++) {
        char name[64];
        PyObject *part = PyTuple_GET_ITEM(parts, i);
        PyOS_snprintf(name, sizeof name, "layer %lld %s", (long long)index, part_names[i]);
        if (part_slots[i] < 0) {
            const float *gain = gain_arg(part, name, m->c);
            if (gain == NULL) { return 0; }
            *(i == 0 ? &layer->input_norm : &layer->post_norm) = gain;
        } else if ((layer->matrix[part_slots[i]] = shaped_weight(part, name, n[i], k[i])) == NULL) {
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

/* where the model points to each matrix, and which object that is */
static int list_matrices(LlamaObject *self, PyObject *embed, PyObject *layers) {
    self->matrix = PyMem_Calloc((size_t)(QL_SLOTS * self->model.layers + 1), sizeof *self->matrix);
    if (self->matrix == NULL) { return PyErr_NoMemory(), 0; }
    self->matrix[self->matrices++] = (ql_llama_matrix){(WeightObject *)embed, &self->model.embed, NULL};
    for (int64_t i = 0; i < self->model.layers; i++) {
        for (int part = 0; part < LAYER_PARTS; part++) {
            if (part_slots[part] < 0) { continue; }
            PyObject *object = PyTuple_GET_ITEM(PyTuple_GET_ITEM(layers, i), part);
            const ql_weight **slot = &self->layer[i].matrix[part_slots[part]];
            self->matrix[self->matrices++] = (ql_llama_matrix){(WeightObject *)object, slot, NULL};
        }
    }
    return 1;
}

static int place(LlamaObject *self) {
    int stopped;
    ql_status status;
    QL_CALL_BEGIN
    status = ql_llama_place(self);
    QL_CALL_END(stopped)
    if (!stopped && status != QL_OK) { ql_raise(status); }
    return !stopped && status == QL_OK;
}

static PyObject *llama_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"heads", "kv_heads", "head_dim", "intermediate", "eps", "embed", "norm", "layers", "device", "adapter", NULL};
    int device = -1;
    long long hq, hkv, d, f;
    float eps;
    PyObject *embed, *norm, *layers, *adapter = Py_None;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "LLLLfOOO!|iO", names, &hq, &hkv, &d, &f, &eps, &embed, &norm,
                                     &PyTuple_Type, &layers, &device, &adapter)) {
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
    if (self->parts == NULL || !list_matrices(self, embed, layers)) { return Py_DECREF(self), NULL; }
    if (adapter != Py_None && !ql_adapter_attach(self, adapter)) { return Py_DECREF(self), NULL; }
    if (device >= 0 && ((self->be = ql_device_arg(device)) == NULL || !place(self))) { return Py_DECREF(self), NULL; }
    return (PyObject *)self;
}

static void llama_dealloc(LlamaObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    if (self->be != NULL) {
        Py_BEGIN_ALLOW_THREADS
        ql_llama_unplace(self);
        Py_END_ALLOW_THREADS
    }
    PyMem_Free(self->matrix);
    PyMem_Free(self->layer);
    PyMem_Free(self->lora);
    Py_XDECREF(self->adapter);
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

int ql_rope_arg(const float **cos, const float **sin, int64_t *positions, PyObject *cos_object, PyObject *sin_object, int64_t d) {
    PyArrayObject *c = ql_array(cos_object, "cos", NPY_FLOAT32, 2);
    PyArrayObject *s = c == NULL ? NULL : ql_array(sin_object, "sin", NPY_FLOAT32, 2);
    if (s == NULL || !ql_check_dim(c, "cos", 1, d / 2) || !ql_check_dim(s, "sin", 1, d / 2) ||
        !ql_check_dim(s, "sin", 0, ql_dim(c, 0))) {
        return 0;
    }
    *cos = ql_data(c), *sin = ql_data(s), *positions = ql_dim(c, 0);
    return 1;
}

static int64_t most(const int64_t *values, int64_t count) {
    int64_t found = 0;
    for (int64_t i = 0; i < count; i++) { found = values[i] > found ? values[i] : found; }
    return found;
}

int ql_batch_arg(ql_llama_batch *batch, int32_t **rows, PyObject *const o[5], int64_t vocabulary, int64_t positions,
                 int64_t cache_rows) {
    PyArrayObject *ids = ql_array(o[0], "input_ids", NPY_INT32, 1);
    PyArrayObject *where = ids == NULL ? NULL : ql_array(o[1], "positions", NPY_INT32, 1);
    PyArrayObject *q_start = where == NULL ? NULL : ql_array(o[2], "q_start", NPY_INT64, 1);
    PyArrayObject *kv_start = q_start == NULL ? NULL : ql_array(o[3], "kv_start", NPY_INT64, 1);
    PyArrayObject *kv_len = kv_start == NULL ? NULL : ql_array(o[4], "kv_len", NPY_INT64, 1);
    if (kv_len == NULL || !ql_check_dim(where, "positions", 0, ql_dim(ids, 0)) ||
        !ql_check_dim(q_start, "q_start", 0, ql_dim(kv_len, 0) + 1) || !ql_check_dim(kv_start, "kv_start", 0, ql_dim(kv_len, 0))) {
        return 0;
    }
    *batch = (ql_llama_batch){.ids = ql_data(ids), .positions = ql_data(where), .q_start = ql_data(q_start),
                              .kv_start = ql_data(kv_start), .kv_len = ql_data(kv_len), .cos = batch->cos, .sin = batch->sin,
                              .t = ql_dim(ids, 0), .b = ql_dim(kv_len, 0)};
    if (!check_batch(batch, vocabulary, positions, cache_rows >= 0 ? cache_rows : batch->t)) { return 0; }
    for (int64_t b = 0; b < batch->b; b++) {
        int64_t queries = batch->q_start[b + 1] - batch->q_start[b];
        if (queries > batch->max_queries) { batch->max_queries = queries; }
    }
    batch->max_keys = most(batch->kv_len, batch->b);
    *rows = PyMem_RawMalloc((size_t)(batch->t + 1) * sizeof **rows);
    if (*rows == NULL) { return PyErr_NoMemory(), 0; }
    ql_llama_rows(*rows, batch);
    batch->rows = *rows;
    return 1;
}

void ql_llama_pack(const ql_llama *m, int64_t rows) {
    for (int64_t i = 0; i < m->layers; i++) {
        for (int slot = 0; slot < QL_SLOTS; slot++) { ql_weight_pack((ql_weight *)m->layer[i].matrix[slot], rows); }
    }
}

/* what a call of the model computes: `out` from the hidden states */
typedef struct {
    ql_llama_batch batch; /* of the host */
    int64_t positions;
    const ql_kv_cache *cache;
    const int32_t *keep; /* (kept,) rows of the hidden states that are wanted, or NULL: all */
    int64_t kept;
    WeightObject *head;     /* NULL: out (kept or t, c) is hidden states; else out (t,) is the loss of each token */
    const int32_t *targets; /* (t,) */
    float *out;
} llama_call;

enum { LOSS_ROWS = 256 }; /* rows of logits held at once */

/* hidden: (t, c), at least ql_product_rows(t) of them */
static ql_status losses(float *out, const float *hidden, const ql_weight *head, const int32_t *targets, int64_t t, const ql_backend *be) {
    float *logits = NULL;
    ql_status status = be->alloc((void **)&logits, (size_t)(LOSS_ROWS * head->n) * sizeof *logits);
    for (int64_t i = 0; i < t && status == QL_OK && !ql_call_stopped(); i += LOSS_ROWS) {
        int64_t count = t - i < LOSS_ROWS ? t - i : LOSS_ROWS;
        int64_t rows = ql_product_rows(count, be), first = i + rows > t && t >= rows ? t - rows : i; /* the last ones again */
        be->linear_forward[head->format](logits, hidden + first * head->k, head, rows, 0);
        be->cross_entropy_forward(out + i, NULL, logits + (i - first) * head->n, targets + i, count, head->n);
    }
    be->release(logits);
    return status;
}

/* the part of a call after its batch is on the backend; the first of its arrays: rows to keep, or targets */
static ql_status finish_call(LlamaObject *self, const llama_call *call, const float *hidden, const ql_bundle *arrays, const ql_backend *be) {
    int64_t t = call->batch.t, c = self->model.c;
    float *result = NULL;
    ql_status status = QL_OK;
    if (call->head == NULL && call->keep == NULL) { return be->download(call->out, hidden, (size_t)(t * c) * sizeof(float)); }
    if (call->batch.kept != NULL) { return be->download(call->out, hidden, (size_t)(call->kept * c) * sizeof(float)); }
    if (call->head == NULL) {
        status = be->alloc((void **)&result, (size_t)(call->kept * c) * sizeof(float));
        if (status == QL_OK) {
            be->gather_rows_forward(result, hidden, ql_bundle_at(arrays, 0), call->kept, c);
            status = be->download(call->out, result, (size_t)(call->kept * c) * sizeof(float));
        }
    } else {
        ql_placed *placed = self->be != NULL ? ql_place(call->head, be) : NULL;
        const ql_weight *head = placed != NULL ? &placed->weight : &call->head->weight;
        status = self->be != NULL && placed == NULL ? QL_ECUDA : be->alloc((void **)&result, (size_t)t * sizeof(float));
        if (status == QL_OK) { status = losses(result, hidden, head, ql_bundle_at(arrays, 0), t, be); }
        if (status == QL_OK) { status = be->download(call->out, result, (size_t)t * sizeof(float)); }
        if (placed != NULL) { ql_unplace(call->head, placed); }
    }
    be->release(result);
    return status;
}

static ql_status run_call(LlamaObject *self, const llama_call *call) {
    const ql_backend *be = ql_llama_backend(self);
    ql_status status = be->begin(be->device);
    if (status != QL_OK) { return status; }
    ql_llama_batch batch;
    ql_bundle arrays = {.count = 0};
    float *hidden = NULL, *workspace = NULL;
    int64_t t = call->batch.t, rows = ql_product_rows(t, be);
    ql_bundle_add(&arrays, call->head != NULL ? call->targets : call->keep, (size_t)(call->head != NULL ? t : call->kept) * sizeof(int32_t));
    status = ql_batch_upload(&batch, &arrays, &call->batch, call->positions, self->model.d, be);
    if (status == QL_OK) { status = be->alloc((void **)&hidden, (size_t)(rows * self->model.c) * sizeof(float)); }
    if (status == QL_OK) { status = be->alloc((void **)&workspace, (size_t)ql_llama_workspace(&self->model, t, be) * sizeof(float)); }
    if (status == QL_OK && t < rows) { /* rows that fill a small pass up are zero */
        status = be->fill(hidden, 0, (size_t)(rows * self->model.c) * sizeof(float));
    }
    if (status == QL_OK && t < rows) {
        status = be->fill(workspace, 0, (size_t)ql_llama_workspace(&self->model, t, be) * sizeof(float));
        if (self->be == NULL && call->cache != NULL) { ql_llama_pack(&self->model, t); }
    }
    if (status == QL_OK) { status = ql_llama_forward(hidden, &self->model, &batch, call->cache, workspace, be); }
    be->release(workspace);
    if (status == QL_OK) { status = finish_call(self, call, hidden, &arrays, be); }
    be->release(hidden);
    be->release(arrays.memory);
    ql_status first = be->end();
    return first != QL_OK ? first : status;
}

static PyObject *call_model(LlamaObject *self, llama_call *call, PyArrayObject *out, int32_t *rows) {
    int stopped;
    ql_status status = QL_OK;
    if (out != NULL) {
        call->out = ql_data(out);
        QL_CALL_BEGIN
        status = run_call(self, call);
        QL_CALL_END(stopped)
        if (stopped) { status = QL_EINTERRUPT; }
    }
    PyMem_RawFree(rows);
    if (out == NULL || status != QL_OK) { return Py_XDECREF(out), out == NULL ? NULL : ql_raise(status); }
    return (PyObject *)out;
}

static int keep_arg(llama_call *call, PyObject *object) {
    int failed = 0;
    PyArrayObject *keep = ql_array_or_none(object, "keep", NPY_INT32, 1, &failed);
    call->keep = ql_data(keep);
    call->kept = keep == NULL ? 0 : ql_dim(keep, 0);
    for (int64_t i = 0; i < call->kept; i++) {
        if (call->keep[i] < 0 || call->keep[i] >= call->batch.t) {
            return PyErr_Format(PyExc_ValueError, "keep: got %d, expected 0 to %lld", call->keep[i], (long long)call->batch.t - 1), 0;
        }
    }
    return !failed;
}

static PyObject *llama_forward(PyObject *object, PyObject *arguments) {
    LlamaObject *self = (LlamaObject *)object;
    const ql_llama *m = &self->model;
    PyObject *o[7], *cache_k = Py_None, *cache_v = Py_None, *keep = Py_None;
    ql_kv_cache cache = {NULL, NULL, -1};
    llama_call call = {.cache = NULL};
    int32_t *rows = NULL;
    if (!PyArg_ParseTuple(arguments, "OOOOOOO|OOO", &o[0], &o[1], &o[2], &o[3], &o[4], &o[5], &o[6], &cache_k, &cache_v, &keep) ||
        !ql_rope_arg(&call.batch.cos, &call.batch.sin, &call.positions, o[5], o[6], m->d)) {
        return NULL;
    }
    if (cache_k != Py_None && self->be != NULL) {
        return PyErr_Format(PyExc_ValueError, "cache_k: a model on a device keeps its keys there: use _core.Generation");
    }
    if (cache_k != Py_None && !cache_arg(&cache, cache_k, cache_v, m)) { return NULL; }
    call.cache = cache_k != Py_None ? &cache : NULL;
    if (!ql_batch_arg(&call.batch, &rows, o, self->vocabulary, call.positions, cache.rows)) { return NULL; }
    if (!keep_arg(&call, keep)) { return PyMem_RawFree(rows), NULL; }
    if (!ql_llama_fused(ql_llama_backend(self)) && call.cache == NULL && m->layers > 0 && call.kept <= call.batch.t) {
        call.batch.kept = call.keep, call.batch.count = call.kept;
    }
    int64_t count = call.keep != NULL ? call.kept : call.batch.t;
    return call_model(self, &call, ql_new(2, (int64_t[]){count, m->c}, NPY_FLOAT32), rows);
}

int ql_check_targets(PyArrayObject *targets, const char *name, int64_t t, int64_t classes) {
    if (!ql_check_dim(targets, name, 0, t)) { return 0; }
    const int32_t *values = ql_data(targets);
    for (int64_t i = 0; i < t; i++) {
        if (values[i] != QL_IGNORED && (values[i] < 0 || values[i] >= classes)) {
            return PyErr_Format(PyExc_ValueError, "%s: got %d, expected 0 to %lld, or -100", name, values[i], (long long)classes - 1), 0;
        }
    }
    return 1;
}

static PyObject *llama_losses(PyObject *object, PyObject *arguments) {
    LlamaObject *self = (LlamaObject *)object;
    PyObject *o[7], *head, *targets_object;
    llama_call call = {.cache = NULL};
    int32_t *rows = NULL;
    if (!PyArg_ParseTuple(arguments, "OOOOOOOOO", &o[0], &o[1], &o[2], &o[3], &o[4], &o[5], &o[6], &head, &targets_object) ||
        !ql_rope_arg(&call.batch.cos, &call.batch.sin, &call.positions, o[5], o[6], self->model.d)) {
        return NULL;
    }
    const ql_weight *w = ql_weight_arg(head, "head");
    PyArrayObject *targets = w == NULL ? NULL : ql_array(targets_object, "targets", NPY_INT32, 1);
    if (targets == NULL || !ql_batch_arg(&call.batch, &rows, o, self->vocabulary, call.positions, -1)) { return NULL; }
    if (w->k != self->model.c || !ql_check_targets(targets, "targets", call.batch.t, w->n)) {
        if (!PyErr_Occurred()) { PyErr_SetString(PyExc_ValueError, "head: its columns are not the hidden size"); }
        return PyMem_RawFree(rows), NULL;
    }
    call.head = (WeightObject *)head, call.targets = ql_data(targets);
    return call_model(self, &call, ql_new(1, (int64_t[]){call.batch.t}, NPY_FLOAT32), rows);
}

/* linear(x, weight) -> x W^T on the model's backend */
static PyObject *llama_linear(PyObject *object, PyObject *arguments) {
    LlamaObject *self = (LlamaObject *)object;
    PyObject *x_object, *w_object;
    if (!PyArg_ParseTuple(arguments, "OO", &x_object, &w_object)) { return NULL; }
    return ql_linear_on(ql_llama_backend(self), x_object, w_object, Py_None, 0, 0);
}

static PyMethodDef llama_methods[] = {
    {"forward", llama_forward, METH_VARARGS,
     "forward(input_ids (t,), positions (t,), q_start (b+1,), kv_start (b,), kv_len (b,), cos, sin, cache_k=None, "
     "cache_v=None, keep=None) -> hidden states after the final norm (t, c), or its rows keep (kept, c)"},
    {"losses", llama_losses, METH_VARARGS,
     "losses(input_ids, positions, q_start, kv_start, kv_len, cos, sin, head, targets (t,)) -> -log p of each target (t,)"},
    {"linear", llama_linear, METH_VARARGS, "linear(x (m, k), weight) -> x W^T (m, n) where the model is"},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "Llama(heads, kv_heads, head_dim, intermediate, eps, embed, norm, layers, device=-1, adapter=None): a model over _core.Weight and gains"},
    {Py_tp_new, __extension__(void *)llama_new},
    {Py_tp_dealloc, __extension__(void *)llama_dealloc},
    {Py_tp_methods, llama_methods},
    {0, NULL},
};
static PyType_Spec spec = {"quantlab._core.Llama", sizeof(LlamaObject), 0, Py_TPFLAGS_DEFAULT, slots};

int ql_register_llama(PyObject *module) {
    ql_llama_type = (PyTypeObject *)PyType_FromSpec(&spec);
    return ql_llama_type == NULL ? -1 : PyModule_AddObjectRef(module, "Llama", (PyObject *)ql_llama_type);
}
