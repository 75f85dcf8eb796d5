#define _POSIX_C_SOURCE 200809L

#include "beside.h"

#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

int beside_executable(char path[BESIDE_BYTES], const char *name)
{
    ssize_t length = readlink("/proc/self/exe", path, BESIDE_BYTES - 1);
    if (length < 0 || length >= BESIDE_BYTES - 1)
        return -1;
    path[length] = '\0';
    char *slash = strrchr(path, '/');
    if (slash == NULL)
        return -1;
    size_t left = BESIDE_BYTES - (size_t)(slash + 1 - path);
    return (size_t)snprintf(slash + 1, left, "%s", name) < left ? 0 : -1;
}
