/* Short files of /proc and /sys. */
#ifndef SYSFS_H
#define SYSFS_H

#include <stddef.h>

#ifndef SYS_FOLDER /* tests have folders of their own */
#define SYS_FOLDER "/sys"
#endif
#ifndef PROC_FOLDER
#define PROC_FOLDER "/proc"
#endif

/* First line of the file whose path is formatted; empty where it cannot be read. */
__attribute__((format(printf, 3, 4))) void sysfs_line(char *text, size_t bytes, const char *path,
                                                      ...);

/* The number that it begins with; NAN where there is none. */
__attribute__((format(printf, 1, 2))) double sysfs_number(const char *path, ...);

#endif
