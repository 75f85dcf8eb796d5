/* Modules and their functions: what a cubin has, run in the emulator. */
#define _GNU_SOURCE
#include "driver.h"

#include <dlfcn.h>
#include <elf.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { EM_CUDA_MACHINE = 190, ABI_WITH_MOVED_FLAGS = 8, USUAL_SHARED_BYTES = 48 * 1024 };

struct CUmod_st {
    const unsigned char *image;
    CUfunction functions;
};

/* Since CUDA 13, the second byte of the flags holds the architecture. */
static int architecture(const Elf64_Ehdr *header)
{
    return header->e_ident[EI_ABIVERSION] >= ABI_WITH_MOVED_FLAGS ? header->e_flags >> 8 & 0xff
                                                                 : header->e_flags & 0xff;
}

static CUresult check_image(const void *image)
{
    const Elf64_Ehdr *header = image;
    int capability = stub_capability();
    if (memcmp(header->e_ident, ELFMAG, SELFMAG) != 0 || header->e_machine != EM_CUDA_MACHINE)
        return CUDA_ERROR_INVALID_IMAGE;
    int built_for = architecture(header);
    return built_for / 10 == capability / 10 && built_for <= capability
               ? CUDA_SUCCESS
               : CUDA_ERROR_NO_BINARY_FOR_GPU;
}

STUB_EXPORT cuModuleLoadData(CUmodule *module, const void *image)
{
    STUB_ENTER;
    CUresult checked = image != NULL ? check_image(image) : CUDA_ERROR_INVALID_VALUE;
    if (checked != CUDA_SUCCESS)
        return checked;
    *module = calloc(1, sizeof **module);
    (*module)->image = image;
    stub_count("modules", 1);
    return CUDA_SUCCESS;
}

STUB_EXPORT cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned count,
                               CUjit_option *options, void **values)
{
    (void)count, (void)options, (void)values;
    return cuModuleLoadData(module, image);
}

STUB_EXPORT cuModuleUnload(CUmodule module)
{
    STUB_ENTER;
    CUresult drained = stub_drain();
    if (drained != CUDA_SUCCESS)
        return drained;
    while (module->functions != NULL) {
        CUfunction gone = module->functions;
        module->functions = gone->next;
        memset(gone, 0, sizeof *gone); /* not freed, so that its use is found out */
    }
    free(module);
    stub_count("modules", -1);
    return CUDA_SUCCESS;
}

static const Elf64_Shdr *sections(const unsigned char *image)
{
    return (const Elf64_Shdr *)(image + ((const Elf64_Ehdr *)image)->e_shoff);
}

/* The section of a name, or NULL. */
static const Elf64_Shdr *section(const unsigned char *image, const char *name)
{
    const Elf64_Ehdr *header = (const Elf64_Ehdr *)image;
    const Elf64_Shdr *all = sections(image);
    const char *names = (const char *)image + all[header->e_shstrndx].sh_offset;
    for (int i = 0; i < header->e_shnum; i++)
        if (strcmp(names + all[i].sh_name, name) == 0)
            return &all[i];
    return NULL;
}

static bool has_function(const unsigned char *image, const char *name)
{
    const Elf64_Shdr *table = section(image, ".symtab");
    if (table == NULL)
        return false;
    const Elf64_Sym *symbols = (const Elf64_Sym *)(image + table->sh_offset);
    const char *names = (const char *)image + sections(image)[table->sh_link].sh_offset;
    for (size_t i = 0; i < table->sh_size / sizeof *symbols; i++)
        if (ELF64_ST_TYPE(symbols[i].st_info) == STT_FUNC &&
            ELF64_ST_BIND(symbols[i].st_info) == STB_GLOBAL &&
            strcmp(names + symbols[i].st_name, name) == 0)
            return true;
    return false;
}

static void *emulated(const char *prefix, const char *name)
{
    static void *library;
    char symbol[300];
    if (library == NULL && getenv("CUDA_STUB_KERNELS") != NULL) {
        library = dlopen(getenv("CUDA_STUB_KERNELS"), RTLD_NOW | RTLD_LOCAL);
        if (library == NULL)
            stub_complain(CUDA_ERROR_NOT_FOUND, "%s", dlerror());
    }
    snprintf(symbol, sizeof symbol, "%s%s", prefix, name);
    return library != NULL ? dlsym(library, symbol) : NULL;
}

