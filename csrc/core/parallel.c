/* parallel.c: the one place with threads: a pool of our own. Tasks are independent, so no result depends on the number of
 * threads.
 *
 * A region is one call of ql_parallel_for. Its tasks are in as many runs as it has threads, one beside the other. Each thread
 * begins with a run of its own, so that it reads memory from front to back and, from one region to the next, the same part
 * of it; then it takes what is left of the others'. A run's `claim` holds the number of the region and that of the run's next
 * task. The caller claims like a worker until nothing is left, then waits for tasks in flight and for nothing else: a worker
 * that the system never scheduled costs nothing.
 *
 * Workers are begun when they are first needed and stay. Between regions they spin for some tens of microseconds, then
 * sleep on a futex. Those that are woken keep off the caller's CPU, where Linux may put them though another is idle, and
 * leave them for some ten milliseconds. There is one region at a time: a second caller, a task that begins a region, and a
 * forked child (which has none of these threads) compute serially. */
#define _GNU_SOURCE
#include "../quantlab.h"

#include "topology.h"

#include <limits.h>      /* INT_MAX */
#include <linux/futex.h> /* FUTEX_WAIT_PRIVATE */
#include <pthread.h>
#include <sched.h>  /* sched_yield, sched_getcpu */
#include <signal.h> /* sigfillset */
#include <stdalign.h>
#include <stdatomic.h>
#include <stdlib.h>      /* getenv, strtol */
#include <sys/syscall.h> /* SYS_futex */
#include <time.h>        /* clock_gettime */
#include <unistd.h>      /* syscall */

enum {
    POLL_INTERVAL_NS = 50000000,
    SPIN_NS = 50000,      /* about what it costs to sleep and be woken, several times over */
    PAUSES_PER_LOOK = 64, /* at the clock; a pause is 10 to 70 ns */
    MAX_RUNS = 64, /* more threads share them */
    STACK_BYTES = 4 << 20 /* of a worker; a task keeps less than 256 KiB there */
};

#define NO_TASK UINT32_MAX /* more than any count */

typedef void task_function(void *context, int64_t i);

/* ---- the call that a thread is in ------------------------------------------------------------------------------ */

typedef struct {
    ql_poll poll;
    atomic_int stopped;
    int64_t last_poll_ns;
} call_state;

static _Thread_local call_state call;
static _Thread_local int in_region; /* this thread runs tasks: what they begin is serial */

