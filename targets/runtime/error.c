#include "error.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>

static _Thread_local char text[ERROR_TEXT_BYTES];

void error_set(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
}

const char *error_text(void)
{
    return text;
}

/* Kernels call these two before they return a code other than 0. */
void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message);
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t part_count);

void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message)
{
    error_set("%s: %s", kind, message);
}

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t part_count)
{
    int used = snprintf(text, sizeof text, "%s: ", kind);
    for (int32_t i = 0; i < part_count && used >= 0 && (size_t)used < sizeof text; i++)
        used += snprintf(text + used, sizeof text - (size_t)used, "%s", parts[i]);
}
