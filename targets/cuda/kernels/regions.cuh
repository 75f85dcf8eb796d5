// What TVM's code generator has no word for that compilers for GPUs and CPUs agree on.
#ifndef REGIONS_CUH
#define REGIONS_CUH

#include "types.cuh"

// The second operand where either is NaN, as on CPUs; max and fmaxf would drop it.
template <class T>
__device__ __forceinline__ T larger(T a, T b)
{
    return a > b ? a : b;
}

template <class T>
__device__ __forceinline__ T smaller(T a, T b)
{
    return a < b ? a : b;
}

#endif
