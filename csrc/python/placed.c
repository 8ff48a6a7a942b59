/* placed.c: the copies of a weight on devices: made when a model or an op first asks, released with the last user. */
#include "python.h"

ql_placed *ql_place(WeightObject *weight, const ql_backend *be) {
    for (ql_placed *placed = weight->placed; placed != NULL; placed = placed->next) {
        if (placed->be == be) { return placed->users++, placed; }
    }
    ql_placed *placed = PyMem_RawCalloc(1, sizeof *placed);
    if (placed == NULL) { return ql_fail(QL_ENOMEM, "out of memory"), NULL; }
    if (be->weight_upload(&placed->weight, &weight->weight) != QL_OK) { return PyMem_RawFree(placed), NULL; }
    if (ql_call_stopped()) { /* its upload may be a part only */
        be->weight_release(&placed->weight);
        PyMem_RawFree(placed);
        return ql_fail(QL_EINTERRUPT, "stopped"), NULL;
    }
    placed->be = be;
    placed->users = 1;
    placed->next = weight->placed;
    weight->placed = placed;
    return placed;
}

static void release(WeightObject *weight, ql_placed *placed) {
    ql_placed **place = &weight->placed;
    while (*place != placed) { place = &(*place)->next; }
    *place = placed->next;
    placed->be->weight_release(&placed->weight);
    PyMem_RawFree(placed);
}

void ql_unplace(WeightObject *weight, ql_placed *placed) {
    if (--placed->users == 0) { release(weight, placed); }
}

void ql_unplace_all(WeightObject *weight) {
    while (weight->placed != NULL) {
        const ql_backend *be = weight->placed->be;
        if (be->begin(be->device) != QL_OK) { return; } /* the device is lost, and its memory with it */
        release(weight, weight->placed);
        (void)be->end();
    }
}
