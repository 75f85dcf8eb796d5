/* Scratch memory that kernels ask for while they run. */
#ifndef WORKSPACE_H
#define WORKSPACE_H

#include <stdint.h>

/* Reserve `bytes` for each of `threads` threads. 0, or -1 with error_text() set. */
int workspace_open(uint64_t bytes, int threads);

void workspace_close(void);

/* Forget what kernels of earlier runs did not give back. No kernel may be running. */
void workspace_begin_run(void);

#endif
