// Runs the blocks of a launch: threads as fibers, warp by warp from barrier to barrier.
//
// The lanes of a warp take turns: each runs to its next collective operation, and the last to
// arrive computes it for all. At a barrier the warp waits until all warps of the block are there.
// The order of lanes, warps and blocks is free on a GPU, and is varied here, so that a result that
// depends on it, for want of a barrier, comes out wrong. Copies by cp.async arrive as late as is
// allowed, when their thread waits for them, or as early: at once.
//
// Stricter than a GPU: lanes that have left may not be missing at a barrier, and collective
// operations are of whole warps. Blocks run to their end, so that none can wait for a later one.
#include "scheduler.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

namespace emulator {

thread_local Thread *current __attribute__((tls_model("initial-exec")));

static Settings settings;

extern "C" void emulator_configure(int order, unsigned seed, unsigned workers,
                                   unsigned shared_limit_bytes)
{
    settings = {(Order)order, seed, workers, shared_limit_bytes};
}

static long number_of(const char *variable, long otherwise)
{
    const char *text = getenv(variable);
    return text && *text ? strtol(text, nullptr, 10) : otherwise;
}

// For programs that do not call emulator_configure(); the order by its number.
__attribute__((constructor)) static void read_environment()
{
    settings.order = (Order)number_of("CUDA_EMULATION_ORDER", 0);
    settings.seed = (unsigned)number_of("CUDA_EMULATION_SEED", 0);
    settings.workers = (unsigned)number_of("CUDA_EMULATION_WORKERS", 1);
}

// Two bytes of NaN in float16, four of NaN in float32, and conspicuous integers.
void fill_with_garbage(void *memory, size_t bytes)
{
    static const unsigned char GARBAGE[2] = {0xa5, 0xff};
    unsigned char *to = (unsigned char *)memory;
    if (bytes >= 2) {
        uint16_t word;
        memcpy(&word, GARBAGE, 2);
        for (size_t i = 0; i + 1 < bytes; i += 2)
            memcpy(to + i, &word, 2);
    }
    if (bytes % 2)
        to[bytes - 1] = GARBAGE[0];
}

static uint32_t random_number(Worker &worker)
{
    worker.random = worker.random * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(worker.random >> 33);
}

static void shuffle_indices(Worker &worker, unsigned short *indices, unsigned count)
{
    for (unsigned i = count; i > 1; --i) {
        unsigned j = random_number(worker) % i;
        unsigned short swapped = indices[i - 1];
        indices[i - 1] = indices[j];
        indices[j] = swapped;
    }
}

// Put the indices below `count` into the order of this phase of this block.
static void order_indices(Worker &worker, unsigned short *indices, unsigned count)
{
    bool backward = settings.order == Order::BACKWARD ||
                    (settings.order == Order::ALTERNATING && (worker.turn + worker.phase) % 2);
    for (unsigned i = 0; i < count; ++i)
        indices[i] = (unsigned short)(backward ? count - 1 - i : i);
    if (settings.order == Order::SHUFFLED)
        shuffle_indices(worker, indices, count);
}

static Fiber *next_fiber(Warp &warp)
{
    warp.position = warp.position + 1 == warp.lanes ? 0 : warp.position + 1;
    return warp.fibers + warp.order[warp.position];
}

static void check_rows(const Warp &warp)
{
    bool four = warp.operation == Operation::LDMATRIX_X4 ||
                warp.operation == Operation::LDMATRIX_X4_TRANSPOSED;
    for (unsigned lane = 0; lane < (four ? 32 : 16); ++lane) {
        check_shared(*warp.fibers->worker, warp.operands[lane].a, 16, "ldmatrix");
        note_row(warp.fibers[lane], warp.operands[lane].a);
    }
}

void collective(Operation operation, const Operands &operands, Site site)
{
    Fiber *self = (Fiber *)current;
    Warp &warp = *self->warp;
    if (warp.arrived == 0) {
        warp.operation = operation;
        warp.site = site;
    } else if (operation != warp.operation || site.line != warp.site.line ||
               site.file != warp.site.file) {
        fail("the lanes of a warp diverge: one is at %s (%s:%d), another at %s (%s:%d)",
             operation_name(warp.operation), warp.site.file, warp.site.line,
             operation_name(operation), site.file, site.line);
    }
    warp.operands[self->lane] = operands;
    if (++warp.arrived < warp.lanes) {
        Fiber *next = next_fiber(warp);
        current = next;
        switch_stacks(&self->stack_pointer, next->stack_pointer);
        return;
    }
    warp.arrived = 0;
    if (operation == Operation::BARRIER || operation == Operation::EXIT) {
        switch_stacks(&self->stack_pointer, self->worker->stack_pointer);
        return;
    }
    if (operation == Operation::SYNCWARP) {
        ++warp.phase;
    } else {
        if (warp.lanes < LANES)
            fail("%s:%d: %s in a warp of %u lanes", site.file, site.line,
                 operation_name(operation), warp.lanes);
        if (operation >= Operation::LDMATRIX_X4 && operation <= Operation::LDMATRIX_X2_TRANSPOSED)
            check_rows(warp);
        compute(operation, warp.operands);
    }
}

// The first function of every fiber; it never returns.
static void fiber_main()
{
    Fiber *self = (Fiber *)current;
    self->worker->launch->kernel.enter(self->worker->launch->arguments);
    collective(Operation::EXIT, {}, {"the end of the kernel", 0});
    abort();
}

static void start_warp(Worker &worker, unsigned index, const Index &block)
{
    const Launch &launch = *worker.launch;
    Warp &warp = worker.warps[index];
    warp.fibers = worker.fibers + index * LANES;
    warp.lanes = launch.threads - index * LANES < LANES ? launch.threads - index * LANES : LANES;
    warp.arrived = warp.phase = 0;
    for (unsigned lane = 0; lane < warp.lanes; ++lane) {
        unsigned thread = index * LANES + lane;
        Fiber &fiber = warp.fibers[lane];
        fiber.thread = {thread % launch.block.x, thread / launch.block.x % launch.block.y,
                        thread / launch.block.x / launch.block.y};
        fiber.block = block;
        fiber.threads = launch.block;
        fiber.blocks = launch.grid;
        fiber.lane = lane;
        fiber.waited = false;
        fiber.shared = worker.shared;
        fiber.warp = &warp;
        fiber.worker = &worker;
        fiber.stack_pointer = prepare_stack(fiber.stack, fiber_main);
        fiber.copies.first = fiber.copies.count = fiber.copies.group = 0;
    }
}

// Run a warp until all of its lanes are at a barrier or at the end. False where the launch failed.
static bool resume_warp(Worker &worker, Warp &warp)
{
    order_indices(worker, warp.order, warp.lanes);
    warp.position = 0;
    Fiber *first = warp.fibers + warp.order[0];
    current = first;
    switch_stacks(&worker.stack_pointer, first->stack_pointer);
    current = nullptr;
    return !worker.launch->failed;
}

static bool same_place(const Warp &a, const Warp &b)
{
    return a.operation == b.operation && a.site.line == b.site.line && a.site.file == b.site.file;
}

static void run_block(Worker &worker, uint64_t number)
{
    Launch &launch = *worker.launch;
    unsigned warps = (launch.threads + LANES - 1) / LANES;
    Index block = {(unsigned)(number % launch.grid.x),
                   (unsigned)(number / launch.grid.x % launch.grid.y),
                   (unsigned)(number / launch.grid.x / launch.grid.y)};
    worker.number = number;
    worker.turn = block.x + block.y + block.z;
    worker.random = (uint64_t)settings.seed << 32 ^ number;
    worker.copies_wait = settings.order == Order::BACKWARD ? false : worker.turn % 2 == 0;
    if (settings.order == Order::FORWARD)
        worker.copies_wait = true;
    fill_with_garbage(worker.shared, launch.shared_bytes + SHARED_GUARD_BYTES);
    fill_with_garbage(worker.static_shared, worker.static_shared_bytes);
    for (unsigned i = 0; i < warps; ++i)
        start_warp(worker, i, block);
    unsigned short order[MOST_THREADS / LANES];
    for (worker.phase = 0;; ++worker.phase) {
        order_indices(worker, order, warps);
        for (unsigned i = 0; i < warps; ++i) {
            Warp &warp = worker.warps[order[i]], &first = worker.warps[order[0]];
            if (!resume_warp(worker, warp))
                return;
            if (!same_place(first, warp))
                return record_failure(
                    launch,
                    "the warps of a block diverge: one is at %s (%s:%d), another at %s (%s:%d)",
                    operation_name(first.operation), first.site.file, first.site.line,
                    operation_name(warp.operation), warp.site.file, warp.site.line);
        }
        if (worker.warps[0].operation == Operation::EXIT)
            break;
    }
    check_shared_guard(worker);
}

// Blocks in the order of the settings; a step without a common factor reaches each once.
static uint64_t block_at(const Launch &launch, uint64_t turn)
{
    if (settings.order == Order::BACKWARD)
        return launch.blocks - 1 - turn;
    if (settings.order == Order::SHUFFLED)
        return (turn * launch.block_step + settings.seed) % launch.blocks;
    return turn;
}

static void *work(void *argument)
{
    Worker &worker = *(Worker *)argument;
    Launch &launch = *worker.launch;
    find_static_shared(worker);
    enter_faults(worker);
    for (;;) {
        uint64_t turn = __atomic_fetch_add(&launch.turn, 1, __ATOMIC_SEQ_CST);
        if (turn >= launch.blocks || __atomic_load_n(&launch.failed, __ATOMIC_SEQ_CST))
            break;
        run_block(worker, block_at(launch, turn));
    }
    leave_faults(worker);
    return nullptr;
}

static uint64_t greatest_common_divisor(uint64_t a, uint64_t b)
{
    while (b) {
        uint64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

static bool possible(Launch &launch)
{
    const Index &grid = launch.grid, &block = launch.block;
    if (!grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z)
        record_failure(launch, "a launch of nothing");
    else if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
        record_failure(launch, "a grid of (%u, %u, %u) blocks", grid.x, grid.y, grid.z);
    else if (block.x > 1024 || block.y > 1024 || block.z > 64 || launch.threads > MOST_THREADS)
        record_failure(launch, "blocks of (%u, %u, %u) threads", block.x, block.y, block.z);
    else if (launch.shared_bytes > settings.shared_limit_bytes)
        record_failure(launch, "%u bytes of shared memory; a block can have %u",
                       launch.shared_bytes, settings.shared_limit_bytes);
    return !launch.failed;
}

const char *launch(const Kernel &kernel, void **arguments, const unsigned *grid,
                   const unsigned *block, unsigned shared_bytes)
{
    static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;
    static Launch launch;
    pthread_mutex_lock(&one_at_a_time);
    memset(&launch, 0, sizeof launch);
    launch.kernel = kernel;
    launch.arguments = arguments;
    launch.grid = {grid[0], grid[1], grid[2]};
    launch.block = {block[0], block[1], block[2]};
    launch.threads = (uint64_t)block[0] * block[1] * block[2] > MOST_THREADS
                         ? MOST_THREADS + 1
                         : block[0] * block[1] * block[2];
    launch.blocks = (uint64_t)grid[0] * grid[1] * grid[2];
    launch.shared_bytes = shared_bytes;
    if (possible(launch)) {
        launch.block_step = launch.blocks / 3 * 2 + 1;
        while (greatest_common_divisor(launch.block_step, launch.blocks) != 1)
            ++launch.block_step;
        if (kernel.checked)
            forget_shared_accesses();
        unsigned workers = launch.blocks < settings.workers ? (unsigned)launch.blocks
                                                            : settings.workers;
        run_workers(launch, workers && !kernel.checked ? workers : 1, work);
    }
    forget_checks();
    pthread_mutex_unlock(&one_at_a_time);
    return launch.failed ? launch.error : nullptr;
}

} // namespace emulator
