/* py_training.c: _core.Trainer: the gradient of a model's adapter, pass by pass, in memory that it keeps, and steps of AdamW.
 * Where the model is on a device, the parameters, their gradients and AdamW's moments are there too, and the arrays of the
 * caller hold what `read` brought last. */
#include "llama_object.h"

#include <math.h> /* sqrt */

enum { GRADIENTS, MEAN, SQUARE, STATES }; /* vectors as long as the parameters */

typedef struct {
    PyObject_HEAD
    LlamaObject *llama;
    WeightObject *head;       /* NULL: it has none */
    ql_placed *placed_head;   /* NULL on the CPU */
    PyArrayObject *gradients; /* float32 (floats,) like the adapter's parameters, of the caller */
    float *on_device[STATES]; /* NULL on the CPU */
    float dropout;
    uint64_t seed;
    float *workspace;
    int64_t floats; /* of workspace */
    int running;    /* a thread is in a pass: its memory is in use */
} TrainerObject;

static const char *const recompute_names[] = {"none", "selective", "full"};

static size_t state_bytes(const TrainerObject *self) { return ql_nbytes(self->gradients); }

/* what the passes and steps of a model on a device need there */
static ql_status place(TrainerObject *self) {
    const ql_backend *be = self->llama->be;
    ql_status status = be->begin(be->device);
    if (status != QL_OK) { return status; }
    for (int i = 0; i < STATES && status == QL_OK; i++) {
        status = be->alloc((void **)&self->on_device[i], state_bytes(self));
        if (status == QL_OK) { status = be->fill(self->on_device[i], 0, state_bytes(self)); }
    }
    if (status == QL_OK && self->head != NULL && (self->placed_head = ql_place(self->head, be)) == NULL) { status = QL_ECUDA; }
    ql_status first = be->end();
    return first != QL_OK ? first : status;
}

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
    if (self->llama->be == NULL) { return (PyObject *)self; }
    int stopped;
    ql_status status;
    QL_CALL_BEGIN
    status = place(self);
    QL_CALL_END(stopped)
    if (stopped || status != QL_OK) { return Py_DECREF(self), ql_raise(stopped ? QL_EINTERRUPT : status); }
    return (PyObject *)self;
}

/* the memory of the backend */
static void release(TrainerObject *self) {
    const ql_backend *be = ql_llama_backend(self->llama);
    if (be->begin(be->device) != QL_OK) { return; }
    be->release(self->workspace);
    for (int i = 0; i < STATES; i++) { be->release(self->on_device[i]); }
    if (self->placed_head != NULL) { ql_unplace(self->head, self->placed_head); }
    (void)be->end();
}

static void trainer_dealloc(TrainerObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    Py_BEGIN_ALLOW_THREADS
    release(self);
    Py_END_ALLOW_THREADS
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
    call->gradients = self->llama->be != NULL ? self->on_device[GRADIENTS] : ql_data(self->gradients);
    call->dropout = self->dropout, call->seed = self->seed;
    return recompute_arg(&call->recompute, recompute) &&
           ql_rope_arg(&call->batch.cos, &call->batch.sin, &call->positions, o[5], o[6], call->model->d) &&
           ql_batch_arg(&call->batch, &pass->rows, o, self->llama->vocabulary, call->positions, -1) && check_whole(&call->batch);
}

/* ---- passes --------------------------------------------------------------------------------------------------------- */

static ql_status grow_workspace(TrainerObject *self, int64_t floats, const ql_backend *be) {
    if (floats <= self->floats) { return QL_OK; }
    be->release(self->workspace);
    self->workspace = NULL, self->floats = 0;
    ql_status status = be->alloc((void **)&self->workspace, (size_t)floats * sizeof(float));
    if (status == QL_OK) { self->floats = floats; }
    return status;
}

