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
    uint64_t weight_bytes;        /* all constants, decoded */
    uint64_t coded_bytes;         /* those that the weights file holds coded, */
    uint64_t decoded_bytes;       /* and what they decode to */
    uint64_t arena_bytes;
    uint64_t workspace_bytes;    /* per thread */
    const char *const *features; /* CPU features that the kernels need, NULL at the end */
    int call_count;
    const char *const *nodes; /* per call: the node of the ONNX graph */
    int threads;
};

extern const struct description description;

/* Run one kernel; 0 on success. */
int32_t driver_call(int call, uint8_t *arena, const void *const *weights,
                    const void *const *inputs, void *const *outputs);

#endif
