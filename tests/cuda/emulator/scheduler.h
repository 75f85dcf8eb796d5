// What the parts of the scheduler share.
#ifndef SCHEDULER_H
#define SCHEDULER_H

#include <signal.h>
#include <stdarg.h>
#include <stddef.h>

#include "warp.h"

namespace emulator {

static const unsigned MOST_THREADS = 1024;
static const unsigned MOST_WORKERS = 16;
static const unsigned MOST_SHARED_BYTES = 227 * 1024;
static const unsigned SHARED_GUARD_BYTES = 1024;
static const size_t STACK_BYTES = 128 * 1024;
static const size_t SIGNAL_STACK_BYTES = 65536;

// In which order the lanes of a warp, the warps of a block and the blocks run. Alternating: forward
// and backward by turns, from barrier to barrier and from block to block.
enum class Order : int { ALTERNATING, FORWARD, BACKWARD, SHUFFLED };

struct Settings {
    Order order = Order::ALTERNATING;
    unsigned seed = 0;
    unsigned workers = 1;
    unsigned shared_limit_bytes = MOST_SHARED_BYTES;
};

struct Copy {
    void *shared;
    const void *global; // null where zeros are copied
    unsigned bytes, group;
    bool arrived;
};

// A thread's copies that have not arrived; `group` is the group that grows.
struct Copies {
    Copy *list;
    unsigned first, count, capacity, group;
};

// An argument of the launch that comes next, where loads and stores are checked.
struct Cell;
struct Range {
    uintptr_t start;
    size_t bytes;
    int constant; // no kernel writes it
    Cell *cells;
};

struct Worker;
struct Warp;

struct Fiber : Thread {
    void *stack_pointer, *stack; // the stack's highest address
    Warp *warp;
    Worker *worker;
    Copies copies;
};

// Lanes and what they do together; `position` is the place of the lane that runs in `order`.
struct Warp {
    Fiber *fibers;
    unsigned lanes, arrived, position;
    unsigned phase; // how many times it has met in __syncwarp()
    Operation operation;
    Site site;
    unsigned short order[LANES];
    Operands operands[LANES];
};

struct Launch {
    Kernel kernel;
    void **arguments;
    Index grid, block;
    unsigned threads, shared_bytes;
    uint64_t blocks, block_step, turn;
    int failed;
    char error[1024];
};

// A thread of the operating system, which runs one block at a time.
struct Worker {
    Launch *launch;
    void *stack_pointer; // where the worker itself goes on
    unsigned char *shared;
    void *static_shared;
    size_t static_shared_bytes;
    uintptr_t library_base, library_start;
    size_t library_bytes;
    uint64_t number; // of the block
    unsigned turn, phase; // the turn decides which of alternating orders it is
    bool copies_wait;
    uint64_t random;
    void *signal_stack;
    stack_t earlier_signal_stack;
    unsigned fibers_made;
    Fiber fibers[MOST_THREADS];
    Warp warps[MOST_THREADS / LANES];
};

const char *operation_name(Operation operation);
void fill_with_garbage(void *memory, size_t bytes);

// Failures: the first of a launch counts.
void record_failure(Launch &launch, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
void enter_faults(Worker &worker);
void leave_faults(Worker &worker);

// Stacks: save the registers and this stack's pointer, and go on with another's.
extern "C" void switch_stacks(void **saved, void *other);
void *prepare_stack(void *highest, void (*function)());

// Memory of workers.
void run_workers(Launch &launch, unsigned count, void *(*work)(void *worker));
void find_static_shared(Worker &worker);
void check_shared(const Worker &worker, const void *address, unsigned bytes, const char *what);
void check_shared_guard(Worker &worker);

// Checks of loads and stores.
void note_copy_started(const Copy &copy);
void note_copy_arrived(const Copy &copy);
void note_row(const Fiber &lane, const void *row);
void forget_shared_accesses();
void forget_checks();

} // namespace emulator

#endif
