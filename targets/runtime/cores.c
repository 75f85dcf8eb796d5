#define _GNU_SOURCE /* sched_setaffinity */

#include "cores.h"

#include <errno.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"

#ifndef CORES_FOLDER /* tests have one of their own */
#define CORES_FOLDER "/sys/devices/system/cpu"
#endif

/* How fast a core is, to compare with others: what the scheduler believes, or its highest
 * frequency. 0 where the system says neither. */
static long speed_of(int core)
{
    static const char *const FILES[] = {"cpu_capacity", "cpufreq/cpuinfo_max_freq"};
    for (size_t i = 0; i < sizeof FILES / sizeof *FILES; i++) {
        char path[160];
        long speed = 0;
        snprintf(path, sizeof path, CORES_FOLDER "/cpu%d/%s", core, FILES[i]);
        FILE *file = fopen(path, "r");
        if (file == NULL)
            continue;
        bool found = fscanf(file, "%ld", &speed) == 1;
        fclose(file);
        if (found && speed > 0)
            return speed;
    }
    return 0;
}

/* All allowed cores of the fastest kind, or of the slowest. */
static int of_kind(const cpu_set_t *allowed, bool fastest, int *cores, int most)
{
    int count = 0;
    long best = 0, other = 0;
    for (int core = 0; core < CPU_SETSIZE; core++) {
        if (!CPU_ISSET(core, allowed))
            continue;
        long speed = speed_of(core);
        if (count > 0 && speed != best)
            other = speed;
        if (count == 0 || (fastest ? speed > best : speed < best)) {
            count = 0;
            other = best;
            best = speed;
        }
        if (speed == best && count < most)
            cores[count++] = core;
    }
    if (best != 0 && other != 0)
        return count;
    error_set("%s", "this system tells no big cores from little ones. Name cores by number.");
    return -1;
}

/* Read a number at `*text`, and step behind it. -1 where there is none. */
static long read_number(const char **text)
{
    char *end;
    if (**text < '0' || **text > '9')
        return -1;
    errno = 0;
    long number = strtol(*text, &end, 10);
    *text = end;
    return errno == 0 ? number : -1;
}

static int of_list(const char *choice, const cpu_set_t *allowed, int *cores, int most)
{
    int count = 0;
    for (const char *text = choice;; text++) {
        long first = read_number(&text);
        long last = first;
        if (first >= 0 && *text == '-') {
            text++;
            last = read_number(&text);
        }
        if (first < 0 || last < first || (*text != ',' && *text != '\0')) {
            error_set("cores must be big, little, or numbers such as 0,2-3, not '%s'", choice);
            return -1;
        }
        for (long core = first; core <= last; core++) {
            if (core >= CPU_SETSIZE || !CPU_ISSET((size_t)core, allowed)) {
                error_set("this process may not run on core %ld. /proc/self/status lists those it "
                          "may.", core);
                return -1;
            }
            if (count == most) {
                error_set("more than %d cores", most);
                return -1;
            }
            cores[count++] = (int)core;
        }
        if (*text == '\0')
            return count;
    }
}

int cores_choose(const char *choice, int *cores, int most)
{
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) {
        error_set("cannot ask for the cores of this process: %s", strerror(errno));
        return -1;
    }
    if (strcmp(choice, "big") == 0 || strcmp(choice, "little") == 0)
        return of_kind(&allowed, choice[0] == 'b', cores, most);
    return of_list(choice, &allowed, cores, most);
}

int cores_allowed(int *cores, int most)
{
    cpu_set_t allowed;
    CPU_ZERO(&allowed);
    (void)sched_getaffinity(0, sizeof allowed, &allowed);
    int count = 0;
    for (int core = 0; core < CPU_SETSIZE && count < most; core++)
        if (CPU_ISSET((size_t)core, &allowed))
            cores[count++] = core;
    return count;
}

int cores_allowed_count(void)
{
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) < 1)
        return 1;
    return CPU_COUNT(&allowed);
}

int cores_pin(int core)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET((size_t)core, &set);
    if (sched_setaffinity(0, sizeof set, &set) == 0)
        return 0;
    error_set("cannot run on core %d: %s", core, strerror(errno));
    return -1;
}
