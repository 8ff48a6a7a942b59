/* status.c: the thread's last error detail. */
#include "../quantlab.h"

#include <stdarg.h> /* va_list */
#include <stdio.h>  /* vsnprintf */

static _Thread_local char detail[512];

ql_status ql_fail(ql_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(detail, sizeof detail, format, arguments);
    va_end(arguments);
    return status;
}

const char *ql_status_detail(void) { return detail; }
