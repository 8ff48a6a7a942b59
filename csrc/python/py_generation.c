/* py_generation.c: _core.Generation: prompts into the cache, then a token a step for each sequence, all on the backend. The
 * host only reads the tokens, a few steps behind; where the backend can, a step is recorded once and replayed. */
#include "llama_object.h"

#include "../quant/pack.h"

#include <structmember.h> /* PyMemberDef */

enum { STEPS_AHEAD = 4, LEAST_KEYS = 256 }; /* steps issued before the first of them is read: fewer than QL_MARKS */

typedef struct {
    PyObject_HEAD
    LlamaObject *llama;
    WeightObject *head_object;
    ql_placed *head; /* NULL on the CPU */
    const ql_backend *be;
    ql_llama_generation g;
    ql_bundle state;
    int64_t capacity;       /* rows of the cache that a sequence has */
    int64_t longest;        /* tokens of the longest prompt */
    int64_t steps;          /* that will be done */
    int64_t issued, taken;  /* steps issued to the backend, and read from it */
    ql_step *recorded;
    int64_t recorded_keys, run_keys; /* bounds of the recorded step, and of the last one that ran without recording */
} GenerationObject;

/* ---- making ------------------------------------------------------------------------------------------------------- */

/* The counters begin at each prompt's last token: choosing the first new one moves them on to it. */
static ql_status make_state(GenerationObject *self, const int64_t *lengths, int64_t positions) {
    ql_llama_generation *g = &self->g;
    size_t b = (size_t)g->batch.b, table = (size_t)(positions * (self->llama->model.d / 2)) * sizeof(float);
    int64_t *wide = PyMem_RawMalloc((3 * b + 2) * sizeof *wide), zero = 0;
    int32_t *narrow = PyMem_RawMalloc((3 * b + 1) * sizeof *narrow);
    if (wide == NULL || narrow == NULL) { return PyMem_RawFree(wide), PyMem_RawFree(narrow), ql_fail(QL_ENOMEM, "out of memory"); }
    int64_t *kv_len = wide, *kv_start = wide + b, *q_start = wide + 2 * b;
    int32_t *where = narrow, *rows = narrow + b, *streams = narrow + 2 * b;
    for (size_t i = 0; i < b; i++) {
        kv_len[i] = lengths[i], kv_start[i] = (int64_t)i * self->capacity, q_start[i] = (int64_t)i;
        where[i] = (int32_t)(lengths[i] - 1), rows[i] = (int32_t)(kv_start[i] + lengths[i] - 1), streams[i] = (int32_t)i;
    }
    q_start[b] = (int64_t)b;
    ql_bundle *s = &self->state;
    const size_t part[10] = {(size_t)ql_bundle_add(s, where, 4 * b), (size_t)ql_bundle_add(s, rows, 4 * b),
                             (size_t)ql_bundle_add(s, streams, 4 * b), (size_t)ql_bundle_add(s, kv_len, 8 * b),
                             (size_t)ql_bundle_add(s, kv_start, 8 * b), (size_t)ql_bundle_add(s, q_start, 8 * (b + 1)),
                             (size_t)ql_bundle_add(s, &zero, 8), (size_t)ql_bundle_add(s, g->batch.cos, table),
                             (size_t)ql_bundle_add(s, g->batch.sin, table), (size_t)ql_bundle_add(s, NULL, 8 * b)};
    ql_status status = ql_bundle_upload(s, self->be);
    PyMem_RawFree(wide);
    PyMem_RawFree(narrow);
    if (status != QL_OK) { return status; }
    g->batch.positions = g->positions = ql_bundle_at(s, (int)part[0]);
    g->batch.rows = g->rows = ql_bundle_at(s, (int)part[1]);
    g->streams = ql_bundle_at(s, (int)part[2]);
    g->batch.kv_len = g->kv_len = ql_bundle_at(s, (int)part[3]);
    g->batch.kv_start = ql_bundle_at(s, (int)part[4]), g->batch.q_start = ql_bundle_at(s, (int)part[5]);
    g->step = ql_bundle_at(s, (int)part[6]);
    g->batch.cos = ql_bundle_at(s, (int)part[7]), g->batch.sin = ql_bundle_at(s, (int)part[8]);
    g->batch.ids = g->ids = ql_bundle_at(s, (int)part[9]);
    g->tokens = g->ids + b;
    return QL_OK;
}

