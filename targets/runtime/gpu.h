/* The GPU that the model runs on, and whether it can. */
#ifndef GPU_H
#define GPU_H

#include <stdbool.h>
#include <stdint.h>

#include "cuda_api.h"

struct gpu {
    CUdevice device;
    char name[128];
    char pci_bus_id[32];
    int major, minor; /* compute capability */
    int multiprocessors;
    bool integrated;        /* it shares the CPU's memory */
    uint64_t memory_bytes;
    int shared_limit_bytes; /* shared memory that a block can have at most */
};

/* Find the driver and the first GPU that it shows, and check that the bundle's kernels are for it.
 * MODEL_OK, or MODEL_WRONG_CPU with error_text() set. */
int gpu_find(struct gpu *gpu);

#endif
