/* What measuring and `--info` ask of that which runs the model: machine_cpu.c or machine_cuda.c is
 * linked. */
#ifndef MACHINE_H
#define MACHINE_H

#include <stdbool.h>

#include "sample.h"

/* Before the first time is taken, with the model open. MODEL_OK, or an error code with
 * error_text(). */
int machine_prepare(struct sample *sample);

/* Milliseconds of `runs` inferences together: on a CPU as a user sees them, on a GPU from before
 * the first kernel to behind the last, by the GPU's clock. MODEL_OK, or an error code with
 * error_text(). */
int machine_time_runs(struct sample *sample, long runs, double *ms);

/* Milliseconds of every call of one inference. MODEL_OK, or an error code with error_text(). */
int machine_time_calls(struct sample *sample, double *ms);

/* After all times are taken: measure what they leave out. MODEL_OK, or an error code with
 * error_text(). */
int machine_time_rest(struct sample *sample);

/* What it is, for the `device` of a measurement: `, "key": …`. No figures where those are refused. */
void machine_print(bool refused);

/* What the model needs of it, for `--info`: `, "key": …`. Whether it has that. */
bool machine_print_needs(void);

#endif
