/* overlay.h: each ISA group exports one function that puts its kernels over the table below it. setup.py defines
 * QL_BUILT_<ISA> where the compiler could build the group. */
#ifndef QL_X86_OVERLAY_H
#define QL_X86_OVERLAY_H

#include "../quantlab.h"

void ql_overlay_avx2(ql_backend *table);
void ql_overlay_avx512(ql_backend *table);

#endif
