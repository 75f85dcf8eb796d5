/* The kernels of a bundle, loaded onto the GPU. */
#ifndef CUDA_KERNELS_H
#define CUDA_KERNELS_H

#include "cuda_api.h"
#include "gpu.h"

struct cuda_kernels {
    CUmodule *modules; /* one per image; NULL where it is not loaded */
    CUfunction *of_call;
};

/* Load all images, and find the kernel of every call. MODEL_OK, or an error code with error_text()
 * set; to be closed in any case. */
int cuda_kernels_open(struct cuda_kernels *kernels, const struct gpu *gpu);

void cuda_kernels_close(struct cuda_kernels *kernels);

#endif
