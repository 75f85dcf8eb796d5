#include "gpu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "description.h"
#include "error.h"
#include "launches.h"

/* Compute capabilities of Jetson boards: their code and that of other GPUs are different. */
static const int JETSON[] = {53, 62, 72, 87, 101, 110};

/* From compute capability to the targets of edgepress, the first row that fits. */
static const struct {
    int major, minor; /* minor -1: any */
    const char *target;
} TARGETS[] = {
    {8, 7, "jetson-orin-nano or jetson-agx-orin"},
    {8, -1, "cuda-sm80"},
    {9, -1, "cuda-sm90"},
};

static bool is_jetson(int capability)
{
    for (size_t i = 0; i < sizeof JETSON / sizeof *JETSON; i++)
        if (JETSON[i] == capability)
            return true;
    return false;
}

/* Whether machine code for an architecture runs on a GPU: one of the same major number whose minor
 * one is not below. "sm_90a" runs on exactly that. */
static bool runs_on(const char *architecture, const struct gpu *gpu)
{
    char *end;
    int wanted = (int)strtol(architecture + strlen("sm_"), &end, 10);
    int capability = 10 * gpu->major + gpu->minor;
    if (*end != '\0' || is_jetson(wanted) || is_jetson(capability))
        return wanted == capability;
    return wanted / 10 == gpu->major && wanted % 10 <= gpu->minor;
}

static const char *target_for(const struct gpu *gpu)
{
    for (size_t i = 0; i < sizeof TARGETS / sizeof *TARGETS; i++)
        if (TARGETS[i].major == gpu->major &&
            (TARGETS[i].minor < 0 || TARGETS[i].minor == gpu->minor))
            return TARGETS[i].target;
    return NULL;
}

/* Say what the bundle is for, behind what is missing. */
static int refuse(const char *next)
{
    char why[ERROR_TEXT_BYTES];
    snprintf(why, sizeof why, "%s", error_text());
    error_set("%s. This bundle is for GPUs of architecture %s. %s", why, kernel_architecture, next);
    return MODEL_WRONG_CPU;
}

static int attribute(int *value, int which, CUdevice device)
{
    return CUDA(cuDeviceGetAttribute, value, which, device);
}

static int read_facts(struct gpu *gpu)
{
    int integrated;
    size_t memory_bytes;
    if (CUDA(cuDeviceGet, &gpu->device, 0) != 0 ||
        CUDA(cuDeviceGetName, gpu->name, (int)sizeof gpu->name, gpu->device) != 0 ||
        CUDA(cuDeviceTotalMem_v2, &memory_bytes, gpu->device) != 0 ||
        attribute(&gpu->major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, gpu->device) != 0 ||
        attribute(&gpu->minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, gpu->device) != 0 ||
        attribute(&gpu->multiprocessors, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
                  gpu->device) != 0 ||
        attribute(&integrated, CU_DEVICE_ATTRIBUTE_INTEGRATED, gpu->device) != 0 ||
        attribute(&gpu->shared_limit_bytes, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
                  gpu->device) != 0)
        return -1;
    gpu->integrated = integrated != 0;
    gpu->memory_bytes = memory_bytes;
    if (cuda.cuDeviceGetPCIBusId(gpu->pci_bus_id, (int)sizeof gpu->pci_bus_id, gpu->device) !=
        CUDA_SUCCESS)
        gpu->pci_bus_id[0] = '\0'; /* some boards have none */
    return 0;
}

int gpu_find(struct gpu *gpu)
{
    static const char DRIVER[] = "Install a driver for it, or build for a CPU: edgepress run -t "
                                 "native.";
    static const char GPU[] = "Run it where there is one, or build for a CPU: edgepress run -t "
                              "native.";
    int count = 0;
    memset(gpu, 0, sizeof *gpu);
    if (cuda_load() != 0)
        return refuse(DRIVER);
    CUresult code = cuda.cuInit(0);
    if (code != CUDA_SUCCESS) {
        cuda_check(code, "cuInit");
        return refuse(code == CUDA_ERROR_NO_DEVICE ? GPU : DRIVER);
    }
    if (CUDA(cuDeviceGetCount, &count) != 0)
        return refuse(GPU);
    if (count == 0) {
        error_set("the driver shows no GPU");
        return refuse(GPU);
    }
    if (read_facts(gpu) != 0)
        return refuse(GPU);
    if (runs_on(kernel_architecture, gpu))
        return MODEL_OK;
    const char *target = target_for(gpu);
    error_set("the GPU %s has architecture sm_%d%d, but this bundle is for %s.%s%s%s%s", gpu->name,
              gpu->major, gpu->minor, kernel_architecture,
              target != NULL ? " Build it for the target " : " No target of edgepress is for it",
              target != NULL ? target : "", ".",
              count > 1 ? " CUDA_VISIBLE_DEVICES chooses another GPU." : "");
    return MODEL_WRONG_CPU;
}
