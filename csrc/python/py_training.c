/* py_training.c: _core.Trainer: the gradient of a model's adapter, pass by pass, in memory that it keeps. */
#include "llama_object.h"

typedef struct {
    PyObject_HEAD
    LlamaObject *llama;
    WeightObject *head;       /* NULL: it has none */
    PyArrayObject *gradients; /* float32 (floats,) like the adapter's parameters, of the caller */
    float dropout;
    uint64_t seed;
    float *workspace;
    int64_t floats; /* of workspace */
    int running;    /* a thread is in a pass: its memory is in use */
} TrainerObject;

static const char *const recompute_names[] = {"none", "selective", "full"};

static PyObject *trainer_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"llama", "head", "gradients", "dropout", "seed", NULL};
    PyObject *llama, *head, *gradients_object;
    float dropout = 0.0f;
    unsigned long long seed = 0;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O!OO|$fK", names, ql_llama_type, &llama, &head, &gradients_object,
                                     &dropout, &seed)) {
        return NULL;
    }
    const LlamaObject *model = (LlamaObject *)llama;
    if (model->adapter == NULL) { return PyErr_Format(PyExc_ValueError, "llama: it has no adapter to train"); }
    if (head != Py_None && ql_weight_arg(head, "head") == NULL) { return NULL; }
    if (head != Py_None && ((WeightObject *)head)->weight.k != model->model.c) {
        return PyErr_Format(PyExc_ValueError, "head: it has %lld columns, expected the hidden size %lld",
                            (long long)((WeightObject *)head)->weight.k, (long long)model->model.c);
    }
    if (!(dropout >= 0.0f && dropout < 1.0f)) { return PyErr_Format(PyExc_ValueError, "dropout: expected 0 or more, below 1"); }
    PyArrayObject *gradients = ql_array(gradients_object, "gradients", NPY_FLOAT32, 1);
    PyArrayObject *parameters = ((AdapterObject *)model->adapter)->parameters;
    if (gradients == NULL || !ql_check_dim(gradients, "gradients", 0, ql_dim(parameters, 0))) { return NULL; }
    if (!PyArray_ISWRITEABLE(gradients)) { return PyErr_Format(PyExc_ValueError, "gradients: not writeable"); }
    TrainerObject *self = (TrainerObject *)type->tp_alloc(type, 0);
    if (self == NULL) { return NULL; }
    self->llama = (LlamaObject *)Py_NewRef(llama);
    self->head = head == Py_None ? NULL : (WeightObject *)Py_NewRef(head);
    self->gradients = (PyArrayObject *)Py_NewRef(gradients_object);
    self->dropout = dropout, self->seed = seed;
    return (PyObject *)self;
}

