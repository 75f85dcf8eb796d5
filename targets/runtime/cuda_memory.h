/* All memory that the model has on the GPU, and where every argument of a kernel lies in it. */
#ifndef CUDA_MEMORY_H
#define CUDA_MEMORY_H

#include <stdint.h>

#include "cuda_api.h"
#include "launches.h"

/* Inputs, or outputs: on the GPU, and once more on the CPU in memory that the GPU copies from and
 * to without help. Each tensor starts at an aligned offset, and all are copied at once. */
struct cuda_exchange {
    CUdeviceptr device;
    uint8_t *host;
    uint64_t *offsets;
    uint64_t bytes;
};

struct cuda_memory {
    CUdeviceptr weights, arena, counters;
    uint64_t *weight_offsets;
    struct cuda_exchange inputs, outputs;
    uint64_t bytes; /* of all on the GPU */
};

/* Allocate all, and copy the weights to it before anything that comes later on the stream. 0, or -1
 * with error_text() set; to be closed in any case. */
int cuda_memory_open(struct cuda_memory *memory, const void *const *weights, CUstream stream);

/* Where an argument lies on the GPU. */
CUdeviceptr cuda_place(const struct cuda_memory *memory, const struct place *place);

void cuda_memory_close(struct cuda_memory *memory);

#endif