static ql_status run(TrainerObject *self, training_pass *pass) {
    const ql_backend *be = ql_llama_backend(self->llama);
    ql_llama_training call = pass->call;
    ql_bundle arrays = {.count = 0};
    size_t items = (size_t)call.count;
    ql_status status = be->begin(be->device);
    if (status != QL_OK) { return status; }
    int kept = ql_bundle_add(&arrays, pass->kept, items * sizeof *pass->kept);
    int targets = ql_bundle_add(&arrays, pass->targets, items * sizeof *pass->targets);
    int losses = ql_bundle_add(&arrays, NULL, items * sizeof *pass->losses);
    status = ql_batch_upload(&call.batch, &arrays, &pass->call.batch, call.positions, call.model->d, be);
    if (status == QL_OK) { status = grow_workspace(self, ql_llama_training_workspace(&call, be), be); }
    if (status == QL_OK) {
        call.kept = ql_bundle_at(&arrays, kept), call.targets = ql_bundle_at(&arrays, targets);
        status = ql_llama_accumulate(ql_bundle_at(&arrays, losses), &call, self->workspace, be);
    }
    if (status == QL_OK) { status = be->download(pass->losses, ql_bundle_at(&arrays, losses), items * sizeof *pass->losses); }
    be->release(arrays.memory);
    ql_status first = be->end();
    return first != QL_OK ? first : status;
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
    const ql_weight *head = self->placed_head != NULL ? &self->placed_head->weight : &self->head->weight;
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

/* On a device a head is a part of the adapter's parameters, its gradient the same part of theirs: both go to those there. */
static int place_score(const TrainerObject *self, ql_weight *score, float **gradient) {
    if (self->llama->be == NULL) { return 1; }
    PyArrayObject *parameters = ((AdapterObject *)self->llama->adapter)->parameters;
    uintptr_t from = (uintptr_t)ql_data(parameters), head = (uintptr_t)score->codes;
    size_t bytes = (size_t)(score->n * score->k) * sizeof(float);
    if (head < from || bytes > ql_nbytes(parameters) || head - from > ql_nbytes(parameters) - bytes ||
        (uintptr_t)*gradient - (uintptr_t)ql_data(self->gradients) != head - from) {
        return PyErr_Format(PyExc_ValueError, "score, score_gradient: on a device they are the same part of the adapter's parameters "
                                              "and of the gradients"), 0;
    }
    size_t at = (head - from) / sizeof(float);
    score->codes = self->llama->adapter_memory + at;
    *gradient = self->on_device[GRADIENTS] + at;
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
        !score_args(&score, &pass.call.head_gradient, score_object, gradient_object, self->llama->model.c) ||
        !place_score(self, &score, &pass.call.head_gradient)) {
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
    return PyLong_FromLongLong((long long)ql_llama_training_workspace(&call, ql_llama_backend(self->llama)) * (long long)sizeof(float));
}

/* ---- steps ---------------------------------------------------------------------------------------------------------- */

/* mean, square: like the gradients; 0 with an error */
static int moments_arg(const TrainerObject *self, float *moments[2], PyObject *mean_object, PyObject *square_object) {
    static const char *const names[] = {"mean", "square"};
    PyObject *const objects[] = {mean_object, square_object};
    for (int i = 0; i < 2; i++) {
        PyArrayObject *array = ql_array(objects[i], names[i], NPY_FLOAT32, 1);
        if (array == NULL || !ql_check_dim(array, names[i], 0, ql_dim(self->gradients, 0))) { return 0; }
        if (!PyArray_ISWRITEABLE(array)) { return PyErr_Format(PyExc_ValueError, "%s: not writeable", names[i]), 0; }
        moments[i] = ql_data(array);
    }
    return 1;
}

static float *host_parameters(const TrainerObject *self) { return ql_data(((AdapterObject *)self->llama->adapter)->parameters); }

/* zero(): the gradients */
static PyObject *trainer_zero(PyObject *object, PyObject *none) {
    (void)none;
    TrainerObject *self = (TrainerObject *)object;
    const ql_backend *be = ql_llama_backend(self->llama);
    ql_status status, first;
    Py_BEGIN_ALLOW_THREADS
    status = be->begin(be->device);
    if (status == QL_OK) {
        status = be->fill(self->llama->be != NULL ? self->on_device[GRADIENTS] : ql_data(self->gradients), 0, state_bytes(self));
        first = be->end();
        status = first != QL_OK ? first : status;
    }
    Py_END_ALLOW_THREADS
    return ql_finish(Py_NewRef(Py_None), 0, status);
}

/* the vectors of the host and of the device, in one direction */
static ql_status exchange(const TrainerObject *self, float *const moments[2], int to_host) {
    const ql_backend *be = self->llama->be;
    float *const host[] = {host_parameters(self), ql_data(self->gradients), moments[0], moments[1]};
    float *const there[] = {self->llama->adapter_memory, self->on_device[GRADIENTS], self->on_device[MEAN], self->on_device[SQUARE]};
    if (be == NULL) { return QL_OK; }
    ql_status status = be->begin(be->device);
    if (status != QL_OK) { return status; }
    for (int i = 0; i < 4 && status == QL_OK; i++) {
        status = to_host ? be->download(host[i], there[i], state_bytes(self)) : be->upload(there[i], host[i], state_bytes(self));
    }
    ql_status first = be->end();
    return first != QL_OK ? first : status;
}

static PyObject *move(TrainerObject *self, PyObject *arguments, int to_host) {
    PyObject *o[2];
    float *moments[2];
    ql_status status;
    if (!PyArg_ParseTuple(arguments, "OO", &o[0], &o[1]) || !moments_arg(self, moments, o[0], o[1])) { return NULL; }
    Py_BEGIN_ALLOW_THREADS
    ql_call_begin(NULL); /* all or nothing */
    status = exchange(self, moments, to_host);
    ql_call_end();
    Py_END_ALLOW_THREADS
    return ql_finish(Py_NewRef(Py_None), 0, status);
}

static PyObject *trainer_read(PyObject *self, PyObject *arguments) { return move((TrainerObject *)self, arguments, 1); }
static PyObject *trainer_write(PyObject *self, PyObject *arguments) { return move((TrainerObject *)self, arguments, 0); }

/* *squares: the sum of the gradients' squares */
static ql_status step_on(const TrainerObject *self, float *const moments[2], const ql_adamw_step *step, double *squares) {
    const ql_backend *be = ql_llama_backend(self->llama);
    int there = self->llama->be != NULL;
    int64_t count = ql_dim(self->gradients, 0);
    float *w = there ? self->llama->adapter_memory : host_parameters(self);
    float *m = there ? self->on_device[MEAN] : moments[0], *v = there ? self->on_device[SQUARE] : moments[1];
    const float *g = there ? self->on_device[GRADIENTS] : ql_data(self->gradients);
    double *sum = NULL;
    ql_status status = be->begin(be->device);
    if (status != QL_OK) { return status; }
    status = be->alloc((void **)&sum, sizeof *sum);
    if (status == QL_OK) {
        be->square_sum_forward(sum, g, count);
        be->adamw_forward(w, m, v, g, sum, count, step);
        status = be->download(squares, sum, sizeof *sum);
    }
    be->release(sum);
    ql_status first = be->end();
    return first != QL_OK ? first : status;
}

/* step(mean, square, lr, beta1, beta2, eps, weight_decay, step, max_norm) -> norm of the gradients */
static PyObject *trainer_step(PyObject *object, PyObject *arguments) {
    TrainerObject *self = (TrainerObject *)object;
    PyObject *o[2];
    float *moments[2];
    ql_adamw_step step;
    long long number;
    double squares = 0.0;
    ql_status status;
    if (!PyArg_ParseTuple(arguments, "OOdddddLd", &o[0], &o[1], &step.lr, &step.beta1, &step.beta2, &step.eps, &step.weight_decay,
                          &number, &step.max_norm) ||
        !moments_arg(self, moments, o[0], o[1])) {
        return NULL;
    }
    if (!ql_adamw_number(&step, number)) { return NULL; }
    Py_BEGIN_ALLOW_THREADS
    ql_call_begin(NULL); /* Ctrl-C waits: half a step would be lost */
    status = step_on(self, moments, &step, &squares);
    ql_call_end();
    Py_END_ALLOW_THREADS
    return ql_finish(PyFloat_FromDouble(sqrt(squares)), 0, status);
}

static PyMethodDef trainer_methods[] = {
    {"accumulate", trainer_accumulate, METH_VARARGS,
     "accumulate(input_ids (t,), positions (t,), q_start (b+1,), kv_start (b,), kv_len (b,), cos, sin, targets (t,), factor, "
     "call, recompute) -> sum of the losses; gradients += those of factor times it"},
    {"accumulate_pooled", trainer_accumulate_pooled, METH_VARARGS,
     "accumulate_pooled(input_ids (t,), positions (t,), q_start (b+1,), kv_start (b,), kv_len (b,), cos, sin, pooled (s,), "
     "labels (s,), score (classes, c), score_gradient (classes, c), factor, call, recompute) -> sum of the losses of the rows `pooled`"},
    {"zero", trainer_zero, METH_NOARGS, "zero(): the gradients are 0"},
    {"step", trainer_step, METH_VARARGS,
     "step(mean (floats,), square (floats,), lr, beta1, beta2, eps, weight_decay, step, max_norm) -> the norm of the gradients; a "
     "step of AdamW where the model is"},
    {"read", trainer_read, METH_VARARGS, "read(mean, square): the adapter's parameters, the gradients and the moments from the device"},
    {"write", trainer_write, METH_VARARGS, "write(mean, square): the same to the device"},
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