/* what products with few rows read, of b sequences */
static void pack_weights(GenerationObject *self, int64_t b) {
    if (self->llama->be == NULL) { ql_llama_pack(&self->llama->model, b), ql_weight_pack(&self->head_object->weight, b); }
}

static ql_status make(GenerationObject *self, const int64_t *lengths, int64_t positions) {
    const ql_backend *be = self->be;
    const ql_llama *m = &self->llama->model;
    ql_llama_generation *g = &self->g;
    int64_t b = g->batch.b;
    ql_status status = be->begin(be->device);
    if (status != QL_OK) { return status; }
    if (self->llama->be != NULL && (self->head = ql_place(self->head_object, be)) == NULL) { status = QL_ECUDA; }
    g->head = self->head != NULL ? &self->head->weight : &self->head_object->weight;
    g->cache.rows = b * self->capacity;
    size_t cache_bytes = (size_t)(m->layers * g->cache.rows * m->hkv * m->d) * (size_t)ql_llama_kv_bytes(be);
    if (status == QL_OK) { status = be->alloc(&g->cache.k, cache_bytes); }
    if (status == QL_OK) { status = be->alloc(&g->cache.v, cache_bytes); }
    if (status == QL_OK) { status = be->alloc((void **)&g->hidden, (size_t)(b * m->c) * sizeof(float)); }
    if (status == QL_OK) { status = be->alloc((void **)&g->logits, (size_t)(b * g->head->n) * sizeof(float)); }
    if (status == QL_OK) { status = be->alloc((void **)&g->workspace, (size_t)ql_llama_workspace(m, b, be) * sizeof(float)); }
    if (status == QL_OK) { status = be->alloc_shared((void **)&g->history, (size_t)(b * self->steps) * sizeof(int32_t)); }
    if (status == QL_OK) { status = make_state(self, lengths, positions); }
    if (status == QL_OK) { pack_weights(self, b); }
    ql_status first = be->end();
    return first != QL_OK ? first : status;
}

static void unmake(GenerationObject *self) {
    const ql_backend *be = self->be;
    if (be == NULL || be->begin(be->device) != QL_OK) { return; }
    (void)be->finish(); /* steps that nobody reads any more */
    be->step_release(self->recorded);
    be->release(self->g.cache.k), be->release(self->g.cache.v);
    be->release(self->g.hidden), be->release(self->g.logits), be->release(self->g.workspace);
    be->release(self->state.memory);
    be->release_shared(self->g.history);
    if (self->head != NULL) { ql_unplace(self->head_object, self->head); }
    (void)be->end();
}

static void generation_dealloc(GenerationObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    Py_BEGIN_ALLOW_THREADS
    unmake(self);
    Py_END_ALLOW_THREADS
    Py_XDECREF(self->llama);
    Py_XDECREF(self->head_object);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

/* 0 with an error where a prompt is empty, or the cache would have too many rows */
static int check_lengths(GenerationObject *self, PyArrayObject *lengths, int64_t positions) {
    const int64_t *values = ql_data(lengths);
    for (int64_t i = 0; i < ql_dim(lengths, 0); i++) {
        if (values[i] < 1 || values[i] > INT32_MAX) { return PyErr_Format(PyExc_ValueError, "lengths: got %lld", (long long)values[i]), 0; }
        if (values[i] > self->longest) { self->longest = values[i]; }
    }
    self->capacity = self->longest + self->steps;
    if (ql_dim(lengths, 0) < 1 || self->capacity > positions || self->capacity > INT32_MAX / ql_dim(lengths, 0)) {
        return PyErr_Format(PyExc_ValueError, "lengths: %lld sequences of up to %lld tokens are not accepted (%lld positions)",
                            (long long)ql_dim(lengths, 0), (long long)self->capacity, (long long)positions), 0;
    }
    return 1;
}

static PyObject *generation_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"llama", "head", "lengths", "steps", "cos", "sin", "temperature", "top_k", "top_p", "seed", NULL};
    PyObject *llama, *head, *lengths_object, *cos, *sin;
    long long steps, top_k = 0;
    float temperature = 0, top_p = 1;
    unsigned long long seed = 0;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O!OOLOO|fLfK", names, ql_llama_type, &llama, &head, &lengths_object, &steps,
                                     &cos, &sin, &temperature, &top_k, &top_p, &seed)) {
        return NULL;
    }
    const ql_weight *w = ql_weight_arg(head, "head");
    PyArrayObject *lengths = w == NULL ? NULL : ql_array(lengths_object, "lengths", NPY_INT64, 1);
    if (lengths == NULL) { return NULL; }
    const LlamaObject *model = (LlamaObject *)llama;
    if (w->k != model->model.c || steps < 1 || steps > INT32_MAX || !(temperature >= 0) || top_k < 0 || !(top_p > 0 && top_p <= 1)) {
        return PyErr_Format(PyExc_ValueError, "head, steps, temperature, top_k or top_p: out of range");
    }
    GenerationObject *self = (GenerationObject *)type->tp_alloc(type, 0);
    if (self == NULL) { return NULL; }
    int64_t positions;
    self->steps = steps;
    self->g = (ql_llama_generation){.model = &model->model, .temperature = temperature, .top_p = top_p, .top_k = top_k, .seed = seed};
    self->llama = (LlamaObject *)Py_NewRef(llama);
    self->head_object = (WeightObject *)Py_NewRef(head);
    if (!ql_rope_arg(&self->g.batch.cos, &self->g.batch.sin, &positions, cos, sin, model->model.d) ||
        !check_lengths(self, lengths, positions)) {
        return Py_DECREF(self), NULL;
    }
    self->be = ql_llama_backend(model);
    self->g.batch.t = self->g.batch.b = ql_dim(lengths, 0);
    self->g.batch.max_queries = 1;
    int stopped;
    ql_status status;
    QL_CALL_BEGIN
    status = make(self, ql_data(lengths), positions);
    QL_CALL_END(stopped)
    if (stopped || status != QL_OK) { return Py_DECREF(self), stopped ? NULL : ql_raise(status); }
    return (PyObject *)self;
}

