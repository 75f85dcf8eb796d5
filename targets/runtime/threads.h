/* A pool of threads for kernels that divide their work. */
#ifndef THREADS_H
#define THREADS_H

/* Threads that kernels may use, the calling one included. Ends a running pool; a pool starts with
 * the first kernel that wants it, and never where `count` is 1. */
void threads_set(int count);

int threads_count(void);

/* Let thread i run on core `cores[i % count]` only; the calling thread is thread 0 and moves at
 * once. 0, or -1 with error_text() set. */
int threads_pin(const int *cores, int count);

/* Around an inference: in between, threads wait for work awake, so that kernels which follow each
 * other need not wake them; afterwards they fall asleep. */
void threads_begin_run(void);
void threads_end_run(void);

/* Index of the calling thread: 0 outside the pool, else 1 to threads_count() - 1. */
int threads_index(void);

/* CPUs that this process may run on. */
int threads_available(void);

/* The cores that threads may run on, `most` of them at most: those they are pinned to, else all of
 * this process. Their number. */
int threads_cores(int *cores, int most);

/* End the pool and wait for its threads. */
void threads_stop(void);

#endif
