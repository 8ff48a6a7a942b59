/* pack.h: the packed copy of a weight that the CPU's decode kernels stream (formats/packed.h). */
#ifndef QL_PACK_H
#define QL_PACK_H

#include "../formats/packed.h"

/* Makes w->packed where the selected ISA reads one in products of m rows and it is not there yet. Threads may ask for the same weight at
 * once. Without memory, or once the call was stopped, the weight stays as it is: products then decode it. */
void ql_weight_pack(ql_weight *w, int64_t m);
void ql_weight_unpack(ql_weight *w); /* releases it */

#endif