static int64_t now_ns(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

void ql_call_begin(ql_poll poll) {
    call.poll = poll;
    atomic_store(&call.stopped, 0);
    call.last_poll_ns = now_ns(CLOCK_MONOTONIC_COARSE);
}

/* Only the thread that began the call polls: the poll may need what only that thread has. */
static int poll_now(void) {
    if (call.poll != NULL && !atomic_load(&call.stopped)) {
        int64_t now = now_ns(CLOCK_MONOTONIC_COARSE); /* some milliseconds coarse, and cheap: it is asked for before each task */
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

/* ---- how many threads ------------------------------------------------------------------------------------------ */

static atomic_int chosen_threads;  /* 0: not chosen, use the default */
static atomic_int in_forked_child; /* the pool's threads do not survive a fork */

static void mark_child(void) { atomic_store(&in_forked_child, 1); }

__attribute__((constructor)) static void register_fork_handler(void) { pthread_atfork(NULL, NULL, mark_child); }

int ql_asked_threads(void) {
    const char *text = getenv("QL_THREADS");
    if (text == NULL || *text == '\0') { return 0; }
    char *end;
    long value = strtol(text, &end, 10);
    return *end == '\0' && value >= 1 && value <= QL_MAX_THREADS ? (int)value : -1;
}

int ql_default_threads(void) {
    int asked = ql_asked_threads();
    return asked > 0 ? asked : ql_usable_cores();
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

/* ---- the pool -------------------------------------------------------------------------------------------------- */

typedef struct { alignas(64) _Atomic uint64_t claim; } task_run;   /* region << 32 | next task */
typedef struct { alignas(64) _Atomic uint64_t count; } task_count; /* region << 32 | tasks finished */

static struct {
    task_run run[MAX_RUNS];
    /* The region. Written when all its predecessor's tasks are finished and every claim has moved on to NO_TASK: a worker
     * that reads a mixture of two regions finds its claim refused. */
    alignas(64) _Atomic(task_function *) task;
    _Atomic(void *) context;
    _Atomic(atomic_int *) stopped; /* of the caller's call */
    atomic_uint count;
    atomic_int helpers; /* workers that may take part */
    alignas(64) atomic_uint region; /* futex of the workers: number of the latest region */
    atomic_int sleeping_workers;
    task_count finished[QL_MAX_THREADS]; /* by each worker, which alone writes it */
    alignas(64) atomic_uint reports;  /* futex of the caller: grows where it sleeps and a worker has finished tasks */
    atomic_int caller_sleeps;
    alignas(64) atomic_flag busy; /* held by the caller of the region, guards what follows */
    int workers;
    unsigned runs; /* of the latest region */
    pthread_t worker[QL_MAX_THREADS];
    cpu_set_t home; /* where the program may run, as it was when the latest worker was begun */
    int avoided;    /* CPU that the workers keep off; -1: none */
} pool = {.busy = ATOMIC_FLAG_INIT, .avoided = -1};

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

static void futex_wait(atomic_uint *word, unsigned value) { syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL); }
static void futex_wake(atomic_uint *word, int waiters) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, waiters); }

/* Waits, awake and for SPIN_NS at most, until `is_so` of the pool; 1 if it came to that. */
static int spin_until(int (*is_so)(unsigned value), unsigned value) {
    for (int64_t end = 0; end == 0 || now_ns(CLOCK_MONOTONIC) < end;) {
        for (int i = 0; i < PAUSES_PER_LOOK; i++) {
            if (is_so(value)) { return 1; }
            relax();
        }
        if (end == 0) { end = now_ns(CLOCK_MONOTONIC) + SPIN_NS; }
        sched_yield(); /* who is waited for may have no other core */
    }
    return 0;
}

static unsigned runs_of(int threads) { return threads < MAX_RUNS ? (unsigned)threads : MAX_RUNS; }
static uint32_t first_of(unsigned run, unsigned runs, uint32_t count) { return (uint32_t)((uint64_t)count * run / runs); }

/* Worker `worker` has finished `count` more tasks of a region, whose caller waits for them. */
static void report(int worker, uint64_t region, unsigned count) {
    uint64_t before = atomic_load_explicit(&pool.finished[worker].count, memory_order_relaxed);
    uint64_t all = (before >> 32 == region ? (uint32_t)before : 0) + count;
    atomic_store(&pool.finished[worker].count, region << 32 | all);
    if (atomic_load(&pool.caller_sleeps)) {
        atomic_fetch_add(&pool.reports, 1);
        futex_wake(&pool.reports, 1);
    }
}

/* Claims and runs tasks of run `run` until none is left, on worker `worker`, which reports them (-1: the caller); how many.
 * Between a claim and the report the region cannot change: its caller waits for it. */
static unsigned empty_run(unsigned run, int worker) {
    unsigned done = 0;
    uint64_t region = 0;
    uint64_t claim = atomic_load(&pool.run[run].claim);
    for (;;) {
        task_function *task = atomic_load_explicit(&pool.task, memory_order_acquire);
        void *context = atomic_load_explicit(&pool.context, memory_order_acquire);
        atomic_int *stopped = atomic_load_explicit(&pool.stopped, memory_order_acquire);
        int helpers = atomic_load_explicit(&pool.helpers, memory_order_acquire);
        uint32_t count = atomic_load_explicit(&pool.count, memory_order_acquire), next = (uint32_t)claim;
        unsigned runs = runs_of(helpers + 1);
        if (worker >= helpers || run >= runs || next >= first_of(run + 1, runs, count)) { break; }
        if (!atomic_compare_exchange_weak(&pool.run[run].claim, &claim, claim + 1)) { continue; }
        if (worker < 0 ? !poll_now() : !atomic_load(stopped)) { task(context, next); }
        done++, region = claim >> 32;
        claim = atomic_load(&pool.run[run].claim);
    }
    if (worker >= 0 && done > 0) { report(worker, region, done); }
    return done;
}

/* all runs, the thread's own first */
static unsigned empty_runs(int worker) {
    unsigned done = 0, runs = runs_of(atomic_load(&pool.helpers) + 1);
    for (unsigned i = 0; i < runs; i++) { done += empty_run(((unsigned)(worker + 1) + i) % runs, worker); }
    return done;
}

static int is_newer(unsigned seen) { return atomic_load(&pool.region) != seen; }

/* The number of the latest region once it is not `seen`. */
static unsigned wait_for_region(unsigned seen) {
    if (!spin_until(is_newer, seen)) {
        atomic_fetch_add(&pool.sleeping_workers, 1);
        while (atomic_load(&pool.region) == seen) { futex_wait(&pool.region, seen); }
        atomic_fetch_sub(&pool.sleeping_workers, 1);
    }
    return atomic_load(&pool.region);
}

static void *work(void *number) {
    int worker = (int)(intptr_t)number;
    in_region = 1;
    for (unsigned region = 0;;) {
        region = wait_for_region(region);
        empty_runs(worker);
    }
    return NULL;
}

/* 0 where the system gives no more threads. Signals are for the threads of the program: a worker takes none but its own faults. */
static int begin_worker(int number) {
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0) { return 0; }
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    sigset_t blocked, before;
    sigfillset(&blocked);
    const int faults[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, SIGTRAP};
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) { sigdelset(&blocked, faults[i]); }
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    int failed = pthread_create(&pool.worker[number], &attributes, work, (void *)(intptr_t)number);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    if (sched_getaffinity(0, sizeof pool.home, &pool.home) != 0) { CPU_ZERO(&pool.home); }
    pool.avoided = -1;
    return !failed;
}

