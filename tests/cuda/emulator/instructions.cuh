// The emulator's own targets/cuda/kernels/instructions.cuh: the same functions, computed here.
// warp.h says how fragments are laid out.
#ifndef INSTRUCTIONS_CUH
#define INSTRUCTIONS_CUH

#include "integers.cuh"

#define SHARED_MEMORY(name) unsigned char *name = emulator::current->shared

// Kernels run one after the other here. checks.cpp sees to it that they would not have to.

__device__ __forceinline__ void wait_for_previous()
{
    emulator::current->waited = true;
}

__device__ __forceinline__ void let_next_start()
{
}

// Copies arrive when they are waited for, or at once: see scheduler.cpp.

template <int BYTES>
__device__ __forceinline__ void cp_async_zero(void *shared, const void *global, bool keep)
{
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
    emulator::copy_later(shared, global, BYTES, keep);
}

template <int BYTES>
__device__ __forceinline__ void cp_async(void *shared, const void *global)
{
    cp_async_zero<BYTES>(shared, global, true);
}

__device__ __forceinline__ void cp_async_commit()
{
    emulator::commit_copies();
}

template <int COUNT>
__device__ __forceinline__ void cp_async_wait()
{
    emulator::wait_for_copies(COUNT);
}

// Matrix fragments -------------------------------------------------------------------------------

#define EMULATED_LDMATRIX(name, count, operation)                                                  \
    __device__ __forceinline__ void name(uint32_t (&r)[count], const void *row)                    \
    {                                                                                              \
        emulator::collective(emulator::Operation::operation, {r, row, nullptr, 0}, EMULATION_SITE);\
    }

EMULATED_LDMATRIX(ldmatrix_x4, 4, LDMATRIX_X4)
EMULATED_LDMATRIX(ldmatrix_x4_transposed, 4, LDMATRIX_X4_TRANSPOSED)
EMULATED_LDMATRIX(ldmatrix_x2, 2, LDMATRIX_X2)
EMULATED_LDMATRIX(ldmatrix_x2_transposed, 2, LDMATRIX_X2_TRANSPOSED)

__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2])
{
    emulator::collective(emulator::Operation::MMA_F16, {d, a, b, 0}, EMULATION_SITE);
}

__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2])
{
    emulator::collective(emulator::Operation::MMA_TF32, {d, a, b, 0}, EMULATION_SITE);
}

__device__ __forceinline__ void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[2])
{
    emulator::collective(emulator::Operation::MMA_S8, {d, a, b, 0}, EMULATION_SITE);
}

// Integers ---------------------------------------------------------------------------------------

__device__ __forceinline__ int32_t dp4a(int32_t a, int32_t b, int32_t c)
{
    uint32_t sum = (uint32_t)c;
    for (int i = 0; i < 4; ++i)
        sum += (uint32_t)((int32_t)(int8_t)(a >> 8 * i) * (int32_t)(int8_t)(b >> 8 * i));
    return (int32_t)sum;
}

// A selector's nibble with its highest bit set copies the byte's sign into all eight bits.
__device__ __forceinline__ uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector)
{
    uint64_t bytes = (uint64_t)b << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        uint32_t nibble = selector >> 4 * i & 15;
        uint32_t byte = (uint32_t)(bytes >> 8 * (nibble & 7)) & 255;
        if (nibble & 8)
            byte = byte & 128 ? 255 : 0;
        result |= byte << 8 * i;
    }
    return result;
}

// Floats -----------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t float_as_bits(float x)
{
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
}

__device__ __forceinline__ float bits_as_float(uint32_t bits)
{
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

// Adding half of the last place that stays rounds the magnitude to nearest, ties away from zero.
__device__ __forceinline__ uint32_t round_tf32(float x)
{
    uint32_t bits = float_as_bits(x);
    if ((bits & 0x7f800000u) == 0x7f800000u)
        return bits & 0x7fffff ? 0x7fffffffu : bits;
    return (bits + 0x1000u) & ~0x1fffu;
}

#ifdef __aarch64__
typedef __fp16 EmulatedHalf;
#else
typedef _Float16 EmulatedHalf;
#endif

__device__ __forceinline__ uint16_t half_bits(float x)
{
    EmulatedHalf value = (EmulatedHalf)x;
    uint16_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return x != x ? 0x7fff : bits;
}

__device__ __forceinline__ float half_value(uint16_t bits)
{
    EmulatedHalf value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return (float)value;
}

__device__ __forceinline__ uint32_t half_pair(float low, float high)
{
    return half_bits(low) | (uint32_t)half_bits(high) << 16;
}

// Compiled with -ffp-contract=off, nothing is fused.
__device__ __forceinline__ float multiply(float a, float b)
{
    return a * b;
}

__device__ __forceinline__ float add(float a, float b)
{
    return a + b;
}

__device__ __forceinline__ float divide(float a, float b)
{
    return a / b;
}

// Out of range, CUDA gives the nearest int32, and zero for NaN.
__device__ __forceinline__ int32_t round_even(float x)
{
    if (!(x > -2147483648.0f))
        return x != x ? 0 : INT32_MIN;
    return x >= 2147483648.0f ? INT32_MAX : (int32_t)__builtin_rintf(x);
}

__device__ __forceinline__ float exp_of(float x)
{
    return expf(x);
}

__device__ __forceinline__ float tanh_of(float x)
{
    return tanhf(x);
}

__device__ __forceinline__ float erf_of(float x)
{
    return erff(x);
}

__device__ __forceinline__ float inverse_root(float x)
{
    return (float)(1.0 / sqrt((double)x));
}

// Memory -----------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ T load_cached(const T *pointer)
{
    return *pointer;
}

template <class T>
__device__ __forceinline__ T load_global(const T *pointer)
{
    static_assert(sizeof(T) == 16, "16 bytes at once");
    return *pointer;
}

#endif
