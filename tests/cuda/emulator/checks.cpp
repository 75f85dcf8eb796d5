// Every load and store of a kernel, checked: inside an argument or shared memory, aligned, and not
// in a race with another thread's. Only in libraries that are compiled with -fsanitize=thread, for
// which this takes the place of the sanitizer's own runtime.
//
// Two accesses of the same byte by different threads, one of them a store, are a race unless a
// barrier is between them: __syncthreads(), or within a warp __syncwarp(). Shuffles and matrix
// instructions are none. Bytes that cp.async fills may not be touched until it has been waited for.
// Of global memory, races between blocks are checked unless the kernel has counters, with which
// blocks wait for each other. For each byte the last store and a summary of the last loads are
// kept, so some races are missed; none is invented.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "scheduler.h"

namespace emulator {

static const size_t MOST_SHADOWED_BYTES = 16 << 20;

// Who touched a byte last, and when. Zero: nobody.
struct Access {
    enum Who : uint64_t { ONE_THREAD, LANES_OF_A_WARP, MANY_WARPS };
    uint64_t block : 24, phase : 14, warp_phase : 12, thread : 10, who : 2, under_way : 1, any : 1;
};

struct Cell {
    Access store, load;
};

static const Range *ranges;
static unsigned range_count;
static bool blocks_are_ordered, must_wait;
static Cell *shared_cells, *static_cells;
static size_t static_cell_count;

extern "C" void emulator_check(Range *given, unsigned count, int ordered, int overlaps)
{
    for (unsigned i = 0; i < range_count; ++i)
        free(ranges[i].cells);
    ranges = given;
    range_count = count;
    blocks_are_ordered = ordered;
    must_wait = overlaps;
    for (unsigned i = 0; i < count; ++i)
        if (!given[i].constant && given[i].bytes <= MOST_SHADOWED_BYTES)
            given[i].cells = (Cell *)calloc(given[i].bytes + 1, sizeof(Cell));
}

void forget_checks()
{
    emulator_check(nullptr, 0, 0, 0);
}

static Access own_access(const Fiber &self)
{
    Access access = {};
    access.block = (self.worker->number + 1) & 0xffffff;
    access.phase = self.worker->phase & 0x3fff;
    access.warp_phase = self.warp->phase & 0xfff;
    access.thread = (unsigned)(self.warp - self.worker->warps) * LANES + self.lane;
    access.any = 1;
    return access;
}

// Whether an earlier access of another thread is not known to be over.
static bool races(const Access &earlier, const Access &now, bool shared)
{
    if (!earlier.any)
        return false;
    if (earlier.block != now.block)
        return !shared && !blocks_are_ordered;
    if (earlier.phase != now.phase)
        return false;
    if (earlier.who == Access::MANY_WARPS || earlier.thread / LANES != now.thread / LANES)
        return true;
    if (earlier.warp_phase != now.warp_phase)
        return false;
    return earlier.who != Access::ONE_THREAD || now.who != Access::ONE_THREAD ||
           earlier.thread != now.thread;
}

static void add_load(Access &loads, const Access &now)
{
    if (loads.any && loads.block == now.block && loads.phase == now.phase) {
        bool same_warp = loads.thread / LANES == now.thread / LANES;
        if (!same_warp || loads.who == Access::MANY_WARPS)
            loads.who = Access::MANY_WARPS;
        else if (loads.warp_phase == now.warp_phase && loads.thread != now.thread)
            loads.who = Access::LANES_OF_A_WARP;
        else if (loads.warp_phase != now.warp_phase)
            loads = now;
        return;
    }
    loads = now;
}

static void race(const char *what, const Access &earlier, const char *name, size_t at, long code)
{
    if (earlier.block != ((Fiber *)current)->worker->number + 1)
        fail("%s byte %zu of %s, in a race with block %u [+0x%lx]", what, at, name,
             (unsigned)earlier.block - 1, code);
    fail("%s byte %zu of %s, in a race with thread %u of the block [+0x%lx]", what, at, name,
         (unsigned)earlier.thread, code);
}

static void touch(Cell *cells, size_t at, size_t bytes, bool store, const Access &now, bool shared,
                  const char *name, long code)
{
    for (size_t i = at; i < at + bytes; ++i) {
        Cell &cell = cells[i];
        if (shared && cell.store.any && cell.store.under_way && cell.store.block == now.block)
            fail("%s byte %zu of %s, which cp.async still fills [+0x%lx]",
                 store ? "stores" : "loads", i, name, code);
        if (races(cell.store, now, shared))
            race(store ? "stores" : "loads", cell.store, name, i, code);
        if (store && races(cell.load, now, shared))
            race("stores", cell.load, name, i, code);
        if (store)
            cell.store = now;
        else
            add_load(cell.load, now);
    }
}

// The cells of shared memory; null where the address is somewhere else.
static Cell *shared_cell(const Worker &worker, uintptr_t address, size_t &at, size_t &size)
{
    uintptr_t dynamic = (uintptr_t)worker.shared, fixed = (uintptr_t)worker.static_shared;
    if (address - dynamic < MOST_SHARED_BYTES + SHARED_GUARD_BYTES) {
        if (!shared_cells)
            shared_cells =
                (Cell *)calloc(MOST_SHARED_BYTES + SHARED_GUARD_BYTES, sizeof(Cell));
        at = address - dynamic;
        size = worker.launch->shared_bytes;
        return shared_cells;
    }
    if (address - fixed < worker.static_shared_bytes) {
        if (static_cell_count < worker.static_shared_bytes) {
            free(static_cells);
            static_cell_count = worker.static_shared_bytes;
            static_cells = (Cell *)calloc(static_cell_count, sizeof(Cell));
        }
        at = address - fixed;
        size = worker.static_shared_bytes;
        return static_cells;
    }
    return nullptr;
}

// Cells know blocks by 24 bits of their numbers, and nothing of launches.
void forget_shared_accesses()
{
    if (shared_cells)
        memset(shared_cells, 0, (MOST_SHARED_BYTES + SHARED_GUARD_BYTES) * sizeof(Cell));
    if (static_cells)
        memset(static_cells, 0, static_cell_count * sizeof(Cell));
}

static void check_global(const Fiber &self, uintptr_t address, size_t bytes, bool store,
                         bool atomic, long code)
{
    const char *what = store ? "stores" : "loads";
    for (unsigned i = 0; i < range_count; ++i) {
        const Range &range = ranges[i];
        if (address < range.start || address >= range.start + range.bytes)
            continue;
        size_t at = address - range.start;
        if (bytes > range.bytes - at)
            fail("%s %zu bytes at byte %zu of %zu of argument %u [+0x%lx]", what, bytes, at,
                 range.bytes, i, code);
        if (range.constant && store)
            fail("stores to argument %u, an input [+0x%lx]", i, code);
        if (must_wait && !range.constant && !self.waited)
            fail("%s argument %u before wait_for_previous() [+0x%lx]", what, i, code);
        if (range.cells && !atomic) {
            char name[32];
            snprintf(name, sizeof name, "argument %u", i);
            touch(range.cells, at, bytes, store, own_access(self), false, name, code);
        }
        return;
    }
    if (store || address - self.worker->library_start >= self.worker->library_bytes)
        fail("%s %zu bytes at %#lx, outside all arguments [+0x%lx]", what, bytes,
             (unsigned long)address, code);
}

static void check(const void *pointer, size_t bytes, bool store, bool atomic, const void *caller)
{
    const Fiber *self = (const Fiber *)current;
    if (!self || pointer == (const void *)&current)
        return;
    const Worker &worker = *self->worker;
    uintptr_t address = (uintptr_t)pointer;
    if ((uintptr_t)self->stack - address < STACK_BYTES ||
        address - (uintptr_t)&worker < sizeof worker)
        return;
    long code = (long)((uintptr_t)caller - 1 - worker.library_base);
    size_t at, size;
    Cell *cells = shared_cell(worker, address, at, size);
    if (!cells) {
        if (range_count)
            check_global(*self, address, bytes, store, atomic, code);
        return;
    }
    if (at + bytes > size)
        fail("%s %zu bytes at byte %zu of %zu of shared memory [+0x%lx]",
             store ? "stores" : "loads", bytes, at, size, code);
    if (!atomic)
        touch(cells, at, bytes, store, own_access(*self), true, "shared memory", code);
}

// Asynchronous copies and matrices, which the scheduler reports.

static Cell *checked_cells(const Fiber &self, const void *address, size_t &at)
{
    size_t size;
    bool checked = self.worker->launch->kernel.checked;
    return checked ? shared_cell(*self.worker, (uintptr_t)address, at, size) : nullptr;
}

void note_copy_started(const Copy &copy)
{
    const Fiber &self = *(const Fiber *)current;
    size_t at;
    Cell *cells = checked_cells(self, copy.shared, at);
    if (!cells)
        return;
    touch(cells, at, copy.bytes, true, own_access(self), true, "shared memory (by cp.async)", 0);
    for (size_t i = at; i < at + copy.bytes; ++i)
        cells[i].store.under_way = 1;
    if (copy.global && range_count)
        check_global(self, (uintptr_t)copy.global, copy.bytes, false, false, 0);
}

void note_copy_arrived(const Copy &copy)
{
    const Fiber &self = *(const Fiber *)current;
    size_t at;
    Cell *cells = checked_cells(self, copy.shared, at);
    for (size_t i = 0; cells && i < copy.bytes; ++i)
        cells[at + i].store = own_access(self);
}

// All lanes load the row to which one of them points.
void note_row(const Fiber &lane, const void *row)
{
    size_t at;
    Cell *cells = checked_cells(lane, row, at);
    if (!cells)
        return;
    Access now = own_access(lane);
    now.who = Access::LANES_OF_A_WARP;
    touch(cells, at, 16, false, now, true, "shared memory (by ldmatrix)", 0);
}

} // namespace emulator

