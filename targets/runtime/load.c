#define _DEFAULT_SOURCE /* getrusage */

#include "load.h"

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "sysfs.h"
#include "threads.h"

static double clock_ms(clockid_t clock)
{
    struct timespec time;
    if (clock_gettime(clock, &time) != 0)
        return NAN;
    return (double)time.tv_sec * 1e3 + (double)time.tv_nsec * 1e-6;
}

double load_now_ms(void)
{
    return clock_ms(CLOCK_MONOTONIC);
}

static bool contains(const int *cores, int count, int core)
{
    for (int i = 0; i < count; i++)
        if (cores[i] == core)
            return true;
    return false;
}

/* Add up the lines of the cores: user nice system idle iowait irq softirq steal, in ticks. */
static void read_cores(struct load_counters *counters)
{
    int own[MODEL_MAX_THREADS];
    counters->own_cores = threads_cores(own, MODEL_MAX_THREADS);
    counters->cores = 0;
    double busy = 0, stolen = 0;
    char line[512];
    FILE *file = fopen(PROC_FOLDER "/stat", "r");
    while (file != NULL && fgets(line, sizeof line, file) != NULL) {
        int core;
        unsigned long long user, nice, system, idle, waiting, irq, softirq, steal;
        bool is_total = strncmp(line, "cpu ", 4) == 0; /* where %d would pass over the spaces */
        if (is_total || sscanf(line, "cpu%d %llu %llu %llu %llu %llu %llu %llu %llu", &core, &user,
                               &nice, &system, &idle, &waiting, &irq, &softirq, &steal) != 9)
            continue;
        counters->cores++;
        busy += (double)(user + nice + system + irq + softirq);
        if (contains(own, counters->own_cores, core))
            stolen += (double)steal;
    }
    if (file != NULL)
        fclose(file);
    double tick_ms = 1e3 / (double)sysconf(_SC_CLK_TCK);
    counters->busy_ms = counters->cores > 0 ? busy * tick_ms : NAN;
    counters->stolen_ms = counters->cores > 0 ? stolen * tick_ms : NAN;
}

void load_count(struct load_counters *counters)
{
    struct rusage usage;
    tasks_read(&counters->tasks);
    read_cores(counters);
    counters->switches = getrusage(RUSAGE_SELF, &usage) == 0 ? (double)usage.ru_nivcsw : NAN;
    counters->own_ms = clock_ms(CLOCK_PROCESS_CPUTIME_ID);
    counters->now_ms = load_now_ms();
}

/* How long the thread that waited most between two counts did so. NAN where none is in both. */
static double longest_wait(const struct tasks *before, const struct tasks *after)
{
    double longest = NAN;
    for (int i = 0; i < after->count; i++)
        for (int k = 0; k < before->count; k++)
            if (after->list[i].id == before->list[k].id)
                longest = fmax(longest, after->list[i].waited_ms - before->list[k].waited_ms);
    return longest;
}

/* A share from 0 to 1; NAN stays NAN. */
static double bounded(double share)
{
    return share < 0 ? 0 : share > 1 ? 1 : share;
}

struct load load_between(const struct load_counters *before, const struct load_counters *after)
{
    double passed_ms = after->now_ms - before->now_ms;
    int at_once = threads_count() < after->own_cores ? threads_count() : after->own_cores;
    double others_ms = after->busy_ms - before->busy_ms - (after->own_ms - before->own_ms);
    double stolen_ms = after->stolen_ms - before->stolen_ms;
    return (struct load){
        .seconds = passed_ms * 1e-3,
        .threads = threads_count(),
        .own_cores = after->own_cores,
        .cores = after->cores,
        .waited_share = bounded(longest_wait(&before->tasks, &after->tasks) / passed_ms),
        .stolen_share = bounded(stolen_ms / (passed_ms * at_once)),
        .other_cores = after->cores * bounded(others_ms / (passed_ms * after->cores)),
        .switches = after->switches - before->switches,
    };
}
