// The memory of workers: stacks, shared memory, and the bounds of both; failures.
#include <link.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "scheduler.h"

namespace emulator {

static const size_t PAGE_BYTES = 4096;
static const size_t SHARED_ALIGNMENT_BYTES = 128;

const char *operation_name(Operation operation)
{
    static const char *const NAMES[] = {
        "__syncwarp",    "__shfl_sync", "__shfl_xor_sync", "__shfl_down_sync",
        "__shfl_up_sync", "a vote",     "ldmatrix",        "ldmatrix",
        "ldmatrix",      "ldmatrix",    "mma_f16",         "mma_tf32",
        "mma_s8",        "__syncthreads", "exit"};
    return NAMES[(int)operation];
}

// Failures ----------------------------------------------------------------------------------------

static void record(Launch &launch, const Thread *thread, const char *format, va_list list)
{
    static pthread_mutex_t first_only = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&first_only);
    if (!launch.failed) {
        char what[768];
        vsnprintf(what, sizeof what, format, list);
        if (thread)
            snprintf(launch.error, sizeof launch.error,
                     "%s, block (%u, %u, %u), thread (%u, %u, %u): %s", launch.kernel.name,
                     thread->block.x, thread->block.y, thread->block.z, thread->thread.x,
                     thread->thread.y, thread->thread.z, what);
        else
            snprintf(launch.error, sizeof launch.error, "%s: %s", launch.kernel.name, what);
        __atomic_store_n(&launch.failed, 1, __ATOMIC_SEQ_CST);
    }
    pthread_mutex_unlock(&first_only);
}

void record_failure(Launch &launch, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    record(launch, nullptr, format, list);
    va_end(list);
}

// Leaves the stacks of the block's threads as they are: the next block writes them anew.
void fail(const char *format, ...)
{
    Fiber *self = (Fiber *)current;
    va_list list;
    va_start(list, format);
    record(*self->worker->launch, self, format, list);
    va_end(list);
    switch_stacks(&self->stack_pointer, self->worker->stack_pointer);
    abort();
}

static void fault(int, siginfo_t *information, void *)
{
    if (!current) {
        signal(SIGSEGV, SIG_DFL);
        raise(SIGSEGV);
        return;
    }
    if (information->si_code <= 0 || information->si_code == SI_KERNEL)
        fail("no memory has such an address"); // no user's address, or not aligned as it must be
    fail("there is no memory at %p", information->si_addr);
}

static struct sigaction earlier_segv, earlier_bus;

static void handle_faults()
{
    struct sigaction action = {};
    action.sa_sigaction = fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &earlier_segv);
    sigaction(SIGBUS, &action, &earlier_bus);
}

static void forget_faults()
{
    sigaction(SIGSEGV, &earlier_segv, nullptr);
    sigaction(SIGBUS, &earlier_bus, nullptr);
}

// Memory ------------------------------------------------------------------------------------------

static void *map(size_t bytes)
{
    void *memory =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
             -1, 0);
    if (memory == MAP_FAILED) {
        perror("emulator: mmap");
        abort();
    }
    return memory;
}

// Stacks whose tops are all at the same place of a page would share one set of the cache.
static void make_fibers(Worker &worker, unsigned count)
{
    if (count <= worker.fibers_made)
        return;
    unsigned more = count - worker.fibers_made;
    unsigned char *stacks = (unsigned char *)map(more * STACK_BYTES);
    for (unsigned i = 0; i < more; ++i) {
        unsigned char *stack = stacks + i * STACK_BYTES;
        mprotect(stack, PAGE_BYTES, PROT_NONE);
        size_t colour = worker.fibers_made % 59 * 64 + worker.fibers_made / 59 % 4 * 16;
        worker.fibers[worker.fibers_made++].stack = stack + STACK_BYTES - 64 - colour;
    }
}

static Worker *make_worker()
{
    Worker *worker = (Worker *)map(sizeof(Worker));
    unsigned char *shared =
        (unsigned char *)map(MOST_SHARED_BYTES + SHARED_GUARD_BYTES + 2 * PAGE_BYTES);
    worker->shared = shared + SHARED_ALIGNMENT_BYTES; // aligned to no more than is promised
    worker->signal_stack = map(SIGNAL_STACK_BYTES);
    return worker;
}

