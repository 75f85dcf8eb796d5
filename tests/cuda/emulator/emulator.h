// CUDA C++ for g++: what a kernel's text needs besides the files it includes. Included before it.
//
// A block's threads are fibers of one operating-system thread. They run one at a time and change
// places only in collective operations: barriers, shuffles, matrix instructions, and the end.
#ifndef EMULATOR_H
#define EMULATOR_H

#include <stdint.h>

// Not out of <math.h>: in C++ that is most of the time that a small kernel takes to compile.
extern "C" {
int abs(int) noexcept;
float fabsf(float) noexcept, floorf(float) noexcept, ceilf(float) noexcept;
float truncf(float) noexcept, roundf(float) noexcept, rintf(float) noexcept;
float sqrtf(float) noexcept, expf(float) noexcept, exp2f(float) noexcept;
float logf(float) noexcept, log2f(float) noexcept, powf(float, float) noexcept;
float sinf(float) noexcept, cosf(float) noexcept, tanhf(float) noexcept, erff(float) noexcept;
float fmodf(float, float) noexcept, fmaf(float, float, float) noexcept;
double sqrt(double) noexcept;
}
#define isnan(x) __builtin_isnan(x)
#define isinf(x) __builtin_isinf(x)
#define INFINITY __builtin_inff()

#define EMULATED_UNCHECKED __attribute__((no_sanitize("thread")))

namespace emulator {

struct Index {
    unsigned x, y, z;
};

// What a thread knows about itself; the scheduler's part of it is in scheduler.cpp.
struct Thread {
    Index thread, block, threads, blocks;
    unsigned lane;
    bool waited; // has called wait_for_previous()
    unsigned char *shared;
};

// The thread that runs. Fibers never move to another thread of the operating system.
extern thread_local Thread *current __attribute__((tls_model("initial-exec")));

// What all lanes of a warp do together.
enum class Operation : int {
    SYNCWARP,
    SHUFFLE,
    SHUFFLE_XOR,
    SHUFFLE_DOWN,
    SHUFFLE_UP,
    BALLOT,
    LDMATRIX_X4,
    LDMATRIX_X4_TRANSPOSED,
    LDMATRIX_X2,
    LDMATRIX_X2_TRANSPOSED,
    MMA_F16,
    MMA_TF32,
    MMA_S8,
    BARRIER,
    EXIT,
};

// What one lane gives to a collective operation and where it takes the result.
struct Operands {
    void *result;
    const void *a, *b;
    unsigned parameter;
};

struct Site {
    const char *file;
    int line;
};

// Wait until all lanes of the warp (for a barrier: all threads of the block) are here.
void collective(Operation operation, const Operands &operands, Site site);
// Report what a GPU would not have done, and end the launch.
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

void copy_later(void *shared, const void *global, unsigned bytes, bool keep);
void commit_copies();
void wait_for_copies(unsigned groups_left);

struct Kernel {
    const char *name;
    void (*enter)(void **arguments);
    void *(*static_shared)(); // an address in this thread's thread-local memory of the library
    bool checked;             // whether checks.cpp sees its loads and stores
};

#ifdef __SANITIZE_THREAD__
static const bool CHECKED = true;
#else
static const bool CHECKED = false;
#endif

// Run all blocks. Returns null, or what went wrong, until the next launch.
const char *launch(const Kernel &kernel, void **arguments, const unsigned *grid,
                   const unsigned *block, unsigned shared_bytes);

// Calls a kernel with its arguments out of an array of pointers.
template <class... T>
struct Caller {
    static constexpr unsigned PARAMETERS = sizeof...(T);
    template <unsigned... I>
    struct Places {
    };
    template <unsigned... I>
    EMULATED_UNCHECKED static void call(void (*kernel)(T...), void **arguments, Places<I...>)
    {
        kernel((T)arguments[I]...);
    }
    EMULATED_UNCHECKED static void call(void (*kernel)(T...), void **arguments)
    {
        call(kernel, arguments, Places<__integer_pack(sizeof...(T))...>());
    }
};

template <class... T>
constexpr Caller<T...> caller_of(void (*)(T...))
{
    return {};
}

template <class T>
T shuffle(Operation operation, Site site, unsigned mask, T value, unsigned parameter,
          int width = 32)
{
    static_assert(sizeof(T) == 4, "only shuffles of four bytes are emulated");
    if (mask != 0xffffffffu || width != 32)
        fail("%s:%d: only shuffles of whole warps are emulated", site.file, site.line);
    T result;
    collective(operation, {&result, &value, nullptr, parameter}, site);
    return result;
}

inline void sync_warp(Site site, unsigned mask = 0xffffffffu)
{
    if (mask != 0xffffffffu)
        fail("%s:%d: __syncwarp is emulated for whole warps only", site.file, site.line);
    collective(Operation::SYNCWARP, {}, site);
}

inline unsigned ballot(unsigned mask, int predicate, Site site)
{
    if (mask != 0xffffffffu)
        fail("%s:%d: votes are emulated for whole warps only", site.file, site.line);
    unsigned result, value = predicate != 0;
    collective(Operation::BALLOT, {&result, &value, nullptr, 0}, site);
    return result;
}

__attribute__((unused)) static void *static_shared()
{
    static thread_local unsigned char anchor;
    return &anchor;
}

} // namespace emulator

