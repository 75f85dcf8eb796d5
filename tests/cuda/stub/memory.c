/* Memory of the device and pinned memory of the host.
 *
 * The device's address A is in the host's memory at A - DISTANCE, so that a host that uses a device
 * address, or gives its own for one, is found out. Every allocation lies between guards, is full of
 * NaN at first, and its addresses are never used again. */
#define _GNU_SOURCE
#include "driver.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { GUARD_BYTES = 1024, ALIGNMENT_BYTES = 512 };

struct allocation {
    CUdeviceptr device;
    size_t bytes;
    bool live;
    struct allocation *next;
};

struct pinned {
    void *memory;
    size_t bytes;
    struct pinned *next;
};

static const size_t SPACE_BYTES = (size_t)1 << 38; /* addresses, not memory */
static unsigned char *space;
static size_t space_used, bytes_in_use;
static struct allocation *allocations;
static struct pinned *pins;

static uint16_t garbage_at(size_t i)
{
    return i % 2 ? 0xff : 0xa5; /* NaN as float16 and as float32 */
}

static void fill_with_garbage(unsigned char *memory, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++)
        memory[i] = (unsigned char)garbage_at(i);
}

static bool is_garbage(const unsigned char *memory, size_t bytes)
{
    size_t i = 0;
    while (i < bytes && memory[i] == garbage_at(i))
        i++;
    return i == bytes;
}

