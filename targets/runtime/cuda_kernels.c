#include "cuda_kernels.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "description.h"
#include "error.h"
#include "launches.h"

/* What a kernel has without asking for more. */
enum { USUAL_SHARED_BYTES = 48 << 10 };

static int is_about_the_image(CUresult code)
{
    return code == CUDA_ERROR_INVALID_IMAGE || code == CUDA_ERROR_NO_BINARY_FOR_GPU ||
           code == CUDA_ERROR_INVALID_PTX || code == CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
}

static int load(CUmodule *module, const struct kernel_image *image)
{
    CUresult code = cuda.cuModuleLoadData(module, image->data);
    if (cuda_check(code, "cuModuleLoadData") == 0)
        return MODEL_OK;
    if (!is_about_the_image(code))
        return MODEL_UNUSABLE;
    char why[ERROR_TEXT_BYTES];
    int version = cuda_version();
    snprintf(why, sizeof why, "%s", error_text());
    error_set("%s. The driver, which is of CUDA %d.%d, cannot load these kernels for %s, which %s "
              "made. Install a newer driver.", why, version / 1000, version % 1000 / 10,
              kernel_architecture, kernel_compiler);
    return MODEL_WRONG_CPU;
}

/* Find a kernel in whichever image has it. */
static int find(CUfunction *function, const struct cuda_kernels *kernels, const char *name)
{
    CUresult code = CUDA_ERROR_NOT_FOUND;
    for (int i = 0; code == CUDA_ERROR_NOT_FOUND && i < kernel_image_count; i++)
        code = cuda.cuModuleGetFunction(function, kernels->modules[i], name);
    return cuda_check(code, "cuModuleGetFunction");
}

/* Let a kernel have its shared memory. To ask for an attribute also loads its code, which drivers
 * otherwise put off until its launch is captured. */
static int prepare(CUfunction function, const struct launch *launch, const struct gpu *gpu)
{
    int fixed_bytes = 0;
    if (CUDA(cuFuncGetAttribute, &fixed_bytes, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function) != 0)
        return -1;
    uint64_t bytes = (uint64_t)launch->shared_bytes + (uint64_t)fixed_bytes;
    if (bytes > (uint64_t)gpu->shared_limit_bytes) {
        error_set("a block needs %llu bytes of shared memory, and the GPU %s has %d at most. Build "
                  "the model for this GPU.", (unsigned long long)bytes, gpu->name,
                  gpu->shared_limit_bytes);
        return -1;
    }
    if (bytes <= USUAL_SHARED_BYTES)
        return 0;
    return CUDA(cuFuncSetAttribute, function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                (int)launch->shared_bytes);
}

static int find_all(struct cuda_kernels *kernels, const struct gpu *gpu)
{
    for (int call = 0; call < description.call_count; call++) {
        const struct launch *launch = &launches[call];
        if (launch->kernel == NULL)
            continue;
        CUfunction *function = &kernels->of_call[call];
        if (find(function, kernels, launch->kernel) == 0 &&
            prepare(*function, launch, gpu) == 0)
            continue;
        char why[ERROR_TEXT_BYTES];
        snprintf(why, sizeof why, "%s", error_text());
        error_set("the kernel %s of %s: %s", launch->kernel, description.nodes[call], why);
        return MODEL_UNUSABLE;
    }
    return MODEL_OK;
}

int cuda_kernels_open(struct cuda_kernels *kernels, const struct gpu *gpu)
{
    kernels->modules = calloc((size_t)kernel_image_count + 1, sizeof *kernels->modules);
    kernels->of_call = calloc((size_t)description.call_count + 1, sizeof *kernels->of_call);
    if (kernels->modules == NULL || kernels->of_call == NULL) {
        error_set("no memory");
        return MODEL_UNUSABLE;
    }
    for (int i = 0; i < kernel_image_count; i++) {
        int code = load(&kernels->modules[i], &kernel_images[i]);
        if (code != MODEL_OK)
            return code;
    }
    return find_all(kernels, gpu);
}

void cuda_kernels_close(struct cuda_kernels *kernels)
{
    for (int i = 0; kernels->modules != NULL && i < kernel_image_count; i++)
        if (kernels->modules[i] != NULL)
            (void)cuda.cuModuleUnload(kernels->modules[i]);
    free(kernels->modules);
    free(kernels->of_call);
    memset(kernels, 0, sizeof *kernels);
}
