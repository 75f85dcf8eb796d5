/* Who else used the CPU while the threads of this process ran. */
#ifndef LOAD_H
#define LOAD_H

#include "tasks.h"

/* Counters; NAN where the system does not say. */
struct load_counters {
    struct tasks tasks;
    double now_ms;
    double own_ms;    /* CPU time of this process */
    double busy_ms;   /* of all programs, on all cores */
    double stolen_ms; /* what the hypervisor took from the cores that its threads may run on */
    double switches;  /* how often a thread had to leave its core */
    int own_cores;    /* that its threads may run on */
    int cores;        /* of the system */
};

double load_now_ms(void);

void load_count(struct load_counters *counters);

/* What happened between two counts; NAN where the system does not say. */
struct load {
    double seconds;
    int threads;         /* of this process that kernels use */
    int own_cores;       /* that they may run on */
    int cores;           /* of the system; 0 where it does not say */
    double waited_share; /* of the time, that the thread which waited most waited for a core */
    double stolen_share; /* of its threads' time, that the hypervisor took at most */
    double other_cores;  /* that other programs used, on average */
    double switches;
};

struct load load_between(const struct load_counters *before, const struct load_counters *after);

#endif
