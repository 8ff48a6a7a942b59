/* topology.c: see topology.h. Control groups: v2 (cpu.max) and v1 (cpu.cfs_quota_us), of this process's group and of every
 * group above it, as far as the process sees them. */
#define _GNU_SOURCE
#include "topology.h"

#include <math.h>  /* ceil, fmin */
#include <sched.h> /* sched_getaffinity */
#include <stdio.h>
#include <string.h>
#include <unistd.h> /* sysconf */

enum { PATH_BYTES = 4096 };

static const char *const MOUNTS[] = {"/sys/fs/cgroup", "/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct"};

/* the numbers in the file folder/name, at most two; their count */
static int read_numbers(const char *folder, const char *name, double numbers[2]) {
    char path[PATH_BYTES + 64];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "re");
    if (file == NULL) { return 0; }
    int count = fscanf(file, "%lf %lf", &numbers[0], &numbers[1]);
    fclose(file);
    return count;
}

/* cores' worth of CPU time that the group grants; INFINITY where it sets no limit ("max", -1) */
static double quota_of(const char *folder) {
    double v2[2], quota[2], period[2];
    if (read_numbers(folder, "cpu.max", v2) == 2 && v2[0] > 0 && v2[1] > 0) { return v2[0] / v2[1]; }
    if (read_numbers(folder, "cpu.cfs_quota_us", quota) >= 1 && read_numbers(folder, "cpu.cfs_period_us", period) >= 1 &&
        quota[0] > 0 && period[0] > 0) {
        return quota[0] / period[0];
    }
    return INFINITY;
}

/* the least quota of the group `name` ("/a/b") under `mount` and of those above it */
static double least_quota(const char *mount, const char *name) {
    char folder[PATH_BYTES];
    int length = snprintf(folder, sizeof folder, "%s%s", mount, name);
    if (length < 0 || length >= PATH_BYTES) { return INFINITY; }
    double least = INFINITY;
    for (;;) {
        least = fmin(least, quota_of(folder));
        char *slash = strrchr(folder, '/');
        if (slash == NULL || slash < folder + strlen(mount)) { return least; }
        *slash = '\0';
    }
}

static double granted_cores(void) {
    double least = INFINITY;
    FILE *file = fopen("/proc/self/cgroup", "re");
    if (file == NULL) { return least; }
    char line[PATH_BYTES];
    while (fgets(line, sizeof line, file) != NULL) { /* number:controllers:path */
        line[strcspn(line, "\n")] = '\0';
        char *controllers = strchr(line, ':'), *path = controllers == NULL ? NULL : strchr(controllers + 1, ':');
        if (path == NULL) { continue; }
        *controllers = *path = ',';
        int of_cpu = path == controllers + 1 || strstr(controllers, ",cpu,") != NULL;
        *path = '/';
        while (path[1] == '/') { path++; }
        for (size_t i = 0; i < sizeof MOUNTS / sizeof *MOUNTS && of_cpu; i++) { least = fmin(least, least_quota(MOUNTS[i], path)); }
    }
    fclose(file);
    return least;
}

int ql_usable_cores(void) {
    cpu_set_t set;
    int cores = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : (int)sysconf(_SC_NPROCESSORS_ONLN);
    double granted = granted_cores();
    if (granted < cores) { cores = (int)ceil(granted); }
    return cores < 1 ? 1 : cores;
}
