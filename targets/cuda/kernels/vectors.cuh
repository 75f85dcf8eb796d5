// Flat tensors, several neighbouring elements per thread.
#ifndef VECTORS_CUH
#define VECTORS_CUH

#include "types.cuh"

// How many elements a function is to take at once.
template <int N>
struct Lanes {
    static const int COUNT = N;
};

template <int N, class T>
__device__ __forceinline__ Vector<T, N> load_lanes(const T *pointer)
{
    return *(const Vector<T, N> *)pointer;
}

template <int N, class T>
__device__ __forceinline__ void store_lanes(T *pointer, const Vector<T, N> &value)
{
    *(Vector<T, N> *)pointer = value;
}

// A value in another type of floats, or as it is.
template <class To, class From>
struct Converted {
    static __device__ __forceinline__ To of(From x) { return from_float<To>(to_float(x)); }
};

template <class T>
struct Converted<T, T> {
    static __device__ __forceinline__ T of(T x) { return x; }
};

// Call body(lanes, index) for runs that cover SIZE elements, all threads of the grid together.
template <int SIZE, int LANES, class Body>
__device__ __forceinline__ void for_each(Body body)
{
    const int first = blockIdx.x * blockDim.x + threadIdx.x;
    const int step = gridDim.x * blockDim.x;
#pragma unroll 1
    for (int i = first; i < SIZE / LANES; i += step)
        body(Lanes<LANES>(), i * LANES);
    if constexpr (SIZE % LANES != 0) {
#pragma unroll 1
        for (int i = SIZE / LANES * LANES + first; i < SIZE; i += step)
            body(Lanes<1>(), i);
    }
}

#endif
