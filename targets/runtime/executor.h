/* What runs the calls of a model: executor_cpu.c or executor_cuda.c is linked. model.c sees to it
 * that only one of these functions runs at a time. */
#ifndef EXECUTOR_H
#define EXECUTOR_H

#include <stdbool.h>

/* Whether executor_open copies the weights to where the kernels read them. */
extern const bool executor_copies_weights;

/* Whether this machine can run the model: MODEL_OK, or an error code with error_text() set. */
int executor_check(void);

/* Get ready to run, with one pointer per weight. Unless they are copied, the weights must stay
 * until executor_close. MODEL_OK, or an error code with error_text() set and nothing to close. */
int executor_open(const void *const *weights);

/* The number of threads is another one now. 0, or -1 with error_text() set. */
int executor_set_threads(int threads);

/* Run one inference: MODEL_OK, or an error code with error_text() set. */
int executor_run(const void *const *inputs, void *const *outputs);

/* Give everything back; also where nothing is open. */
void executor_close(void);

#endif
