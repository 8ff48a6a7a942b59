/* dispatch.c: one complete table an ISA: the scalar table, overlaid by each ISA up to it. */
#include "core/cpu.h"
#include "core/memory.h"
#include "quantlab.h"
#include "x86/overlay.h"

#include <pthread.h> /* pthread_once */
#include <stdatomic.h>
#include <stdlib.h> /* getenv */
#include <string.h> /* strcmp */

static ql_backend tables[QL_ISA_COUNT];
static int usable[QL_ISA_COUNT];
static const char *why_not[QL_ISA_COUNT] = {"", "", "", "", "", ""};
static atomic_int selected, precise;
static _Atomic(const ql_backend *) selected_device; /* NULL: the CPU */
static pthread_once_t once = PTHREAD_ONCE_INIT;

static const char *const isa_names[QL_ISA_COUNT] = {"scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"};
static const int built[QL_ISA_COUNT] = {
    1,
#ifdef QL_BUILT_AVX2
    1,
#else
    0,
#endif
#ifdef QL_BUILT_AVX512
    1,
#else
    0,
#endif
#ifdef QL_BUILT_AVX512_VNNI
    1,
#else
    0,
#endif
#ifdef QL_BUILT_AVX512_BF16
    1,
#else
    0,
#endif
#ifdef QL_BUILT_AMX
    1,
#else
    0,
#endif
};

static void fill_scalar(ql_backend *table) {
    table->name = "cpu";
    table->kv_bytes = sizeof(float);
#define X(result, op, params) table->op = ql_host_##op;
    QL_DEVICE_OPS(X)
#undef X
#define X(op, params) table->op = ql_##op##_scalar;
    QL_OPS(X)
#undef X
    for (int f = 0; f < QL_FORMAT_COUNT; f++) {
#define X(op, params) table->op[f] = ql_##op##_scalar;
        QL_FORMAT_OPS(X)
#undef X
    }
}

static void initialize(void) {
    int (*const has[QL_ISA_COUNT])(const char **) = {NULL, ql_cpu_has_avx2, ql_cpu_has_avx512,
                                                       ql_cpu_has_avx512_vnni, ql_cpu_has_avx512_bf16, ql_cpu_has_amx};
    usable[QL_ISA_SCALAR] = 1;
    for (int isa = QL_ISA_AVX2; isa < QL_ISA_COUNT; isa++) {
        if (!built[isa]) {
            why_not[isa] = "the compiler of this build did not support it";
        } else {
            usable[isa] = has[isa](&why_not[isa]);
        }
    }
    for (int isa = QL_ISA_SCALAR; isa < QL_ISA_COUNT && usable[isa]; isa++) { /* the overlays are compiled for their ISA */
        fill_scalar(&tables[isa]);
#ifdef QL_BUILT_AVX2
        if (isa >= QL_ISA_AVX2) { ql_overlay_avx2(&tables[isa]); }
#endif
#ifdef QL_BUILT_AVX512
        if (isa >= QL_ISA_AVX512) { ql_overlay_avx512(&tables[isa]); }
#endif
#ifdef QL_BUILT_AVX512_VNNI
        if (isa >= QL_ISA_AVX512_VNNI) { ql_overlay_avx512_vnni(&tables[isa]); }
#endif
#ifdef QL_BUILT_AVX512_BF16
        if (isa >= QL_ISA_AVX512_BF16) { ql_overlay_avx512_bf16(&tables[isa]); }
#endif
#ifdef QL_BUILT_AMX
        if (isa >= QL_ISA_AMX) { ql_overlay_amx(&tables[isa]); }
#endif
        atomic_store(&selected, isa);
    }
}

/* QL_ISA names the ISA to begin with; a name that is not usable here is left to the caller to tell (ql_isa_selected) */
static void initialize_from_environment(void) {
    initialize();
    const char *wanted = getenv("QL_ISA");
    for (int isa = 0; wanted != NULL && isa < QL_ISA_COUNT; isa++) {
        if (usable[isa] && strcmp(wanted, isa_names[isa]) == 0) { atomic_store(&selected, isa); }
    }
}

