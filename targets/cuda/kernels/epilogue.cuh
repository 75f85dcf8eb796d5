// Accumulators become outputs: the rules of docs/integer.md, to the bit.
#ifndef EPILOGUE_CUH
#define EPILOGUE_CUH

#include "types.cuh"

// round_half_even(clamp(float(accumulator) * multiplier, low, high)); limits less the zero point.
__device__ __forceinline__ int32_t requantised(int32_t accumulator, float multiplier, float low,
                                               float high)
{
    float scaled = fmaxf(fminf(multiply((float)accumulator, multiplier), high), low);
    // 1.5 * 2**23: the sum's last bit is worth 1. Conversions are slower than sums.
    return (int32_t)(float_as_bits(add(scaled, 12582912.0f)) - 0x4b400000u);
}

// clamp(round_half_even(accumulator / 2**places), low, high) for places from -17 to 32.
__device__ __forceinline__ int32_t shifted(int32_t accumulator, int32_t places, int32_t low,
                                           int32_t high)
{
    int64_t value = accumulator;
    if (places > 0) {
        int64_t quotient = value >> places;
        int64_t rest = value - (quotient << places);
        int64_t tie = (int64_t)1 << (places - 1);
        value = quotient + (rest > tie || (rest == tie && (quotient & 1)));
    } else {
        value *= (int64_t)1 << -places;
    }
    return (int32_t)(value < low ? low : value > high ? high : value);
}

// The same for places from 0 to 31.
__device__ __forceinline__ int32_t shifted_right(int32_t accumulator, int32_t places, int32_t low,
                                                 int32_t high)
{
    int32_t quotient = accumulator >> places;
    uint32_t mask = (1u << places) - 1;
    uint32_t tie = (mask >> 1) + 1;
    quotient += ((uint32_t)accumulator & mask) > tie - (quotient & 1);
    return quotient < low ? low : quotient > high ? high : quotient;
}

#endif
