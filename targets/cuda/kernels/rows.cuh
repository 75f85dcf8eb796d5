// Rows that a thread, a warp or a block walks along: where their values are, and their totals.
#ifndef ROWS_CUH
#define ROWS_CUH

#include "types.cuh"

__device__ __forceinline__ float infinity() { return bits_as_float(0x7f800000u); }

struct Total {
    template <class T>
    static __device__ __forceinline__ T of(T a, T b)
    {
        return a + b;
    }
};

// NaN loses against a number.
struct Largest {
    static __device__ __forceinline__ float of(float a, float b) { return fmaxf(a, b); }
    static __device__ __forceinline__ int32_t of(int32_t a, int32_t b) { return a > b ? a : b; }
};

struct Smallest {
    static __device__ __forceinline__ float of(float a, float b) { return fminf(a, b); }
};

// The value of the lane whose number differs in the bits of `apart`.
template <class T>
__device__ __forceinline__ T other_lane(T value, int apart)
{
    return __shfl_xor_sync(0xffffffffu, value, apart);
}

__device__ __forceinline__ int64_t other_lane(int64_t value, int apart)
{
    uint32_t low = other_lane((uint32_t)value, apart);
    uint32_t high = other_lane((uint32_t)((uint64_t)value >> 32), apart);
    return (int64_t)((uint64_t)high << 32 | low);
}

// Combine the values of LANES neighbouring lanes, a power of two; all of them get the result.
template <class Combine, int LANES = 32, class T>
__device__ __forceinline__ T across_lanes(T value)
{
#pragma unroll
    for (int apart = LANES / 2; apart > 0; apart /= 2)
        value = Combine::of(value, other_lane(value, apart));
    return value;
}

// Combine the values of the THREADS threads that share a row: 1, a warp, or a whole block.
template <int THREADS, class Combine, class T>
__device__ __forceinline__ T across_row(T value)
{
    const int WARPS = THREADS > 32 ? THREADS / 32 : 1;
    if (THREADS == 1)
        return value;
    value = across_lanes<Combine>(value);
    if (THREADS > 32) {
        __shared__ T parts[WARPS];
        __syncthreads(); // who is still reading the parts of the total before?
        if (threadIdx.x % 32 == 0)
            parts[threadIdx.x / 32] = value;
        __syncthreads();
        value = across_lanes<Combine, WARPS>(parts[threadIdx.x % WARPS]);
    }
    return value;
}

// How THREADS threads walk along a row of LENGTH values, STRIDE apart: CHUNKS times, each time
// VECTORS vectors of WIDTH values per thread. With one chunk, a row fits the registers.
template <int THREADS_, int WIDTH_, int VECTORS_, int LENGTH_, int STRIDE_ = 1>
struct Walk {
    static const int THREADS = THREADS_, WIDTH = WIDTH_, VECTORS = VECTORS_;
    static const int LENGTH = LENGTH_, STRIDE = STRIDE_;
    static const int AT_ONCE = THREADS * WIDTH * VECTORS;
    static const int CHUNKS = (LENGTH + AT_ONCE - 1) / AT_ONCE;
    static const bool HELD = CHUNKS == 1;

    // The row that this thread helps with.
    static __device__ __forceinline__ int row()
    {
        return blockIdx.x * (blockDim.x / THREADS) + threadIdx.x / THREADS;
    }

    // Index in the row of the first value of a vector; the vector exists if it is below LENGTH.
    static __device__ __forceinline__ int at(int chunk, int vector)
    {
        return ((chunk * VECTORS + vector) * THREADS + threadIdx.x % THREADS) * WIDTH;
    }
};

template <int N, class T>
__device__ __forceinline__ void load_floats(float (&value)[N], const T *from)
{
    Vector<T, N> loaded = *(const Vector<T, N> *)from;
#pragma unroll
    for (int i = 0; i < N; ++i)
        value[i] = to_float(loaded.lane[i]);
}

template <int N, class T>
__device__ __forceinline__ void store_floats(T *to, const float (&value)[N])
{
    Vector<T, N> stored;
#pragma unroll
    for (int i = 0; i < N; ++i)
        stored.lane[i] = from_float<T>(value[i]);
    *(Vector<T, N> *)to = stored;
}

#endif