static bool reserve_space(void)
{
    if (space != NULL)
        return true;
    void *memory = mmap(NULL, 2 * SPACE_BYTES, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        return false;
    space = memory;
    return mprotect(space, SPACE_BYTES, PROT_READ | PROT_WRITE) == 0;
}

static unsigned char *host_address(CUdeviceptr device)
{
    return (unsigned char *)(uintptr_t)(device - SPACE_BYTES);
}

STUB_EXPORT cuMemAlloc_v2(CUdeviceptr *memory, size_t bytes)
{
    STUB_ENTER;
    if (stub_capturing())
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (bytes == 0)
        return CUDA_ERROR_INVALID_VALUE;
    size_t taken = (bytes + 2 * GUARD_BYTES + ALIGNMENT_BYTES) / ALIGNMENT_BYTES * ALIGNMENT_BYTES;
    if (bytes > stub_memory_bytes() - bytes_in_use || !reserve_space() ||
        taken > SPACE_BYTES - space_used - ALIGNMENT_BYTES)
        return CUDA_ERROR_OUT_OF_MEMORY;
    struct allocation *allocation = calloc(1, sizeof *allocation);
    /* A multiple of 256 and of nothing more, which is what is promised. */
    unsigned char *host = space + space_used + GUARD_BYTES + ALIGNMENT_BYTES / 2;
    *allocation = (struct allocation){(CUdeviceptr)(uintptr_t)(host + SPACE_BYTES), bytes, true,
                                      allocations};
    allocations = allocation;
    space_used += taken + ALIGNMENT_BYTES;
    bytes_in_use += bytes;
    fill_with_garbage(host - GUARD_BYTES, bytes + 2 * GUARD_BYTES);
    stub_count("device memory", 1);
    *memory = allocation->device;
    return CUDA_SUCCESS;
}

static CUresult check_guards(const struct allocation *allocation)
{
    const unsigned char *host = host_address(allocation->device);
    const unsigned char *end = host + allocation->bytes;
    size_t odd = allocation->bytes % 2; /* the pattern has two bytes */
    if (is_garbage(host - GUARD_BYTES, GUARD_BYTES) &&
        (odd == 0 || *end == garbage_at(1)) && is_garbage(end + odd, GUARD_BYTES - 2))
        return CUDA_SUCCESS;
    return stub_complain(CUDA_ERROR_ILLEGAL_ADDRESS, "something wrote outside %zu bytes of memory",
                         allocation->bytes);
}

CUresult stub_check_guards(void)
{
    CUresult result = CUDA_SUCCESS;
    for (const struct allocation *a = allocations; a != NULL && result == CUDA_SUCCESS; a = a->next)
        if (a->live)
            result = check_guards(a);
    return result;
}

STUB_EXPORT cuMemFree_v2(CUdeviceptr memory)
{
    STUB_ENTER;
    if (stub_capturing())
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    CUresult drained = stub_drain();
    if (drained != CUDA_SUCCESS)
        return drained;
    for (struct allocation *a = allocations; a != NULL; a = a->next) {
        if (!a->live || a->device != memory)
            continue;
        a->live = false;
        bytes_in_use -= a->bytes;
        stub_count("device memory", -1);
        return check_guards(a);
    }
    return stub_complain(CUDA_ERROR_INVALID_VALUE, "cuMemFree of 0x%llx, which is not allocated",
                         memory);
}

STUB_EXPORT cuMemGetInfo_v2(size_t *free_bytes, size_t *total_bytes)
{
    STUB_ENTER;
    *total_bytes = stub_memory_bytes();
    *free_bytes = *total_bytes - bytes_in_use;
    return CUDA_SUCCESS;
}

void *stub_host_view(CUdeviceptr memory, size_t bytes, const char *what)
{
    for (const struct allocation *a = allocations; a != NULL; a = a->next) {
        if (memory < a->device || memory > a->device + a->bytes)
            continue;
        if (!a->live)
            stub_complain(CUDA_ERROR_ILLEGAL_ADDRESS, "%s: 0x%llx has been freed", what, memory);
        else if (bytes > a->bytes - (size_t)(memory - a->device))
            stub_complain(CUDA_ERROR_ILLEGAL_ADDRESS, "%s: %zu bytes at byte %llu of %zu", what,
                          bytes, memory - a->device, a->bytes);
        else
            return host_address(memory);
        return NULL;
    }
    stub_complain(CUDA_ERROR_ILLEGAL_ADDRESS, "%s: 0x%llx is not memory of the device", what,
                  memory);
    return NULL;
}

/* Pinned memory -------------------------------------------------------------------------------- */

STUB_EXPORT cuMemHostAlloc(void **memory, size_t bytes, unsigned flags)
{
    STUB_ENTER;
    if (stub_capturing())
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (bytes == 0 || flags > 7)
        return CUDA_ERROR_INVALID_VALUE;
    struct pinned *pin = calloc(1, sizeof *pin);
    size_t pages = (bytes + 4095) / 4096 * 4096;
    *pin = (struct pinned){aligned_alloc(4096, pages), bytes, pins};
    if (pin->memory == NULL)
        return CUDA_ERROR_OUT_OF_MEMORY;
    fill_with_garbage(pin->memory, pages);
    pins = pin;
    stub_count("pinned memory", 1);
    *memory = pin->memory;
    return CUDA_SUCCESS;
}

STUB_EXPORT cuMemAllocHost_v2(void **memory, size_t bytes)
{
    return cuMemHostAlloc(memory, bytes, 0);
}

STUB_EXPORT cuMemFreeHost(void *memory)
{
    STUB_ENTER;
    CUresult drained = stub_drain();
    if (drained != CUDA_SUCCESS)
        return drained;
    for (struct pinned **pin = &pins; *pin != NULL; pin = &(*pin)->next) {
        if ((*pin)->memory != memory)
            continue;
        struct pinned *gone = *pin;
        *pin = gone->next;
        free(gone->memory);
        free(gone);
        stub_count("pinned memory", -1);
        return CUDA_SUCCESS;
    }
    return stub_complain(CUDA_ERROR_INVALID_VALUE, "cuMemFreeHost of what is not allocated");
}

bool stub_is_pinned(const void *memory, size_t bytes)
{
    for (const struct pinned *pin = pins; pin != NULL; pin = pin->next) {
        uintptr_t first = (uintptr_t)memory, start = (uintptr_t)pin->memory;
        if (first >= start && first - start <= pin->bytes && bytes <= pin->bytes - (first - start))
            return true;
    }
    return false;
}