// What -fsanitize=thread calls -------------------------------------------------------------------

#define CALLER __builtin_return_address(0)
#define CHECKED_ACCESS(bytes)                                                                      \
    extern "C" void __tsan_read##bytes(void *address)                                              \
    {                                                                                              \
        emulator::check(address, bytes, false, false, CALLER);                                     \
    }                                                                                              \
    extern "C" void __tsan_write##bytes(void *address)                                             \
    {                                                                                              \
        emulator::check(address, bytes, true, false, CALLER);                                      \
    }                                                                                              \
    extern "C" void __tsan_unaligned_read##bytes(void *address)                                    \
    {                                                                                              \
        emulator::check(address, bytes, false, false, CALLER);                                     \
    }                                                                                              \
    extern "C" void __tsan_unaligned_write##bytes(void *address)                                   \
    {                                                                                              \
        emulator::check(address, bytes, true, false, CALLER);                                      \
    }

CHECKED_ACCESS(1)
CHECKED_ACCESS(2)
CHECKED_ACCESS(4)
CHECKED_ACCESS(8)
CHECKED_ACCESS(16)

extern "C" void __tsan_read_range(void *address, size_t bytes)
{
    emulator::check(address, bytes, false, false, CALLER);
}

extern "C" void __tsan_write_range(void *address, size_t bytes)
{
    emulator::check(address, bytes, true, false, CALLER);
}