/* ---- prompts ------------------------------------------------------------------------------------------------------- */

typedef struct {
    ql_llama_batch batch; /* of the host */
    int64_t positions;
    const int32_t *from, *to; /* (ends,) tokens that end a prompt, and the sequences they belong to */
    int64_t ends;
} prompt_call;

static ql_status run_prompt(GenerationObject *self, const prompt_call *call) {
    const ql_backend *be = self->be;
    const ql_llama *m = &self->llama->model;
    ql_llama_batch batch;
    ql_bundle arrays = {.count = 0};
    float *hidden = NULL, *workspace = NULL, *ends = NULL;
    int64_t t = call->batch.t;
    ql_status status = be->begin(be->device);
    if (status != QL_OK) { return status; }
    int from = ql_bundle_add(&arrays, call->from, (size_t)call->ends * sizeof(int32_t));
    int to = ql_bundle_add(&arrays, call->to, (size_t)call->ends * sizeof(int32_t));
    status = ql_batch_upload(&batch, &arrays, &call->batch, call->positions, m->d, be);
    if (status == QL_OK) { status = be->alloc((void **)&hidden, (size_t)(t * m->c) * sizeof(float)); }
    if (status == QL_OK) { status = be->alloc((void **)&ends, (size_t)(call->ends * m->c) * sizeof(float)); }
    if (status == QL_OK) { status = be->alloc((void **)&workspace, (size_t)ql_llama_workspace(m, t, be) * sizeof(float)); }
    if (status == QL_OK) { status = ql_llama_forward(hidden, m, &batch, &self->g.cache, workspace, be); }
    if (status == QL_OK && call->ends > 0) {
        be->gather_rows_forward(ends, hidden, ql_bundle_at(&arrays, from), call->ends, m->c);
        be->scatter_rows_forward(self->g.hidden, ends, ql_bundle_at(&arrays, to), call->ends, m->c);
    }
    be->release(workspace), be->release(ends), be->release(hidden);
    be->release(arrays.memory);
    ql_status first = be->end();
    return first != QL_OK ? first : status;
}

/* prefill(input_ids, positions, q_start, kv_start, kv_len, cos, sin, ends): a part of the prompts; ends (sequences,): the
 * token of this part that is the last of each sequence's prompt, or -1 */
