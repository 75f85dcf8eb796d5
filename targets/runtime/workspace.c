#include "workspace.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>

#include "error.h"
#include "model.h"
#include "threads.h"

/* Kernels reach these through pointers that are weak in their object file. */
extern void *(*__TVMBackendAllocWorkspace)(int device_type, int device_id, uint64_t bytes,
                                           int dtype_code, int dtype_bits);
extern int (*__TVMBackendFreeWorkspace)(int device_type, int device_id, void *memory);

enum { MAX_BLOCKS = 64 };

static uint8_t *memory;
static uint64_t bytes_per_thread;

/* The blocks that the calling thread holds, from the bottom of its part of the memory upwards. */
static _Thread_local struct {
    uint64_t start;
    uint64_t end;
    bool in_use;
} blocks[MAX_BLOCKS];
static _Thread_local int block_count;

/* A kernel that fails gives nothing back. Blocks of an earlier run are void. */
static unsigned run;
static _Thread_local unsigned blocks_run;

static uint64_t aligned(uint64_t bytes)
{
    return (bytes + MODEL_ALIGNMENT - 1) / MODEL_ALIGNMENT * MODEL_ALIGNMENT;
}

static uint8_t *own_memory(void)
{
    return memory + (uint64_t)threads_index() * bytes_per_thread;
}

static void *allocate(int device_type, int device_id, uint64_t bytes, int dtype_code,
                      int dtype_bits)
{
    (void)device_type, (void)device_id, (void)dtype_code, (void)dtype_bits;
    if (blocks_run != run)
        block_count = 0;
    blocks_run = run;
    if (bytes == 0)
        bytes = 1;
    uint64_t start = block_count > 0 ? blocks[block_count - 1].end : 0;
    uint64_t left = bytes_per_thread - start;
    if (bytes > left || aligned(bytes) > left || block_count == MAX_BLOCKS) {
        error_set("a kernel asks for %llu bytes of workspace, but %llu of %llu are left",
                  (unsigned long long)bytes, (unsigned long long)left,
                  (unsigned long long)bytes_per_thread);
        return NULL;
    }
    blocks[block_count].start = start;
    blocks[block_count].end = start + aligned(bytes);
    blocks[block_count].in_use = true;
    block_count++;
    return own_memory() + start;
}

/* Blocks may be given back in any order; memory is free again once all above it is. */
static int give_back(int device_type, int device_id, void *block)
{
    (void)device_type, (void)device_id;
    uint64_t start = (uint64_t)((uint8_t *)block - own_memory());
    for (int i = 0; i < block_count; i++)
        if (blocks[i].start == start)
            blocks[i].in_use = false;
    while (block_count > 0 && !blocks[block_count - 1].in_use)
        block_count--;
    return 0;
}

void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = allocate;
int (*__TVMBackendFreeWorkspace)(int, int, void *) = give_back;

int workspace_open(uint64_t bytes, int threads)
{
    workspace_close();
    if (bytes == 0)
        return 0;
    uint64_t per_thread = aligned(bytes);
    if (per_thread <= SIZE_MAX / (uint64_t)threads)
        memory = aligned_alloc(MODEL_ALIGNMENT, (size_t)(per_thread * (uint64_t)threads));
    if (memory == NULL) {
        error_set("no memory for %d times %llu bytes of workspace", threads,
                  (unsigned long long)per_thread);
        return -1;
    }
    bytes_per_thread = per_thread;
    return 0;
}

void workspace_close(void)
{
    free(memory);
    memory = NULL;
    bytes_per_thread = 0;
    run++;
}

void workspace_begin_run(void)
{
    run++;
}