void enter_faults(Worker &worker)
{
    stack_t stack = {};
    stack.ss_sp = worker.signal_stack;
    stack.ss_size = SIGNAL_STACK_BYTES;
    sigaltstack(&stack, &worker.earlier_signal_stack);
}

void leave_faults(Worker &worker)
{
    sigaltstack(&worker.earlier_signal_stack, nullptr);
}

void run_workers(Launch &launch, unsigned count, void *(*work)(void *worker))
{
    static Worker *workers[MOST_WORKERS];
    pthread_t threads[MOST_WORKERS];
    bool started[MOST_WORKERS] = {};
    if (count > MOST_WORKERS)
        count = MOST_WORKERS;
    handle_faults();
    for (unsigned i = 0; i < count; ++i) {
        if (!workers[i])
            workers[i] = make_worker();
        workers[i]->launch = &launch;
        make_fibers(*workers[i], (launch.threads + LANES - 1) / LANES * LANES);
        if (i)
            started[i] = pthread_create(&threads[i], nullptr, work, workers[i]) == 0;
    }
    work(workers[0]);
    for (unsigned i = 1; i < count; ++i)
        if (started[i])
            pthread_join(threads[i], nullptr);
    forget_faults();
}

// Shared memory -----------------------------------------------------------------------------------

struct Search {
    uintptr_t code;
    void *memory;
    size_t bytes;
    uintptr_t base, start, end; // of the library
};

static int look_at_library(struct dl_phdr_info *library, size_t, void *argument)
{
    Search &search = *(Search *)argument;
    bool found = false;
    size_t bytes = 0;
    uintptr_t first = UINTPTR_MAX, last = 0;
    for (int i = 0; i < library->dlpi_phnum; ++i) {
        const ElfW(Phdr) &part = library->dlpi_phdr[i];
        uintptr_t start = library->dlpi_addr + part.p_vaddr;
        if (part.p_type == PT_LOAD) {
            found = found || search.code - start < part.p_memsz;
            first = start < first ? start : first;
            last = start + part.p_memsz > last ? start + part.p_memsz : last;
        }
        if (part.p_type == PT_TLS)
            bytes = part.p_memsz;
    }
    if (found) {
        search = {search.code, library->dlpi_tls_data, bytes, library->dlpi_addr, first, last};
    }
    return found;
}

// The static shared memory of all kernels of a library is this thread's part of its thread-local
// memory, which exists once it has been touched.
void find_static_shared(Worker &worker)
{
    const Kernel &kernel = worker.launch->kernel;
    kernel.static_shared();
    Search search = {(uintptr_t)kernel.enter, nullptr, 0, 0, 0, 0};
    dl_iterate_phdr(look_at_library, &search);
    worker.static_shared = search.memory;
    worker.static_shared_bytes = search.memory ? search.bytes : 0;
    worker.library_base = search.base;
    worker.library_start = search.start;
    worker.library_bytes = search.end - search.start;
}

void check_shared(const Worker &worker, const void *address, unsigned bytes, const char *what)
{
    uintptr_t first = (uintptr_t)address, last = first + bytes;
    uintptr_t dynamic = (uintptr_t)worker.shared, fixed = (uintptr_t)worker.static_shared;
    bool inside = (first >= dynamic && last <= dynamic + worker.launch->shared_bytes) ||
                  (first >= fixed && last <= fixed + worker.static_shared_bytes);
    if (!inside)
        fail("%s at %p, which is not in shared memory (byte %ld of %u)", what, address,
             (long)(first - dynamic), worker.launch->shared_bytes);
    if (first % bytes)
        fail("%s of %u bytes at byte %ld of shared memory, which is not aligned", what, bytes,
             (long)(first - dynamic));
}

void check_shared_guard(Worker &worker)
{
    unsigned char expected[SHARED_GUARD_BYTES + 1];
    unsigned offset = worker.launch->shared_bytes % 2; // the pattern has two bytes
    fill_with_garbage(expected, sizeof expected);
    const unsigned char *guard = worker.shared + worker.launch->shared_bytes;
    for (unsigned i = 0; i + offset < SHARED_GUARD_BYTES; ++i)
        if (guard[i] != expected[i + offset])
            return record_failure(*worker.launch, "wrote behind its %u bytes of shared memory",
                                  worker.launch->shared_bytes);
}

} // namespace emulator