static PyObject *generation_prefill(PyObject *object, PyObject *arguments) {
    GenerationObject *self = (GenerationObject *)object;
    PyObject *o[7], *ends_object;
    prompt_call call = {.ends = 0};
    int32_t *rows = NULL;
    if (!PyArg_ParseTuple(arguments, "OOOOOOOO", &o[0], &o[1], &o[2], &o[3], &o[4], &o[5], &o[6], &ends_object) ||
        !ql_rope_arg(&call.batch.cos, &call.batch.sin, &call.positions, o[5], o[6], self->llama->model.d)) {
        return NULL;
    }
    PyArrayObject *ends = ql_array(ends_object, "ends", NPY_INT32, 1);
    if (ends == NULL || !ql_check_dim(ends, "ends", 0, self->g.batch.b) ||
        !ql_batch_arg(&call.batch, &rows, o, self->llama->vocabulary, call.positions, self->g.cache.rows)) {
        return NULL;
    }
    const int32_t *values = ql_data(ends);
    int32_t *pairs = PyMem_RawMalloc((size_t)(2 * self->g.batch.b + 1) * sizeof *pairs);
    int bad = pairs == NULL || self->issued > 0;
    for (int64_t i = 0; i < self->g.batch.b && !bad; i++) {
        bad = values[i] < -1 || values[i] >= call.batch.t;
        if (values[i] >= 0) { pairs[call.ends] = values[i], pairs[self->g.batch.b + call.ends++] = (int32_t)i; }
    }
    if (bad) {
        PyMem_RawFree(pairs), PyMem_RawFree(rows);
        return PyErr_Format(PyExc_ValueError, "ends: out of range, or tokens were generated already");
    }
    call.from = pairs, call.to = pairs + self->g.batch.b;
    int stopped;
    ql_status status;
    QL_CALL_BEGIN
    status = run_prompt(self, &call);
    QL_CALL_END(stopped)
    PyMem_RawFree(pairs);
    PyMem_RawFree(rows);
    if (stopped || status != QL_OK) { return stopped ? NULL : ql_raise(status); }
    Py_RETURN_NONE;
}

/* ---- steps ----------------------------------------------------------------------------------------------------------- */

/* a bound of the keys of the next step that changes seldom: each change records the step anew */
static int64_t key_bound(const GenerationObject *self) {
    int64_t bound = LEAST_KEYS, keys = self->longest + self->issued;
    while (bound < keys) { bound *= 2; }
    return bound < self->capacity ? bound : self->capacity;
}

static ql_status record(GenerationObject *self) {
    ql_status status = self->be->record();
    if (status != QL_OK) { return status; }
    status = ql_llama_step(&self->g, self->be);
    ql_status ended = self->be->record_end(&self->recorded);
    if (status != QL_OK) { /* stopped half-way */
        self->be->step_release(self->recorded);
        self->recorded = NULL;
    }
    self->recorded_keys = self->g.batch.max_keys;
    return status != QL_OK ? status : ended;
}

/* The first step after a change runs as it is, so that scratch memory has its size; the next is recorded. */
static ql_status issue(GenerationObject *self) {
    const ql_backend *be = self->be;
    ql_status status = QL_OK;
    int64_t keys = key_bound(self);
    self->g.batch.max_keys = keys;
    if (self->recorded != NULL && (keys != self->recorded_keys || !be->step_valid(self->recorded))) {
        be->step_release(self->recorded);
        self->recorded = NULL;
    }
    if (self->issued == 0) {
        ql_llama_choose(&self->g, be);
    } else if (!be->records || (self->recorded == NULL && self->run_keys != keys)) {
        status = ql_llama_step(&self->g, be);
        self->run_keys = keys;
    } else {
        if (self->recorded == NULL) { status = record(self); }
        if (status == QL_OK) { status = be->replay(self->recorded); }
    }
    if (status == QL_OK) { status = be->mark((int)(self->issued % QL_MARKS)); }
    self->issued += status == QL_OK;
    return status;
}

static ql_status take(GenerationObject *self, int32_t *tokens) {
    const ql_backend *be = self->be;
    ql_status status = be->begin(be->device);
    if (status != QL_OK) { return status; }
    int64_t ahead = self->be->records ? STEPS_AHEAD : 1;
    while (status == QL_OK && self->issued < self->steps && self->issued < self->taken + ahead) { status = issue(self); }
    if (status == QL_OK) { status = be->wait((int)(self->taken % QL_MARKS)); }
    ql_status first = be->end();
    if (first != QL_OK || status != QL_OK) { return first != QL_OK ? first : status; }
    memcpy(tokens, self->g.history + self->taken * self->g.batch.b, (size_t)self->g.batch.b * sizeof *tokens);
    self->taken++;
    return QL_OK;
}

