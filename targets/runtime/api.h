/* The C API of one compiled model.
 *
 * Threads: every function may be called from any thread; calls take turns, so only one inference
 * runs at a time. Error texts belong to the thread that got the error. Memory that inputs and
 * outputs point to must not overlap, and must be aligned to MODEL_ALIGNMENT bytes, for example by
 * `_Alignas(MODEL_ALIGNMENT) float image[784];` or `aligned_alloc(MODEL_ALIGNMENT, …)`.
 */
#ifndef MODEL_H
#define MODEL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MODEL_ALIGNMENT 64
#define MODEL_MAX_THREADS 256

/* What the functions return. The executable exits with the same numbers. */
#define MODEL_OK 0
#define MODEL_FAILED 1    /* a kernel or a check failed */
#define MODEL_UNUSABLE 2  /* a bad argument, a missing or damaged weights file, no memory */
#define MODEL_WRONG_CPU 3 /* this machine lacks what the model was compiled for: CPU or GPU */

struct model_tensor {
    const char *name;
    const char *dtype; /* bool, uint8, int8, int16, int32, int64 or float32, little-endian */
    int rank;
    const int64_t *shape; /* `rank` sizes; row-major */
    uint64_t bytes;
};

/* Check the CPU, or the GPU too where one runs the model; map the weights, decode those that are
 * coded, and allocate memory. `weights_path` NULL means `weights.epw` beside the running
 * executable, or else in the current folder. */
int model_open(const char *weights_path);

/* Run one inference: one pointer per model input, one per model output, in the model's order. */
int model_run(const void *const *inputs, void *const *outputs);

/* Use `threads` threads from now on, 1 to MODEL_MAX_THREADS; before or after model_open. Where
 * memory for them is lacking, the model is closed. A model on a GPU uses one whatever this says. */
int model_set_threads(int threads);

/* Run on these cores only, one thread each: "big" or "little" (the fastest or the slowest kind of
 * this CPU), or numbers such as "0,2-3". The calling thread, which should be the one that calls
 * model_run, moves to the first of them. Uses as many threads as cores, unless model_set_threads
 * said how many. */
int model_set_cores(const char *cores);

/* Keep coded weights decoded in this file, from the next model_open on; NULL: in memory, as before
 * the first call. model_open writes the file where it is missing, damaged or of other weights, and
 * else only maps it, so that processes share the memory. Where it can be neither used nor written,
 * model_open decodes to memory, and model_last_error says why although it succeeded. A file that is
 * no such cache is left alone. */
int model_set_cache(const char *path);

/* Give everything back. The model can be opened again. */
void model_close(void);

/* Why the latest failing call on this thread failed; valid until its next call. Empty after a
 * model_open that had nothing to complain about. */
const char *model_last_error(void);

#ifdef __cplusplus
}
#endif

#endif
