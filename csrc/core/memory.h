/* memory.h: the host's part as a device: what QL_DEVICE_OPS means where ops read the host's own memory. */
#ifndef QL_MEMORY_H
#define QL_MEMORY_H

#include "../quantlab.h"

#define X(result, op, params) result ql_host_##op params;
QL_DEVICE_OPS(X)
#undef X

#endif
