/* Files beside the running executable. */
#ifndef BESIDE_H
#define BESIDE_H

#define BESIDE_BYTES 4096

/* Write the path of `name` in the executable's folder. 0, or -1 where the folder is unknown or
 * the path too long. */
int beside_executable(char path[BESIDE_BYTES], const char *name);

#endif