/* next() -> int32 (sequences,): the next token of each */
static PyObject *generation_next(PyObject *object, PyObject *unused) {
    (void)unused;
    GenerationObject *self = (GenerationObject *)object;
    if (self->taken == self->steps) { return PyErr_Format(PyExc_ValueError, "next: all %lld steps are done", (long long)self->steps); }
    PyArrayObject *out = ql_new(1, &self->g.batch.b, NPY_INT32);
    if (out == NULL) { return NULL; }
    int32_t *tokens = ql_data(out);
    int stopped;
    ql_status status;
    QL_CALL_BEGIN
    status = take(self, tokens);
    QL_CALL_END(stopped)
    if (stopped || status != QL_OK) { return Py_DECREF(out), ql_raise(stopped ? QL_EINTERRUPT : status); }
    return (PyObject *)out;
}

/* The sequences `rows` alone go on; nothing is on its way. */
static void keep_rows(GenerationObject *self, const int32_t *rows, int64_t count) {
    ql_llama_generation *g = &self->g;
    int64_t *kv_start = (int64_t *)g->batch.kv_start; /* of this object's state */
    int32_t *streams = (int32_t *)g->streams;
    for (int64_t i = 0; i < count; i++) { /* rows[i] >= i */
        int64_t from = rows[i];
        g->ids[i] = g->ids[from], g->positions[i] = g->positions[from], g->rows[i] = g->rows[from];
        g->kv_len[i] = g->kv_len[from], kv_start[i] = kv_start[from], streams[i] = streams[from];
    }
    g->batch.t = g->batch.b = count;
    pack_weights(self, count); /* they may be the first that are few enough */
}

/* keep(rows int32 (n,)) -> bool: the next steps are of these sequences alone, ascending places among those of the last step, after which
 * next() gives n tokens. False: this backend goes on with all, since its step is recorded. */
static PyObject *generation_keep(PyObject *object, PyObject *arguments) {
    GenerationObject *self = (GenerationObject *)object;
    PyObject *rows_object;
    if (!PyArg_ParseTuple(arguments, "O", &rows_object)) { return NULL; }
    PyArrayObject *rows = ql_array(rows_object, "rows", NPY_INT32, 1);
    if (rows == NULL) { return NULL; }
    const int32_t *values = ql_data(rows);
    int64_t count = ql_dim(rows, 0);
    int bad = count < 1 || count > self->g.batch.b || self->taken == 0;
    for (int64_t i = 0; i < count && !bad; i++) { bad = values[i] >= self->g.batch.b || values[i] < (i > 0 ? values[i - 1] + 1 : 0); }
    if (bad) { return PyErr_Format(PyExc_ValueError, "rows: expected ascending places among the sequences of the last step"); }
    if (self->be->records) { Py_RETURN_FALSE; }
    int stopped;
    QL_CALL_BEGIN
    keep_rows(self, values, count);
    QL_CALL_END(stopped)
    if (stopped) { return NULL; }
    Py_RETURN_TRUE;
}

static PyMethodDef generation_methods[] = {
    {"prefill", generation_prefill, METH_VARARGS,
     "prefill(input_ids (t,), positions (t,), q_start (b+1,), kv_start (b,), kv_len (b,), cos, sin, ends (sequences,))"},
    {"next", generation_next, METH_NOARGS, "next() -> int32 (sequences,): the next token of each"},
    {"keep", generation_keep, METH_VARARGS, "keep(rows int32 (n,)) -> bool: only these sequences go on; False: all do"},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef generation_members[] = {
    {"capacity", T_LONGLONG, offsetof(GenerationObject, capacity), READONLY, "rows of the cache that a sequence has"},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "Generation(llama, head, lengths, steps, cos, sin, temperature=0, top_k=0, top_p=1, seed=0): sequences on the model's backend"},
    {Py_tp_new, __extension__(void *)generation_new},
    {Py_tp_dealloc, __extension__(void *)generation_dealloc},
    {Py_tp_methods, generation_methods},
    {Py_tp_members, generation_members},
    {0, NULL},
};
static PyType_Spec spec = {"quantlab._core.Generation", sizeof(GenerationObject), 0, Py_TPFLAGS_DEFAULT, slots};

int ql_register_generation(PyObject *module) {
    PyObject *type = PyType_FromSpec(&spec);
    if (type == NULL) { return -1; }
    int status = PyModule_AddObjectRef(module, "Generation", type);
    Py_DECREF(type);
    return status;
}
