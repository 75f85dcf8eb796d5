/* Opens a bundle's model once: the milliseconds of model_open, and the peak memory in KB after it.
 *
 *     open_time LIBRARY WEIGHTS [CACHE]
 */
#define _POSIX_C_SOURCE 200809L

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

static long peak_kb(void)
{
    char line[256];
    long found = 0;
    FILE *status = fopen("/proc/self/status", "r");
    while (status != NULL && fgets(line, sizeof line, status) != NULL)
        sscanf(line, "VmHWM: %ld", &found);
    if (status != NULL)
        fclose(status);
    return found;
}

int main(int count, char **arguments)
{
    void *library = count == 3 || count == 4 ? dlopen(arguments[1], RTLD_NOW) : NULL;
    int (*open_model)(const char *);
    int (*set_cache)(const char *);
    const char *(*last_error)(void);
    if (library == NULL) {
        fprintf(stderr, "usage: open_time LIBRARY WEIGHTS [CACHE]\n");
        return 2;
    }
    *(void **)&open_model = dlsym(library, "model_open");
    *(void **)&set_cache = dlsym(library, "model_set_cache");
    *(void **)&last_error = dlsym(library, "model_last_error");

    struct timespec start;
    struct timespec end;
    clock_gettime(CLOCK_MONOTONIC, &start);
    int failed = count == 4 ? set_cache(arguments[3]) : 0;
    failed = failed ? failed : open_model(arguments[2]);
    clock_gettime(CLOCK_MONOTONIC, &end);
    if (failed || last_error()[0] != '\0') {
        fprintf(stderr, "%s\n", last_error());
        return 1;
    }
    printf("%.4f %ld\n",
           (double)(end.tv_sec - start.tv_sec) * 1e3 + (double)(end.tv_nsec - start.tv_nsec) / 1e6,
           peak_kb());
    return 0;
}
