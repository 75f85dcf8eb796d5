/* threads.h where the kernels run on a GPU: there is only the calling thread. */
#include "threads.h"

#include <stdbool.h>

#include "cores.h"

static bool pinned;
static int pinned_core;

void threads_set(int count)
{
    (void)count;
}

int threads_count(void)
{
    return 1;
}

int threads_pin(const int *cores, int count)
{
    (void)count;
    if (cores_pin(cores[0]) != 0)
        return -1;
    pinned_core = cores[0];
    pinned = true;
    return 0;
}

void threads_begin_run(void)
{
}

void threads_end_run(void)
{
}

int threads_index(void)
{
    return 0;
}

int threads_available(void)
{
    return cores_allowed_count();
}

int threads_cores(int *cores, int most)
{
    if (pinned && most > 0)
        cores[0] = pinned_core;
    return pinned ? 1 : cores_allowed(cores, most);
}

void threads_stop(void)
{
}