extern "C" void __tsan_init()
{
}

extern "C" void __tsan_func_entry(void *)
{
}

extern "C" void __tsan_func_exit()
{
}

extern "C" int __tsan_atomic32_fetch_add(volatile int *address, int value, int)
{
    emulator::check((const void *)address, 4, true, true, CALLER);
    return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}

extern "C" int __tsan_atomic32_exchange(volatile int *address, int value, int)
{
    emulator::check((const void *)address, 4, true, true, CALLER);
    return __atomic_exchange_n(address, value, __ATOMIC_SEQ_CST);
}

extern "C" void __tsan_atomic_thread_fence(int)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

// What -fsanitize=alignment and -fsanitize=bounds call --------------------------------------------

struct SourceLocation {
    const char *file;
    uint32_t line, column;
};

struct TypeMismatch {
    SourceLocation location;
    const void *type;
    unsigned char log_alignment, kind;
};

extern "C" void __ubsan_handle_type_mismatch_v1(const TypeMismatch *data, uintptr_t address)
{
    if (emulator::current)
        emulator::fail("%s:%u: %#lx is not a multiple of %u", data->location.file,
                       data->location.line, (unsigned long)address, 1u << data->log_alignment);
}

extern "C" void __ubsan_handle_out_of_bounds(const SourceLocation *location, uintptr_t index)
{
    if (emulator::current)
        emulator::fail("%s:%u: index %ld is outside its array", location->file, location->line,
                       (long)index);
}
