/* gptq_args.h: what is checked of GPTQ's arguments wherever it runs (py_gptq.c). 0 with an error. */
#ifndef QL_GPTQ_ARGS_H
#define QL_GPTQ_ARGS_H

#include "python.h"

#include "../quant/gptq.h"

int ql_gptq_check_order(PyArrayObject *order, int64_t k); /* a permutation of the columns */
int ql_gptq_check_options(const ql_gptq_problem *problem, const ql_gptq_options *options); /* sizes, group and order set */

#endif