static void trainer_dealloc(TrainerObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    if (self->workspace != NULL) { ql_llama_backend(self->llama)->release(self->workspace); }
    Py_XDECREF(self->llama);
    Py_XDECREF(self->head);
    Py_XDECREF(self->gradients);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

/* ---- arguments ------------------------------------------------------------------------------------------------------ */

static int recompute_arg(ql_recompute *recompute, const char *text) {
    for (int i = 0; i <= QL_RECOMPUTE_FULL; i++) {
        if (strcmp(text, recompute_names[i]) == 0) { return *recompute = (ql_recompute)i, 1; }
    }
    return PyErr_Format(PyExc_ValueError, "recompute: got '%s', expected none, selective or full", text), 0;
}

static int check_whole(const ql_llama_batch *batch) {
    for (int64_t b = 0; b < batch->b; b++) {
        int64_t tokens = batch->q_start[b + 1] - batch->q_start[b];
        if (batch->kv_start[b] != batch->q_start[b] || batch->kv_len[b] != tokens) {
            return PyErr_Format(PyExc_ValueError, "kv_start, kv_len: sequence %lld does not see itself alone", (long long)b), 0;
        }
    }
    return 1;
}

/* a pass: what Python gave, and lists of the tokens that count, which free_pass releases */
typedef struct {
    ql_llama_training call;
    int32_t *rows, *kept, *targets;
    float *losses;
} training_pass;

static void free_pass(training_pass *pass) {
    PyMem_RawFree(pass->rows);
    PyMem_RawFree(pass->kept);
    PyMem_RawFree(pass->targets);
    PyMem_RawFree(pass->losses);
}

/* the tokens rows[i] (NULL: i) whose target counts */
static int keep_targets(training_pass *pass, const int32_t *rows, const int32_t *targets, int64_t count) {
    size_t items = (size_t)count + 1;
    pass->kept = PyMem_RawMalloc(items * sizeof *pass->kept);
    pass->targets = PyMem_RawMalloc(items * sizeof *pass->targets);
    pass->losses = PyMem_RawMalloc(items * sizeof *pass->losses);
    if (pass->kept == NULL || pass->targets == NULL || pass->losses == NULL) { return PyErr_NoMemory(), 0; }
    for (int64_t i = 0; i < count; i++) {
        if (targets[i] == QL_IGNORED) { continue; }
        pass->kept[pass->call.count] = rows != NULL ? rows[i] : (int32_t)i;
        pass->targets[pass->call.count++] = targets[i];
    }
    pass->call.kept = pass->kept, pass->call.targets = pass->targets;
    return 1;
}

static int check_number(long long number) {
    if (number >= 0 && number <= INT32_MAX) { return 1; }
    return PyErr_Format(PyExc_ValueError, "call: got %lld, expected 0 to 2^31 - 1", number), 0;
}

/* o: the seven arrays of a batch; the tokens that count are then listed by keep_targets */
static int pass_args(training_pass *pass, TrainerObject *self, PyObject *const o[7], const char *recompute) {
    ql_llama_training *call = &pass->call;
    call->model = &self->llama->model;
    call->gradients = ql_data(self->gradients);
    call->dropout = self->dropout, call->seed = self->seed;
    return recompute_arg(&call->recompute, recompute) &&
           ql_rope_arg(&call->batch.cos, &call->batch.sin, &call->positions, o[5], o[6], call->model->d) &&
           ql_batch_arg(&call->batch, &pass->rows, o, self->llama->vocabulary, call->positions, -1) && check_whole(&call->batch);
}

/* ---- passes --------------------------------------------------------------------------------------------------------- */

static ql_status run(TrainerObject *self, training_pass *pass) {
    const ql_backend *be = ql_llama_backend(self->llama);
    int64_t floats = ql_llama_training_workspace(&pass->call);
    ql_status status = QL_OK;
    if (floats > self->floats) {
        be->release(self->workspace);
        self->workspace = NULL, self->floats = 0;
        status = be->alloc((void **)&self->workspace, (size_t)floats * sizeof(float));
        if (status == QL_OK) { self->floats = floats; }
    }
    return status == QL_OK ? ql_llama_accumulate(pass->losses, &pass->call, self->workspace, be) : status;
}

/* the sum of the losses, in one order */
static PyObject *run_pass(TrainerObject *self, training_pass *pass) {
    if (pass->call.count == 0) { return PyFloat_FromDouble(0.0); }
    if (self->running) { return PyErr_Format(PyExc_ValueError, "accumulate: this trainer is in a pass on another thread"); }
    self->running = 1;
    int stopped;
    ql_status status;
    QL_CALL_BEGIN
    status = run(self, pass);
    QL_CALL_END(stopped)
    self->running = 0;
    if (stopped || status != QL_OK) { return ql_raise(stopped ? QL_EINTERRUPT : status); }
    double sum = 0.0;
    for (int64_t i = 0; i < pass->call.count; i++) { sum += pass->losses[i]; }
    return PyFloat_FromDouble(sum);
}

static PyObject *trainer_accumulate(PyObject *object, PyObject *arguments) {
    TrainerObject *self = (TrainerObject *)object;
    PyObject *o[7], *targets_object;
    const char *recompute;
    float factor;
    long long number;
    training_pass pass = {.rows = NULL};
    if (!PyArg_ParseTuple(arguments, "OOOOOOOOfLs", &o[0], &o[1], &o[2], &o[3], &o[4], &o[5], &o[6], &targets_object, &factor,
                          &number, &recompute)) {
        return NULL;
    }
    if (self->head == NULL) { return PyErr_Format(PyExc_ValueError, "head: this trainer was made without one"); }
    const ql_weight *head = &self->head->weight;
    PyArrayObject *targets = ql_array(targets_object, "targets", NPY_INT32, 1);
    if (targets == NULL || !check_number(number)) { return NULL; }
    pass.call.head = head, pass.call.factor = factor, pass.call.call = number;
    PyObject *result = NULL;
    if (pass_args(&pass, self, o, recompute) && ql_check_targets(targets, "targets", pass.call.batch.t, head->n) &&
        keep_targets(&pass, NULL, ql_data(targets), pass.call.batch.t)) {
        result = run_pass(self, &pass);
    }
    free_pass(&pass);
    return result;
}

/* the rows that a classifier reads: of the batch, and in order, so that each is there once */
static int check_pooled(PyArrayObject *pooled, int64_t t) {
    const int32_t *rows = ql_data(pooled);
    for (int64_t i = 0; i < ql_dim(pooled, 0); i++) {
        if (rows[i] < (i > 0 ? rows[i - 1] + 1 : 0) || rows[i] >= t) {
            return PyErr_Format(PyExc_ValueError, "pooled: got %d, expected rows of the %lld tokens in ascending order", rows[i],
                                (long long)t), 0;
        }
    }
    return 1;
}

static int score_args(ql_weight *score, float **gradient, PyObject *values_object, PyObject *gradient_object, int64_t c) {
    PyArrayObject *values = ql_array(values_object, "score", NPY_FLOAT32, 2);
    PyArrayObject *into = values == NULL ? NULL : ql_array(gradient_object, "score_gradient", NPY_FLOAT32, 2);
    if (into == NULL || !ql_check_dim(values, "score", 1, c) || !ql_check_dim(into, "score_gradient", 0, ql_dim(values, 0)) ||
        !ql_check_dim(into, "score_gradient", 1, c)) {
        return 0;
    }
    if (!PyArray_ISWRITEABLE(into)) { return PyErr_Format(PyExc_ValueError, "score_gradient: not writeable"), 0; }
    if (ql_dim(values, 0) < 1) { return PyErr_Format(PyExc_ValueError, "score: it has no rows"), 0; }
    *score = ql_float_matrix(ql_data(values), ql_dim(values, 0), c);
    *gradient = ql_data(into);
    return 1;
}

static PyObject *trainer_accumulate_pooled(PyObject *object, PyObject *arguments) {
    TrainerObject *self = (TrainerObject *)object;
    PyObject *o[7], *pooled_object, *labels_object, *score_object, *gradient_object;
    const char *recompute;
    float factor;
    long long number;
    ql_weight score;
    training_pass pass = {.rows = NULL};
    if (!PyArg_ParseTuple(arguments, "OOOOOOOOOOOfLs", &o[0], &o[1], &o[2], &o[3], &o[4], &o[5], &o[6], &pooled_object,
                          &labels_object, &score_object, &gradient_object, &factor, &number, &recompute) ||
        !score_args(&score, &pass.call.head_gradient, score_object, gradient_object, self->llama->model.c)) {
        return NULL;
    }
    PyArrayObject *pooled = ql_array(pooled_object, "pooled", NPY_INT32, 1);
    PyArrayObject *labels = pooled == NULL ? NULL : ql_array(labels_object, "labels", NPY_INT32, 1);
    if (labels == NULL || !check_number(number)) { return NULL; }
    pass.call.head = &score, pass.call.factor = factor, pass.call.call = number;
    PyObject *result = NULL;
    if (pass_args(&pass, self, o, recompute) && check_pooled(pooled, pass.call.batch.t) &&
        ql_check_targets(labels, "labels", ql_dim(pooled, 0), score.n) &&
        keep_targets(&pass, ql_data(pooled), ql_data(labels), ql_dim(pooled, 0))) {
        result = run_pass(self, &pass);
    }
    free_pass(&pass);
    return result;
}

/* activation_bytes(t, recompute) */
static PyObject *trainer_activation_bytes(PyObject *object, PyObject *arguments) {
    TrainerObject *self = (TrainerObject *)object;
    const ql_llama *m = &self->llama->model;
    long long t;
    const char *recompute;
    ql_weight none = {.n = 1};
    ql_llama_training call = {.model = m, .dropout = self->dropout, .head = self->head != NULL ? &self->head->weight : &none};
    if (!PyArg_ParseTuple(arguments, "Ls", &t, &recompute) || !recompute_arg(&call.recompute, recompute)) { return NULL; }
    if (t < 0 || t > INT32_MAX) { return PyErr_Format(PyExc_ValueError, "t: got %lld, expected 0 to 2^31 - 1", t); }
    call.batch.t = call.count = call.positions = t;
    return PyLong_FromLongLong((long long)ql_llama_training_workspace(&call) * (long long)sizeof(float));
}

static PyMethodDef trainer_methods[] = {
    {"accumulate", trainer_accumulate, METH_VARARGS,
     "accumulate(input_ids (t,), positions (t,), q_start (b+1,), kv_start (b,), kv_len (b,), cos, sin, targets (t,), factor, "
     "call, recompute) -> sum of the losses; gradients += those of factor times it"},
    {"accumulate_pooled", trainer_accumulate_pooled, METH_VARARGS,
     "accumulate_pooled(input_ids (t,), positions (t,), q_start (b+1,), kv_start (b,), kv_len (b,), cos, sin, pooled (s,), "
     "labels (s,), score (classes, c), score_gradient (classes, c), factor, call, recompute) -> sum of the losses of the rows `pooled`"},
    {"activation_bytes", trainer_activation_bytes, METH_VARARGS,
     "activation_bytes(t, recompute) -> bytes that a pass over t tokens works in"},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "Trainer(llama, head, gradients, *, dropout=0.0, seed=0): gradients of the adapter of a model"},
    {Py_tp_new, __extension__(void *)trainer_new},
    {Py_tp_dealloc, __extension__(void *)trainer_dealloc},
    {Py_tp_methods, trainer_methods},
    {0, NULL},
};
static PyType_Spec spec = {"quantlab._core.Trainer", sizeof(TrainerObject), 0, Py_TPFLAGS_DEFAULT, slots};

int ql_register_training(PyObject *module) {
    PyObject *type = PyType_FromSpec(&spec);
    if (type == NULL) { return -1; }
    int status = PyModule_AddObjectRef(module, "Trainer", type);
    Py_DECREF(type);
    return status;
}
