// Activation functions of float.
#ifndef ACTIVATIONS_CUH
#define ACTIVATIONS_CUH

#include "instructions.cuh"

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }

__device__ __forceinline__ float silu(float x, float slope) { return x * sigmoid(slope * x); }

__device__ __forceinline__ float gelu(float x)
{
    return 0.5f * x * (1.0f + erf_of(x * 0.70710678118654752f));
}

__device__ __forceinline__ float gelu_tanh(float x)
{
    return 0.5f * x * (1.0f + tanh_of(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}

__device__ __forceinline__ float hard_sigmoid(float x, float alpha, float beta)
{
    return fmaxf(0.0f, fminf(1.0f, alpha * x + beta));
}

__device__ __forceinline__ float hard_swish(float x)
{
    return x * hard_sigmoid(x, 1.0f / 6.0f, 0.5f);
}

__device__ __forceinline__ float leaky_relu(float x, float slope)
{
    return fmaxf(0.0f, x) + slope * fminf(0.0f, x);
}

#endif