static void ensure(void) { pthread_once(&once, initialize_from_environment); }

const char *ql_isa_name(ql_isa isa) { return isa_names[isa]; }
int ql_isa_built(ql_isa isa) { return built[isa]; }
int ql_isa_usable(ql_isa isa) { return ensure(), usable[isa]; }
const char *ql_isa_why_not(ql_isa isa) { return ensure(), why_not[isa]; }
ql_isa ql_isa_selected(void) { return ensure(), (ql_isa)atomic_load(&selected); }
const ql_backend *ql_cpu(void) { return ensure(), &tables[atomic_load(&selected)]; }
void ql_select(const ql_backend *table) { atomic_store(&selected_device, table); }

const ql_backend *ql_selected(void) {
    const ql_backend *device = atomic_load(&selected_device);
    return device != NULL ? device : ql_cpu();
}

ql_status ql_isa_select(ql_isa isa) {
    ensure();
    if (!usable[isa]) { return ql_fail(QL_EVALUE, "isa: %s is not usable here: %s", isa_names[isa], why_not[isa]); }
    atomic_store(&selected, isa);
    return QL_OK;
}

int ql_precise(void) { return atomic_load(&precise); }
void ql_set_precise(int on) { atomic_store(&precise, on != 0); }

/* ---- CUDA in a build without it ---------------------------------------------------------------------------- */

#ifndef QL_BUILT_CUDA
static ql_status no_cuda(void) { return ql_fail(QL_ECUDA, "this build holds no CUDA kernels"); }
int ql_cuda_built(void) { return 0; }
const ql_backend *ql_cuda(int device) { return (void)device, (void)no_cuda(), NULL; }
ql_status ql_cuda_get_info(ql_cuda_info *info, int device) { return (void)info, (void)device, no_cuda(); }
ql_status ql_cuda_reset_peak(int device) { return (void)device, no_cuda(); }
void ql_cuda_set_folders(const char *folders) { (void)folders; }
ql_status ql_cuda_fetch(void *host, const void *memory, size_t bytes) {
    return (void)host, (void)memory, (void)bytes, no_cuda();
}
ql_status ql_cuda_bench(double *seconds, const ql_bench *bench, int samples, int device) {
    return (void)seconds, (void)bench, (void)samples, (void)device, no_cuda();
}
const char *ql_cuda_library(const char *name) { return (void)name, (void)no_cuda(), NULL; }
#endif

/* ---- names, for quantlab.backend.table() ------------------------------------------------------------------- */

static const char *const op_names[] = {
#define X(op, params) #op,
    QL_OPS(X) QL_FORMAT_OPS(X)
#undef X
};
enum {
#define X(op, params) INDEX_##op,
    QL_OPS(X)
    PLAIN_OPS,
    BEFORE_FORMAT_OPS = PLAIN_OPS - 1, /* the next name continues the count */
    QL_FORMAT_OPS(X)
#undef X
    ALL_OPS
};

static const char *const format_names[QL_FORMAT_COUNT] = {
#define X(NAME, name) #name,
    QL_FORMATS(X)
#undef X
};

int ql_op_count(void) { return ALL_OPS; }
const char *ql_op_name(int op) { return op_names[op]; }
int ql_op_has_formats(int op) { return op >= PLAIN_OPS; }
const char *ql_format_name(ql_format format) { return format_names[format]; }

static int same_slot(const ql_backend *a, const ql_backend *b, int op, ql_format format) {
    switch (op) {
#define X(name, params) case INDEX_##name: return a->name == b->name;
        QL_OPS(X)
#undef X
#define X(name, params) case INDEX_##name: return a->name[format] == b->name[format];
        QL_FORMAT_OPS(X)
#undef X
    default: return 0;
    }
}

const char *ql_op_variant(int op, ql_format format) {
    const ql_backend *table = ql_selected();
    static const ql_backend empty;
    if (same_slot(table, &empty, op, format)) { return ""; }
    for (int isa = QL_ISA_SCALAR; isa < QL_ISA_COUNT; isa++) {
        if (same_slot(table, &tables[isa], op, format)) { return isa_names[isa]; }
    }
    return table->name; /* a device has one variant */
}