/* The workers to the CPUs beside the caller's, where there is one for each helper. A refusal changes nothing. */
static void move_workers(int helpers) {
    int here = sched_getcpu();
    if (here < 0 || here == pool.avoided || !CPU_ISSET(here, &pool.home) || helpers >= CPU_COUNT(&pool.home)) { return; }
    cpu_set_t others = pool.home;
    CPU_CLR(here, &others);
    for (int i = 0; i < pool.workers; i++) { pthread_setaffinity_np(pool.worker[i], sizeof others, &others); }
    pool.avoided = here;
}

static void open_region(uint32_t count, task_function *task, void *context, int helpers) {
    while (pool.workers < helpers && begin_worker(pool.workers)) { pool.workers++; }
    unsigned region = atomic_load(&pool.region) + 1;
    unsigned used = region > 1 ? pool.runs : MAX_RUNS;
    for (unsigned i = 0; i < used; i++) { /* first: an old claim, or one that never was, must not meet the new count */
        atomic_store_explicit(&pool.run[i].claim, (uint64_t)region << 32 | NO_TASK, memory_order_release);
    }
    pool.runs = runs_of(helpers + 1);
    atomic_store_explicit(&pool.task, task, memory_order_release);
    atomic_store_explicit(&pool.context, context, memory_order_release);
    atomic_store_explicit(&pool.stopped, &call.stopped, memory_order_release);
    atomic_store_explicit(&pool.count, count, memory_order_release);
    atomic_store_explicit(&pool.helpers, helpers, memory_order_release);
    for (unsigned i = 0; i < pool.runs; i++) {
        atomic_store_explicit(&pool.run[i].claim, (uint64_t)region << 32 | first_of(i, pool.runs, count), memory_order_release);
    }
    atomic_store(&pool.region, region); /* and before the look at who sleeps */
    if (atomic_load(&pool.sleeping_workers) > 0) {
        move_workers(helpers);
        futex_wake(&pool.region, pool.workers > helpers ? INT_MAX : helpers);
    }
}

/* whether the workers have finished so many tasks of the latest region */
static int have_finished(unsigned tasks) {
    uint64_t region = atomic_load_explicit(&pool.region, memory_order_relaxed);
    unsigned done = 0;
    for (int i = 0, helpers = atomic_load(&pool.helpers); i < helpers && done < tasks; i++) {
        uint64_t count = atomic_load(&pool.finished[i].count);
        if (count >> 32 == region) { done += (uint32_t)count; }
    }
    return done == tasks;
}

static void wait_for_workers(unsigned tasks) {
    if (spin_until(have_finished, tasks)) { return; }
    atomic_store(&pool.caller_sleeps, 1);
    for (unsigned seen = atomic_load(&pool.reports); !have_finished(tasks); seen = atomic_load(&pool.reports)) {
        futex_wait(&pool.reports, seen);
    }
    atomic_store(&pool.caller_sleeps, 0);
}

static void task_of_loops(void *context, int64_t i) {
    const ql_loop *loop = context;
    for (; i >= loop->count; loop++) { i -= loop->count; }
    loop->task(loop->context, i);
}

void ql_parallel_loops(ql_loop *loops, int64_t n) {
    int64_t count = 0;
    for (int64_t l = 0; l < n; l++) { count += loops[l].count; }
    ql_parallel_for(count, task_of_loops, loops);
}

void ql_parallel_for(int64_t count, void (*task)(void *context, int64_t i), void *context) {
    int threads = ql_threads();
    if (threads > count) { threads = (int)count; }
    if (threads <= 1 || count > INT_MAX || in_region || atomic_flag_test_and_set(&pool.busy)) {
        for (int64_t i = 0; i < count && !poll_now(); i++) { task(context, i); }
        return;
    }
    in_region = 1;
    open_region((uint32_t)count, task, context, threads - 1);
    wait_for_workers((unsigned)count - empty_runs(-1));
    in_region = 0;
    atomic_flag_clear(&pool.busy);
}
