/* The GPU's own times of the model that is open, for measuring; executor.h runs it. Inputs are
 * those of the latest executor_run. All return MODEL_OK, or an error code with error_text() set. */
#ifndef EXECUTOR_CUDA_H
#define EXECUTOR_CUDA_H

#include "gpu.h"

/* Run all kernels once; milliseconds on the GPU from before the first to behind the last. */
int executor_time_kernels(double *ms);

/* Run once with all copies; milliseconds that those of the inputs and those of the outputs take. */
int executor_time_copies(double *ms);

/* Run once; milliseconds of every call. What the GPU does between calls counts for them, too. */
int executor_time_calls(double *ms);

/* The GPU of the open model, and the memory that the model has on it. */
const struct gpu *executor_gpu(void);
uint64_t executor_gpu_bytes(void);

#endif
