/* What the generated driver.c tells the runtime about the model. */
#ifndef DESCRIPTION_H
#define DESCRIPTION_H

#include <stdint.h>

#include "model.h"

struct description {
    const char *name;
    const char *target;
    int input_count;
    int output_count;
    const struct model_tensor *inputs;
    const struct model_tensor *outputs;
    const double *tolerances; /* per output: 0 = bit-equal, else the largest absolute error */
    int weight_count;
    const uint64_t *weight_sizes; /* raw bytes, in the order of the weights file */
    uint32_t weights_checksum;    /* header checksum of the weights file that belongs to this code */
    const uint8_t *weights_kept; /* whether inferences read it; else only preparations do */
    uint64_t weight_bytes;
    int preparation_count;
    uint64_t prepared_bytes;
    uint64_t arena_bytes;
    uint64_t workspace_bytes;    /* per thread */
    const char *const *features; /* CPU features that the kernels need, NULL at the end */
    int call_count;
    const char *const *nodes; /* per call: the node of the ONNX graph */
    int threads;
};

extern const struct description description;

/* Run one of the kernels that fill the prepared memory, once and in order; 0 on success. */
int32_t driver_prepare(int call, uint8_t *prepared, const void *const *weights);

/* Run one kernel; 0 on success. */
int32_t driver_call(int call, uint8_t *arena, const uint8_t *prepared, const void *const *weights,
                    const void *const *inputs, void *const *outputs);

#endif
