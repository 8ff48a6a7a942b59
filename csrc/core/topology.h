/* topology.h: what of the machine this process may use. */
#ifndef QL_TOPOLOGY_H
#define QL_TOPOLOGY_H

/* Cores that this process may run on at once: its affinity mask, or the CPU time that its control groups grant, rounded up,
 * where that is less. At least 1. */
int ql_usable_cores(void);

#endif
