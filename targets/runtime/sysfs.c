#define _POSIX_C_SOURCE 200809L

#include "sysfs.h"

#include <fcntl.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Without stdio's buffers: it is read while a measurement goes on. */
static void read_line(char *text, size_t bytes, const char *format, va_list arguments)
{
    char path[512];
    text[0] = '\0';
    int length = vsnprintf(path, sizeof path, format, arguments);
    if (length < 0 || (size_t)length >= sizeof path)
        return;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return;
    ssize_t got = read(file, text, bytes - 1);
    close(file);
    text[got > 0 ? got : 0] = '\0';
    text[strcspn(text, "\n")] = '\0';
}

void sysfs_line(char *text, size_t bytes, const char *path, ...)
{
    va_list arguments;
    va_start(arguments, path);
    read_line(text, bytes, path, arguments);
    va_end(arguments);
}

double sysfs_number(const char *path, ...)
{
    char text[64], *end;
    va_list arguments;
    va_start(arguments, path);
    read_line(text, sizeof text, path, arguments);
    va_end(arguments);
    double number = strtod(text, &end);
    return end == text ? NAN : number;
}
