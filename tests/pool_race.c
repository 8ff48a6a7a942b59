/* pool_race.c: the pool of csrc/core/parallel.c under ThreadSanitizer, without Python (test_threads.py compiles and runs it).
 * Three callers at once begin thousands of regions of 0 to 40 tasks, some of which begin a region of their own, while the
 * number of threads changes. Every task must have run exactly once, and all it wrote must be seen by its caller. */
#include "../csrc/quantlab.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

enum { CALLERS = 3, REGIONS = 1500, TASKS = 40, INNER = 5 };

typedef struct {
    int runs[TASKS]; /* plain memory: the sanitizer sees every race on it */
    int inner[TASKS][INNER];
} record;

static void fail(const char *what) {
    puts(what);
    exit(1);
}

static void inner_task(void *context, int64_t i) { ((int *)context)[i]++; }

static void task(void *context, int64_t i) {
    record *r = context;
    r->runs[i]++;
    if (i % 8 == 0) { ql_parallel_for(INNER, inner_task, r->inner[i]); }
}

static int never(void) { return 0; }

static void *caller(void *number) {
    unsigned state = 17u + (unsigned)(size_t)number;
    for (int region = 0; region < REGIONS; region++) {
        record r = {{0}, {{0}}};
        state = state * 1664525u + 1013904223u;
        int64_t count = (state >> 16) % (TASKS + 1);
        if (state >> 28 == 0) { ql_set_threads(1 + (int)(state >> 20 & 3)); }
        ql_call_begin(never);
        ql_parallel_for(count, task, &r);
        if (ql_call_end()) { fail("stopped"); }
        for (int64_t i = 0; i < TASKS; i++) {
            if (r.runs[i] != (i < count)) { fail("a task did not run exactly once"); }
            for (int64_t j = 0; j < INNER; j++) {
                if (r.inner[i][j] != (i < count && i % 8 == 0)) { fail("an inner task did not run exactly once"); }
            }
        }
    }
    return NULL;
}

static int stop_at_once(void) { return 1; }
static void count_task(void *context, int64_t i) { (void)i, __atomic_fetch_add((int64_t *)context, 1, __ATOMIC_RELAXED); }

int main(void) {
    pthread_t threads[CALLERS];
    ql_set_threads(3);
    for (size_t i = 0; i < CALLERS; i++) { pthread_create(&threads[i], NULL, caller, (void *)i); }
    for (size_t i = 0; i < CALLERS; i++) { pthread_join(threads[i], NULL); }
    int64_t ran = 0;
    ql_call_begin(stop_at_once);
    while (!ql_call_stopped()) {} /* a poll every 50 ms */
    ql_parallel_for(1000, count_task, &ran);
    if (!ql_call_end() || ran != 0) { fail("a stopped call went on"); }
    puts("ok");
    return 0;
}
