/* stage.c: host arrays where the selected backend can use them. On the CPU they are used as they are. On a device inputs
 * are copied to it and outputs back, between guard words and first filled with NaN: an op that writes beyond its output
 * fails, and one that leaves a part of it unwritten shows. */
#include "python.h"

enum { GUARD_BYTES = 256, GUARD = 0xa5, UNWRITTEN = 0xff };

void ql_stage_begin_on(ql_stage *s, const ql_backend *be) {
    *s = (ql_stage){.be = be, .status = QL_OK};
    s->staged = be != ql_cpu();
    if (s->staged) { s->status = s->begun = s->be->begin(s->be->device); }
}

void ql_stage_begin(ql_stage *s) { ql_stage_begin_on(s, ql_selected()); }

static ql_staged *stage(ql_stage *s, const void *host, size_t bytes, int output) {
    if (s->count == QL_STAGED_ARRAYS) {
        s->status = ql_fail(QL_EVALUE, "an op with more than %d arrays", QL_STAGED_ARRAYS);
        return NULL;
    }
    ql_staged *part = &s->part[s->count];
    *part = (ql_staged){.host = (void *)host, .bytes = bytes, .output = output};
    s->status = s->be->alloc(&part->memory, bytes + 2 * GUARD_BYTES);
    if (s->status != QL_OK) { return NULL; }
    s->count++;
    return part;
}

static void *inside(const ql_staged *part) { return (char *)part->memory + GUARD_BYTES; }

const void *ql_stage_in(ql_stage *s, const void *host, size_t bytes) {
    if (!s->staged || host == NULL || s->status != QL_OK) { return host; }
    ql_staged *part = stage(s, host, bytes, 0);
    if (part == NULL) { return NULL; }
    s->status = s->be->upload(inside(part), host, bytes);
    return inside(part);
}

void *ql_stage_out(ql_stage *s, void *host, size_t bytes, int keep) {
    if (!s->staged || host == NULL || s->status != QL_OK) { return host; }
    ql_staged *part = stage(s, host, bytes, 1);
    if (part == NULL) { return NULL; }
    s->status = s->be->fill(part->memory, GUARD, bytes + 2 * GUARD_BYTES);
    if (s->status == QL_OK) { s->status = keep ? s->be->upload(inside(part), host, bytes) : s->be->fill(inside(part), UNWRITTEN, bytes); }
    return inside(part);
}

const ql_weight *ql_stage_weight(ql_stage *s, PyObject *object) {
    WeightObject *weight = (WeightObject *)object;
    if (!s->staged || s->status != QL_OK) { return &weight->weight; }
    ql_placed *placed = ql_place(weight, s->be);
    if (placed == NULL) {
        s->status = QL_ECUDA;
        return NULL;
    }
    if (!placed->kept) { placed->kept = 1, placed->users++; } /* the next op finds it; it goes with the weight */
    ql_unplace(weight, placed);
    return &placed->weight;
}

int ql_stage_ready(ql_stage *s, int present, const char *op) {
    if (s->status == QL_OK && !present) { s->status = ql_fail(QL_ECUDA, "%s has no kernel on %s", op, s->be->name); }
    return s->status == QL_OK;
}

static ql_status guards_intact(const ql_stage *s, const ql_staged *part) {
    unsigned char guard[2][GUARD_BYTES];
    ql_status status = s->be->download(guard[0], part->memory, GUARD_BYTES);
    if (status == QL_OK) { status = s->be->download(guard[1], (char *)inside(part) + part->bytes, GUARD_BYTES); }
    for (int i = 0; i < 2 * GUARD_BYTES && status == QL_OK; i++) {
        if (guard[i / GUARD_BYTES][i % GUARD_BYTES] != GUARD) { status = ql_fail(QL_ECUDA, "a kernel wrote beyond its output"); }
    }
    return status;
}

ql_status ql_stage_end(ql_stage *s) {
    if (!s->staged || s->begun != QL_OK) { return s->status; }
    for (int i = 0; i < s->count; i++) {
        const ql_staged *part = &s->part[i];
        if (part->output && s->status == QL_OK) { s->status = guards_intact(s, part); }
        if (part->output && s->status == QL_OK) { s->status = s->be->download(part->host, inside(part), part->bytes); }
        s->be->release(part->memory);
    }
    ql_status first = s->be->end(); /* it is the cause of what came after */
    return first != QL_OK ? first : s->status;
}
