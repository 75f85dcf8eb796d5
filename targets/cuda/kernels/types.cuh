// Scalar types of tensors, and short vectors of them.
#ifndef TYPES_CUH
#define TYPES_CUH

#include "instructions.cuh"

// A float16 in memory; arithmetic is in float.
struct half {
    uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(half x) { return half_value(x.bits); }

template <class T>
__device__ __forceinline__ T from_float(float x);

template <>
__device__ __forceinline__ float from_float<float>(float x)
{
    return x;
}

template <>
__device__ __forceinline__ half from_float<half>(float x)
{
    return half{half_bits(x)};
}

// N neighbouring elements, loaded and stored at once.
template <class T, int N>
struct __align__(sizeof(T) * N) Vector {
    T lane[N];
};

#endif
