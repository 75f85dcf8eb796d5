#include "cuda_api.h"

#include <dlfcn.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "error.h"

struct cuda_api cuda;
CUresult (*cuda_launch_extended)(const struct cuda_launch_config *, CUfunction, void **, void **);

static const struct {
    const char *name;
    size_t offset;
} FUNCTIONS[] = {
#define ROW(function, parameters) {#function, offsetof(struct cuda_api, function)},
    CUDA_FUNCTIONS(ROW)
#undef ROW
};

/* The library stays: threads of the driver's may run in it for as long as the process does. */
static void *library;

static bool loaded;

int cuda_load(void)
{
    if (loaded)
        return 0;
    if (library == NULL)
        library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        error_set("no NVIDIA driver: %s", dlerror());
        return -1;
    }
    for (size_t i = 0; i < sizeof FUNCTIONS / sizeof *FUNCTIONS; i++) {
        void *address = dlsym(library, FUNCTIONS[i].name);
        if (address == NULL) {
            int version = cuda_version();
            error_set("the NVIDIA driver is too old: it is of CUDA %d.%d and has no %s, which all "
                      "from CUDA 11.4 on have", version / 1000, version % 1000 / 10,
                      FUNCTIONS[i].name);
            return -1;
        }
        memcpy((char *)&cuda + FUNCTIONS[i].offset, &address, sizeof address);
    }
    void *extended = dlsym(library, "cuLaunchKernelEx");
    memcpy(&cuda_launch_extended, &extended, sizeof extended);
    loaded = true;
    return 0;
}

int cuda_version(void)
{
    int version = 0;
    if (cuda.cuDriverGetVersion == NULL || cuda.cuDriverGetVersion(&version) != CUDA_SUCCESS)
        return 0;
    return version;
}

/* How much memory the GPU has left, as the end of a message; nothing without a context. */
static void say_what_is_free(char *text, size_t bytes)
{
    CUcontext context = NULL;
    size_t left, all;
    text[0] = '\0';
    if (cuda.cuCtxGetCurrent(&context) == CUDA_SUCCESS && context != NULL &&
        cuda.cuMemGetInfo_v2(&left, &all) == CUDA_SUCCESS)
        snprintf(text, bytes, "; %zu of %zu bytes of the GPU's memory are free", left, all);
}

int cuda_check(CUresult code, const char *what)
{
    if (code == CUDA_SUCCESS)
        return 0;
    const char *name = NULL, *text = NULL;
    char memory[128] = "";
    if (cuda.cuGetErrorName(code, &name) != CUDA_SUCCESS || name == NULL)
        name = "an error that the driver has no name for";
    if (cuda.cuGetErrorString(code, &text) != CUDA_SUCCESS || text == NULL)
        text = "no description";
    if (code == CUDA_ERROR_OUT_OF_MEMORY)
        say_what_is_free(memory, sizeof memory);
    error_set("%s failed: %s: %s%s", what, name, text, memory);
    return -1;
}
