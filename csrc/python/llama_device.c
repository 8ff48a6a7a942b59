/* llama_device.c: a model's weights and a batch's arrays on the backend that runs it. */
#include "llama_object.h"

#include <string.h> /* memcpy */

enum { PART_ALIGNMENT = 256, GAIN_ALIGNMENT = 64 };

static ql_status place_gains(LlamaObject *self) {
    ql_llama *m = &self->model;
    int64_t step = (m->c + GAIN_ALIGNMENT - 1) / GAIN_ALIGNMENT * GAIN_ALIGNMENT;
    ql_status status = self->be->alloc((void **)&self->gains, (size_t)((2 * m->layers + 1) * step) * sizeof(float));
    for (int64_t i = 0; i < 2 * m->layers + 1 && status == QL_OK; i++) {
        const float **slot = i == 2 * m->layers ? &m->norm : i % 2 ? &self->layer[i / 2].post_norm : &self->layer[i / 2].input_norm;
        status = self->be->upload(self->gains + i * step, *slot, (size_t)m->c * sizeof(float));
        *slot = self->gains + i * step;
    }
    return status;
}

ql_status ql_llama_place(LlamaObject *self) {
    ql_status status = self->be->begin(self->be->device);
    if (status != QL_OK) { return status; }
    status = place_gains(self);
    if (status == QL_OK) { status = ql_adapter_place(self); }
    for (int64_t i = 0; i < self->matrices && status == QL_OK && !ql_call_stopped(); i++) {
        ql_llama_matrix *matrix = &self->matrix[i];
        matrix->placed = ql_place(matrix->object, self->be);
        if (matrix->placed == NULL) {
            status = QL_ECUDA;
        } else {
            *matrix->slot = &matrix->placed->weight;
        }
    }
    if (status == QL_OK) { status = self->be->finish(); }
    ql_status first = self->be->end();
    return first != QL_OK ? first : status;
}

void ql_llama_unplace(LlamaObject *self) {
    if (self->be == NULL || self->be->begin(self->be->device) != QL_OK) { return; }
    for (int64_t i = 0; i < self->matrices; i++) {
        if (self->matrix[i].placed != NULL) { ql_unplace(self->matrix[i].object, self->matrix[i].placed); }
        self->matrix[i].placed = NULL;
    }
    self->be->release(self->gains);
    self->be->release(self->adapter_memory);
    self->gains = self->adapter_memory = NULL;
    (void)self->be->end();
}

int ql_bundle_add(ql_bundle *bundle, const void *from, size_t bytes) {
    int part = bundle->count++;
    bundle->from[part] = from;
    bundle->bytes[part] = bytes;
    bundle->offset[part] = bundle->total;
    bundle->total += (bytes + PART_ALIGNMENT - 1) / PART_ALIGNMENT * PART_ALIGNMENT;
    return part;
}

ql_status ql_bundle_upload(ql_bundle *bundle, const ql_backend *be) {
    char *host = PyMem_RawCalloc(1, bundle->total + 1);
    if (host == NULL) { return ql_fail(QL_ENOMEM, "out of memory"); }
    for (int i = 0; i < bundle->count; i++) {
        if (bundle->from[i] != NULL) { memcpy(host + bundle->offset[i], bundle->from[i], bundle->bytes[i]); }
    }
    ql_status status = be->alloc((void **)&bundle->memory, bundle->total + 1);
    if (status == QL_OK) { status = be->upload(bundle->memory, host, bundle->total); }
    PyMem_RawFree(host);
    return status;
}

void *ql_bundle_at(const ql_bundle *bundle, int part) { return bundle->memory + bundle->offset[part]; }

ql_status ql_batch_upload(ql_llama_batch *on, ql_bundle *bundle, const ql_llama_batch *batch, int64_t positions, int64_t d,
                          const ql_backend *be) {
    size_t t = (size_t)batch->t, b = (size_t)batch->b, table = (size_t)(positions * (d / 2)) * sizeof(float);
    int ids = ql_bundle_add(bundle, batch->ids, t * sizeof *batch->ids);
    int where = ql_bundle_add(bundle, batch->positions, t * sizeof *batch->positions);
    int rows = ql_bundle_add(bundle, batch->rows, t * sizeof *batch->rows);
    int q_start = ql_bundle_add(bundle, batch->q_start, (b + 1) * sizeof *batch->q_start);
    int kv_start = ql_bundle_add(bundle, batch->kv_start, b * sizeof *batch->kv_start);
    int kv_len = ql_bundle_add(bundle, batch->kv_len, b * sizeof *batch->kv_len);
    int cos = ql_bundle_add(bundle, batch->cos, table), sin = ql_bundle_add(bundle, batch->sin, table);
    ql_status status = ql_bundle_upload(bundle, be);
    if (status != QL_OK) { return status; }
    *on = *batch;
    on->ids = ql_bundle_at(bundle, ids), on->positions = ql_bundle_at(bundle, where), on->rows = ql_bundle_at(bundle, rows);
    on->q_start = ql_bundle_at(bundle, q_start), on->kv_start = ql_bundle_at(bundle, kv_start);
    on->kv_len = ql_bundle_at(bundle, kv_len), on->cos = ql_bundle_at(bundle, cos), on->sin = ql_bundle_at(bundle, sin);
    return QL_OK;
}
