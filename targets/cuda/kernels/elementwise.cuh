// One output per element of one or two operands.
#ifndef ELEMENTWISE_CUH
#define ELEMENTWISE_CUH

#include "vectors.cuh"

// round_half_even(clamp(x / scale, low, high)); limits less the zero point. NaN is the highest.
__device__ __forceinline__ int32_t quantised(float x, float scale, float low, float high)
{
    return round_even(fmaxf(fminf(divide(x, scale), high), low));
}

// y = function(x) for SIZE elements.
template <int SIZE, int LANES, class X, class Y, class Function>
__device__ __forceinline__ void map_each(const X *x, Y *y, Function function)
{
    for_each<SIZE, LANES>([&](auto lanes, int at) {
        constexpr int N = decltype(lanes)::COUNT;
        Vector<X, N> given = load_lanes<N>(x + at);
        Vector<Y, N> made;
#pragma unroll
        for (int i = 0; i < N; ++i)
            made.lane[i] = function(given.lane[i]);
        store_lanes<N>(y + at, made);
    });
}

// An operand's elements for N outputs: in every CHUNK of outputs, its next PERIOD elements repeat.
template <int PERIOD, int CHUNK, int N, class T>
__device__ __forceinline__ Vector<T, N> load_repeated(const T *x, int at)
{
    if constexpr (PERIOD == CHUNK) {
        return load_lanes<N>(x + at);
    } else if constexpr (PERIOD % N == 0) {
        return load_lanes<N>(x + at / CHUNK * PERIOD + at % PERIOD);
    } else {
        Vector<T, N> values;
#pragma unroll
        for (int i = 0; i < N; ++i)
            values.lane[i] = x[(at + i) / CHUNK * PERIOD + (at + i) % PERIOD];
        return values;
    }
}

// y = function(a, b) for SIZE elements.
template <int SIZE, int LANES, int A_PERIOD, int A_CHUNK, int B_PERIOD, int B_CHUNK, class A,
          class B, class Y, class Function>
__device__ __forceinline__ void combine_each(const A *a, const B *b, Y *y, Function function)
{
    for_each<SIZE, LANES>([&](auto lanes, int at) {
        constexpr int N = decltype(lanes)::COUNT;
        Vector<A, N> left = load_repeated<A_PERIOD, A_CHUNK, N>(a, at);
        Vector<B, N> right = load_repeated<B_PERIOD, B_CHUNK, N>(b, at);
        Vector<Y, N> made;
#pragma unroll
        for (int i = 0; i < N; ++i)
            made.lane[i] = function(left.lane[i], right.lane[i]);
        store_lanes<N>(y + at, made);
    });
}

// y = table[x - LOWEST] for 8-bit x and 256 entries.
template <int SIZE, int LANES, int LOWEST, class X, class Y>
__device__ __forceinline__ void look_up(const X *x, const Y *table, Y *y)
{
    __shared__ Y entries[256];
    for (int i = threadIdx.x; i < 256; i += blockDim.x)
        entries[i] = table[i];
    __syncthreads();
    map_each<SIZE, LANES>(x, y, [&](X value) { return entries[(int32_t)value - LOWEST]; });
}

// The same for int16 x: a table with an entry every 2**BITS steps, of FRACTION bits more than y has.
template <int SIZE, int LANES, int BITS, int FRACTION, class Y>
__device__ __forceinline__ void interpolate(const int16_t *x, const int16_t *table, Y *y)
{
    map_each<SIZE, LANES>(x, y, [&](int16_t value) {
        int32_t steps = (int32_t)value + (1 << 15);
        const int16_t *entry = table + (steps >> BITS);
        int32_t base = entry[0], slope = entry[1] - base;
        int32_t rest = steps & ((1 << BITS) - 1);
        constexpr int32_t HALF = (1 << (BITS + FRACTION)) >> 1;
        return (Y)((base * (1 << BITS) + slope * rest + HALF) >> (BITS + FRACTION));
    });
}

#endif
