/* Which instructions this CPU has, by the names of /proc/cpuinfo. */
#ifndef CPU_H
#define CPU_H

#include <stdbool.h>

/* Whether the CPU has the feature and the operating system saves its registers. False where the
 * runtime does not know the name. */
bool cpu_has(const char *feature);

/* 0 where the CPU has every feature of a list that ends with NULL, else -1 with error_text() set
 * to a message that names all missing ones. */
int cpu_check(const char *const *features);

#endif