// A C function that launches kernel `name` of namespace `space`; see launch().
#define EMULATED_EXPORT extern "C" __attribute__((visibility("default")))
#define EMULATED_KERNEL(space, name)                                                               \
    EMULATED_EXPORT const unsigned parameters_##name =                                             \
        decltype(emulator::caller_of(space::name))::PARAMETERS;                                    \
    EMULATED_UNCHECKED static void enter_##name(void **arguments)                                  \
    {                                                                                              \
        decltype(emulator::caller_of(space::name))::call(space::name, arguments);                  \
    }                                                                                              \
    EMULATED_EXPORT const char *run_##name(void **arguments, const unsigned *grid,                 \
                                      const unsigned *block, unsigned shared_bytes)                \
    {                                                                                              \
        return emulator::launch({#name, enter_##name, emulator::static_shared, emulator::CHECKED}, \
                                arguments, grid, block, shared_bytes);                             \
    }

// Words of CUDA C++ ------------------------------------------------------------------------------

#define EMULATION_SITE (emulator::Site{__FILE__, __LINE__})
#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// One per thread of the operating system, which runs one block at a time.
#define __shared__ static thread_local

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::current->block)
#define blockDim (emulator::current->threads)
#define gridDim (emulator::current->blocks)
static const int warpSize = 32;

#define __syncthreads() emulator::collective(emulator::Operation::BARRIER, {}, EMULATION_SITE)
#define __syncwarp(...) emulator::sync_warp(EMULATION_SITE __VA_OPT__(, ) __VA_ARGS__)
#define EMULATED_SHUFFLE(operation, ...)                                                           \
    emulator::shuffle(emulator::Operation::operation, EMULATION_SITE, __VA_ARGS__)
#define __shfl_sync(...) EMULATED_SHUFFLE(SHUFFLE, __VA_ARGS__)
#define __shfl_xor_sync(...) EMULATED_SHUFFLE(SHUFFLE_XOR, __VA_ARGS__)
#define __shfl_down_sync(...) EMULATED_SHUFFLE(SHUFFLE_DOWN, __VA_ARGS__)
#define __shfl_up_sync(...) EMULATED_SHUFFLE(SHUFFLE_UP, __VA_ARGS__)
#define __ballot_sync(mask, predicate) emulator::ballot(mask, predicate, EMULATION_SITE)
#define __any_sync(mask, predicate) (emulator::ballot(mask, predicate, EMULATION_SITE) != 0)
#define __all_sync(mask, predicate)                                                                \
    (emulator::ballot(mask, predicate, EMULATION_SITE) == 0xffffffffu)

static inline void __threadfence()
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

static inline void __threadfence_block()
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

template <class T>
static inline T atomicAdd(T *address, T value)
{
    static_assert(sizeof(T) == 4 && T(1) / 2 == 0, "only atomics of 32-bit integers are emulated");
    return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}

template <class T>
static inline T atomicExch(T *address, T value)
{
    static_assert(sizeof(T) == 4 && T(1) / 2 == 0, "only atomics of 32-bit integers are emulated");
    return __atomic_exchange_n(address, value, __ATOMIC_SEQ_CST);
}

// CUDA's minima and maxima of floats prefer numbers to NaN, as C's do; these are inline.
static inline float emulated_fminf(float a, float b)
{
    return a < b || b != b ? a : b;
}

static inline float emulated_fmaxf(float a, float b)
{
    return a > b || b != b ? a : b;
}

#define fminf emulated_fminf
#define fmaxf emulated_fmaxf

static inline int min(int a, int b)
{
    return a < b ? a : b;
}

static inline int max(int a, int b)
{
    return a > b ? a : b;
}

static inline unsigned min(unsigned a, unsigned b)
{
    return a < b ? a : b;
}

static inline unsigned max(unsigned a, unsigned b)
{
    return a > b ? a : b;
}

static inline long min(long a, long b)
{
    return a < b ? a : b;
}

static inline long max(long a, long b)
{
    return a > b ? a : b;
}

static inline float min(float a, float b)
{
    return fminf(a, b);
}

static inline float max(float a, float b)
{
    return fmaxf(a, b);
}

#endif