STUB_EXPORT cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name)
{
    STUB_ENTER;
    if (!has_function(module->image, name))
        return CUDA_ERROR_NOT_FOUND;
    const unsigned *count = emulated("parameters_", name);
    void *run = emulated("run_", name);
    if (count == NULL || run == NULL)
        return stub_complain(CUDA_ERROR_NOT_FOUND, "CUDA_STUB_KERNELS has no %s", name);
    char shared[300];
    snprintf(shared, sizeof shared, ".nv.shared.%s", name);
    const Elf64_Shdr *fixed = section(module->image, shared);
    CUfunction made = calloc(1, sizeof *made);
    snprintf(made->name, sizeof made->name, "%s", name);
    made->module = module;
    memcpy(&made->run, &run, sizeof run);
    made->parameter_count = *count;
    made->static_shared_bytes = fixed != NULL ? (int)fixed->sh_size : 0;
    made->dynamic_limit_bytes = USUAL_SHARED_BYTES - made->static_shared_bytes;
    made->next = module->functions;
    module->functions = made;
    *function = made;
    return CUDA_SUCCESS;
}

STUB_EXPORT cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function)
{
    STUB_ENTER;
    if (function->module == NULL)
        return CUDA_ERROR_INVALID_HANDLE;
    switch ((int)attribute) {
    case 0: *value = 1024; break;                              /* MAX_THREADS_PER_BLOCK */
    case 1: *value = function->static_shared_bytes; break;     /* SHARED_SIZE_BYTES */
    case 3: *value = 0; break;                                 /* LOCAL_SIZE_BYTES */
    case 8: *value = function->dynamic_limit_bytes; break;     /* MAX_DYNAMIC_SHARED_SIZE_BYTES */
    default:
        return stub_complain(CUDA_ERROR_INVALID_VALUE, "no attribute %d of functions",
                             (int)attribute);
    }
    return CUDA_SUCCESS;
}

STUB_EXPORT cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value)
{
    STUB_ENTER;
    if (function->module == NULL)
        return CUDA_ERROR_INVALID_HANDLE;
    if ((int)attribute != 8 || value < 0 ||
        value + function->static_shared_bytes > stub_shared_limit_bytes())
        return CUDA_ERROR_INVALID_VALUE;
    function->dynamic_limit_bytes = value;
    return CUDA_SUCCESS;
}

/* Launches ------------------------------------------------------------------------------------- */

CUresult stub_check_launch(const struct stub_launch *launch)
{
    CUfunction function = launch->function;
    const unsigned *grid = launch->grid, *block = launch->block;
    if (function == NULL || function->module == NULL)
        return stub_complain(CUDA_ERROR_INVALID_HANDLE, "a launch of a function that is gone");
    for (int i = 0; i < 3; i++)
        if (grid[i] == 0 || block[i] == 0 || grid[i] > (i == 0 ? 0x7fffffffu : 65535u) ||
            block[i] > (i == 2 ? 64u : 1024u))
            return stub_complain(CUDA_ERROR_INVALID_VALUE, "%s: %u blocks, %u threads along %c",
                                 function->name, grid[i], block[i], 'x' + i);
    if ((uint64_t)block[0] * block[1] * block[2] > 1024)
        return stub_complain(CUDA_ERROR_INVALID_VALUE, "%s: too many threads", function->name);
    if (launch->shared_bytes > (unsigned)function->dynamic_limit_bytes)
        return stub_complain(CUDA_ERROR_INVALID_VALUE, "%s: %u bytes of shared memory, %d allowed",
                             function->name, launch->shared_bytes, function->dynamic_limit_bytes);
    return CUDA_SUCCESS;
}

/* Parameters become the host's view of them. */
CUresult stub_run(const struct stub_launch *launch)
{
    CUfunction function = launch->function;
    CUresult injected = stub_injected("execute");
    void *arguments[64];
    if (injected != CUDA_SUCCESS)
        return injected;
    if (function->module == NULL)
        return stub_complain(CUDA_ERROR_LAUNCH_FAILED, "a kernel whose module has been unloaded");
    if (function->parameter_count > sizeof arguments / sizeof *arguments)
        return stub_complain(CUDA_ERROR_INVALID_VALUE, "%s: too many parameters", function->name);
    for (unsigned i = 0; i < function->parameter_count; i++) {
        arguments[i] = stub_host_view(launch->parameters[i], 0, function->name);
        if (arguments[i] == NULL)
            return CUDA_ERROR_ILLEGAL_ADDRESS;
    }
    const char *error =
        function->run(arguments, launch->grid, launch->block, launch->shared_bytes);
    if (error != NULL)
        return stub_complain(CUDA_ERROR_LAUNCH_FAILED, "%s", error);
    return stub_check_guards();
}
