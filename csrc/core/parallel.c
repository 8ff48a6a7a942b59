/* parallel.c: the one place with threads. Tasks are independent, so no result depends on the number of threads. */
#define _GNU_SOURCE
#include "../quantlab.h"

#include <omp.h>     /* parallel regions */
#include <pthread.h> /* pthread_atfork */
#include <sched.h>   /* sched_getaffinity */
#include <stdatomic.h>
#include <stdlib.h> /* getenv, strtol */
#include <time.h>   /* clock_gettime */

enum { POLL_INTERVAL_NS = 50000000 };

static atomic_int chosen_threads;   /* 0: not chosen, use the default */
static atomic_int in_forked_child;  /* libgomp's threads do not survive fork: the child computes serially */

/* The state of the call that this thread is in. Workers see it through the region's context. */
typedef struct {
    ql_poll poll;
    atomic_int stopped;
    int64_t last_poll_ns;
} call_state;

static _Thread_local call_state call;

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void mark_child(void) { atomic_store(&in_forked_child, 1); }

__attribute__((constructor)) static void register_fork_handler(void) { pthread_atfork(NULL, NULL, mark_child); }

int ql_default_threads(void) {
    const char *text = getenv("QL_THREADS");
    if (text != NULL && *text != '\0') {
        char *end;
        long value = strtol(text, &end, 10);
        if (*end == '\0' && value >= 1 && value <= 4096) { return (int)value; }
    }
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) { return CPU_COUNT(&set); }
    return 1;
}

int ql_threads(void) {
    if (atomic_load(&in_forked_child)) { return 1; }
    int threads = atomic_load(&chosen_threads);
    if (threads == 0) {
        int chosen = ql_default_threads();
        if (atomic_compare_exchange_strong(&chosen_threads, &threads, chosen)) { threads = chosen; } /* else: set meanwhile */
    }
    return threads;
}

void ql_set_threads(int threads) { atomic_store(&chosen_threads, threads < 1 ? 0 : threads); }

void ql_call_begin(ql_poll poll) {
    call.poll = poll;
    atomic_store(&call.stopped, 0);
    call.last_poll_ns = now_ns();
}

/* Only the thread that began the call polls: the poll may need what only that thread has. */
static int poll_now(void) {
    if (call.poll != NULL && !atomic_load(&call.stopped)) {
        int64_t now = now_ns();
        if (now - call.last_poll_ns > POLL_INTERVAL_NS) {
            call.last_poll_ns = now;
            if (call.poll()) { atomic_store(&call.stopped, 1); }
        }
    }
    return atomic_load(&call.stopped);
}

int ql_call_stopped(void) { return poll_now(); }

int ql_call_end(void) {
    int stopped = atomic_load(&call.stopped);
    call.poll = NULL;
    atomic_store(&call.stopped, 0);
    return stopped;
}

void ql_parallel_for(int64_t count, void (*task)(void *context, int64_t i), void *context) {
    int threads = ql_threads();
    if (threads > count) { threads = (int)count; }
    if (threads <= 1 || omp_in_parallel()) {
        for (int64_t i = 0; i < count && !poll_now(); i++) { task(context, i); }
        return;
    }
    atomic_int *stopped = &call.stopped;
#pragma omp parallel num_threads(threads)
    {
        int is_caller = omp_get_thread_num() == 0; /* OpenMP's thread 0 is the thread that met the region */
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count; i++) {
            if (is_caller ? poll_now() : atomic_load(stopped)) { continue; }
            task(context, i);
        }
    }
}
