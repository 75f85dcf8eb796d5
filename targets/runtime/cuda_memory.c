#include "cuda_memory.h"

#include <stdlib.h>
#include <string.h>

#include "description.h"
#include "error.h"

/* What kernels take for granted of every tensor. */
enum { ALIGNMENT_BYTES = 256 };

static uint64_t aligned(uint64_t bytes)
{
    return (bytes + ALIGNMENT_BYTES - 1) / ALIGNMENT_BYTES * ALIGNMENT_BYTES;
}

static uint64_t *offsets_for(int count)
{
    uint64_t *offsets = calloc((size_t)count + 1, sizeof *offsets);
    if (offsets == NULL)
        error_set("no memory");
    return offsets;
}

/* Allocate on the GPU; 0 bytes are none. */
static int allocate(CUdeviceptr *device, uint64_t bytes, const char *what,
                    struct cuda_memory *memory)
{
    if (bytes == 0)
        return 0;
    CUresult code = bytes <= SIZE_MAX ? cuda.cuMemAlloc_v2(device, (size_t)bytes)
                                      : CUDA_ERROR_OUT_OF_MEMORY;
    if (code == CUDA_SUCCESS) {
        memory->bytes += bytes;
        return 0;
    }
    *device = 0;
    size_t left = 0, all = 0;
    if (code != CUDA_ERROR_OUT_OF_MEMORY || cuda.cuMemGetInfo_v2(&left, &all) != CUDA_SUCCESS)
        return cuda_check(code, "cuMemAlloc_v2");
    error_set("no memory on the GPU for %llu bytes of %s: %zu of %zu bytes are free, and the model "
              "has %llu by now. End other programs that use it.", (unsigned long long)bytes, what,
              left, all, (unsigned long long)memory->bytes);
    return -1;
}

/* Lay the weights out, the same bytes once. */
static uint64_t place_weights(uint64_t *offsets, const void *const *weights)
{
    uint64_t end = 0;
    for (int i = 0; i < description.weight_count; i++) {
        int earlier = 0;
        while (earlier < i && (weights[earlier] != weights[i] ||
                               description.weight_sizes[earlier] != description.weight_sizes[i]))
            earlier++;
        offsets[i] = earlier < i ? offsets[earlier] : end;
        if (earlier == i)
            end += aligned(description.weight_sizes[i]);
    }
    return end;
}

static int open_weights(struct cuda_memory *memory, const void *const *weights, CUstream stream)
{
    memory->weight_offsets = offsets_for(description.weight_count);
    if (memory->weight_offsets == NULL)
        return -1;
    uint64_t bytes = place_weights(memory->weight_offsets, weights), copied = 0;
    if (allocate(&memory->weights, bytes, "weights", memory) != 0)
        return -1;
    for (int i = 0; i < description.weight_count; i++) {
        uint64_t at = memory->weight_offsets[i], size = description.weight_sizes[i];
        if (size == 0 || at < copied)
            continue;
        if (CUDA(cuMemcpyHtoDAsync_v2, memory->weights + at, weights[i], (size_t)size, stream) != 0)
            return -1;
        copied = at + size;
    }
    return CUDA(cuStreamSynchronize, stream);
}

static int open_exchange(struct cuda_exchange *exchange, const struct model_tensor *tensors,
                         int count, const char *what, struct cuda_memory *memory)
{
    exchange->offsets = offsets_for(count);
    if (exchange->offsets == NULL)
        return -1;
    for (int i = 0; i < count; i++) {
        exchange->offsets[i] = exchange->bytes;
        exchange->bytes += aligned(tensors[i].bytes);
    }
    if (exchange->bytes == 0)
        return 0;
    if (allocate(&exchange->device, exchange->bytes, what, memory) != 0)
        return -1;
    void *host = NULL;
    if (CUDA(cuMemHostAlloc, &host, (size_t)exchange->bytes, 0) != 0)
        return -1;
    exchange->host = host;
    memset(host, 0, (size_t)exchange->bytes);
    return 0;
}

/* Memory that is zero whenever a kernel begins that counts in it. */
static int open_counters(struct cuda_memory *memory, CUstream stream)
{
    uint64_t bytes = 0;
    for (int call = 0; call < description.call_count; call++) {
        uint64_t wanted = sizeof(uint32_t) * (uint64_t)launches[call].counters;
        bytes = wanted > bytes ? wanted : bytes;
    }
    if (bytes == 0)
        return 0;
    if (allocate(&memory->counters, bytes, "counters", memory) != 0)
        return -1;
    return CUDA(cuMemsetD8Async, memory->counters, 0, (size_t)bytes, stream);
}

int cuda_memory_open(struct cuda_memory *memory, const void *const *weights, CUstream stream)
{
    if (open_weights(memory, weights, stream) != 0 ||
        allocate(&memory->arena, description.arena_bytes, "activations", memory) != 0 ||
        open_exchange(&memory->inputs, description.inputs, description.input_count, "inputs",
                      memory) != 0 ||
        open_exchange(&memory->outputs, description.outputs, description.output_count, "outputs",
                      memory) != 0)
        return -1;
    return open_counters(memory, stream);
}

CUdeviceptr cuda_place(const struct cuda_memory *memory, const struct place *place)
{
    switch (place->kind) {
    case PLACE_WEIGHT: return memory->weights + memory->weight_offsets[place->at];
    case PLACE_INPUT: return memory->inputs.device + memory->inputs.offsets[place->at];
    case PLACE_OUTPUT: return memory->outputs.device + memory->outputs.offsets[place->at];
    case PLACE_ARENA: break;
    }
    return memory->arena + place->at;
}

static void close_exchange(struct cuda_exchange *exchange)
{
    if (exchange->device != 0)
        (void)cuda.cuMemFree_v2(exchange->device);
    if (exchange->host != NULL)
        (void)cuda.cuMemFreeHost(exchange->host);
    free(exchange->offsets);
}

void cuda_memory_close(struct cuda_memory *memory)
{
    const CUdeviceptr own[] = {memory->weights, memory->arena, memory->counters};
    for (size_t i = 0; i < sizeof own / sizeof *own; i++)
        if (own[i] != 0)
            (void)cuda.cuMemFree_v2(own[i]);
    close_exchange(&memory->inputs);
    close_exchange(&memory->outputs);
    free(memory->weight_offsets);
    memset(memory, 0, sizeof *memory);
}
