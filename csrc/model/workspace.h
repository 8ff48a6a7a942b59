/* workspace.h: one piece of memory, cut into the buffers of a pass. Cut with memory NULL, it tells the size that is needed. */
#ifndef QL_WORKSPACE_H
#define QL_WORKSPACE_H

#include "../quantlab.h"

enum { QL_WORKSPACE_ALIGNMENT = 64 }; /* floats: each buffer begins on a cache line of any backend */

typedef struct {
    float *memory;
    int64_t used; /* floats */
} ql_workspace;

static inline float *ql_take(ql_workspace *w, int64_t count) {
    float *part = w->memory != NULL ? w->memory + w->used : NULL;
    w->used += (count + QL_WORKSPACE_ALIGNMENT - 1) / QL_WORKSPACE_ALIGNMENT * QL_WORKSPACE_ALIGNMENT;
    return part;
}

#endif
