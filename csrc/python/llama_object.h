/* llama_object.h: _core.Llama and _core.Adapter as py_llama.c and py_adapter.c make them and others use them. */
#ifndef QL_LLAMA_OBJECT_H
#define QL_LLAMA_OBJECT_H

#include "python.h"

#include "../model/llama.h"

/* a matrix of the model: where the model points to it, and its copy on the device */
typedef struct {
    WeightObject *object;
    const ql_weight **slot;
    ql_placed *placed;
} ql_llama_matrix;

typedef struct {
    PyObject_HEAD
    ql_llama model; /* pointers of the backend */
    ql_llama_layer *layer;
    int64_t vocabulary;
    PyObject *parts;      /* tuple that keeps weights and gains alive */
    const ql_backend *be; /* NULL: the CPU, with the ISA selected at the call */
    ql_llama_matrix *matrix;
    int64_t matrices;
    float *gains; /* of all norms, on the device */
    PyObject *adapter; /* NULL: none */
    ql_lora *lora;     /* (layers, QL_SLOTS) of the adapter */
    float *adapter_memory; /* its parameters on the device */
} LlamaObject;

static inline const ql_backend *ql_llama_backend(const LlamaObject *self) { return self->be != NULL ? self->be : ql_cpu(); }

/* a step of generation on the CPU: its products read packed weights (py_llama.c; without the GIL) */
void ql_llama_pack(const ql_llama *m, int64_t rows);

/* llama_device.c; all without the GIL */
ql_status ql_llama_place(LlamaObject *self); /* weights and gains go to self->be */
void ql_llama_unplace(LlamaObject *self);

/* One array of host arrays, laid out for one upload: parts begin 256 bytes apart. */
enum { QL_BUNDLE_PARTS = 12 };
typedef struct {
    const void *from[QL_BUNDLE_PARTS];
    size_t bytes[QL_BUNDLE_PARTS], offset[QL_BUNDLE_PARTS];
    int count;
    size_t total;
    char *memory; /* of the backend */
} ql_bundle;
int ql_bundle_add(ql_bundle *bundle, const void *from, size_t bytes); /* its number; from NULL: only room */
ql_status ql_bundle_upload(ql_bundle *bundle, const ql_backend *be);
void *ql_bundle_at(const ql_bundle *bundle, int part);

/* batch of the host -> `on` of the backend, whose arrays lie in *bundle behind what the caller has added, all uploaded at once; the
 * caller releases it. positions: rows of cos and sin */
ql_status ql_batch_upload(ql_llama_batch *on, ql_bundle *bundle, const ql_llama_batch *batch, int64_t positions, int64_t d,
                          const ql_backend *be);

/* py_adapter.c */
typedef struct {
    int64_t layer, slot, r, a_at, b_at;
    float scale;
} ql_adapter_part;

typedef struct {
    PyObject_HEAD
    PyArrayObject *parameters; /* float32 (floats,), of the caller */
    ql_adapter_part *part;
    int64_t parts;
} AdapterObject;

int ql_adapter_attach(LlamaObject *self, PyObject *adapter); /* 0 with an error */
ql_status ql_adapter_place(LlamaObject *self);               /* the parameters go to self->be; without the GIL */

/* py_llama.c: parses and checks (with the GIL). o: input_ids, positions, q_start, kv_start, kv_len; cache_rows < 0: none.
 * rows is made with PyMem_RawMalloc: the caller frees it. 0 with an error. */
int ql_batch_arg(ql_llama_batch *batch, int32_t **rows, PyObject *const o[5], int64_t vocabulary, int64_t positions,
                 int64_t cache_rows);
int ql_rope_arg(const float **cos, const float **sin, int64_t *positions, PyObject *cos_object, PyObject *sin_object, int64_t d);

/* every one of `targets` (t,) a class or QL_IGNORED; 0 with an error */
enum { QL_IGNORED = -100 };
int ql_check_targets(PyArrayObject *targets, const char *name, int64_t t, int64_t classes);

extern PyTypeObject *ql_llama_type;

#endif
