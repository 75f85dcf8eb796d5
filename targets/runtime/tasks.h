/* The threads of this process, as the system counts them. */
#ifndef TASKS_H
#define TASKS_H

#include "model.h"

struct task {
    long id;
    int core;         /* that it ran on last; -1 where the system does not say */
    double waited_ms; /* for a core, while it could have run; NAN where the system does not say */
};

struct tasks {
    struct task list[MODEL_MAX_THREADS];
    int count;
};

void tasks_read(struct tasks *tasks);

#endif
