#define _POSIX_C_SOURCE 200809L

#include "tasks.h"

#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sysfs.h"

#define TASKS PROC_FOLDER "/self/task"

/* The 39th field of `stat`. The second is the program's name in brackets, with any spaces in it. */
static int read_core(long id)
{
    char text[1024];
    sysfs_line(text, sizeof text, TASKS "/%ld/stat", id);
    char *field = strrchr(text, ')');
    for (int number = 2; field != NULL && number < 39; number++)
        field = strchr(field + 1, ' ');
    return field != NULL && field[1] >= '0' && field[1] <= '9' ? atoi(field + 1) : -1;
}

static double read_waited_ms(long id)
{
    char text[128];
    unsigned long long ran_ns, waited_ns;
    sysfs_line(text, sizeof text, TASKS "/%ld/schedstat", id);
    return sscanf(text, "%llu %llu", &ran_ns, &waited_ns) == 2 ? (double)waited_ns * 1e-6 : NAN;
}

void tasks_read(struct tasks *tasks)
{
    tasks->count = 0;
    DIR *folder = opendir(TASKS);
    if (folder == NULL)
        return;
    struct dirent *entry;
    while ((entry = readdir(folder)) != NULL && tasks->count < MODEL_MAX_THREADS) {
        long id = atol(entry->d_name);
        if (id > 0)
            tasks->list[tasks->count++] =
                (struct task){.id = id, .core = read_core(id), .waited_ms = read_waited_ms(id)};
    }
    closedir(folder);
}
