// Softmax along rows: of floats, and of integers by the rule of docs/integer.md, to the bit.
#ifndef SOFTMAX_CUH
#define SOFTMAX_CUH

#include "rows.cuh"

// Where a row of [outer, Walk::LENGTH, Walk::STRIDE] starts.
template <class Walk>
__device__ __forceinline__ int64_t row_start(int row)
{
    int outer = row / Walk::STRIDE, inner = row % Walk::STRIDE;
    return (int64_t)outer * Walk::LENGTH * Walk::STRIDE + inner;
}

// y = exp(x - max) / sum. A row that does not fit the registers is read three times.
template <class Walk, class X, class Y>
__device__ __forceinline__ void softmax(const X *x, Y *y, int rows)
{
    wait_for_previous();
    let_next_start();
    int row = Walk::row();
    if (row >= rows)
        return; // a whole warp, or a thread that shares its row with no other
    x += row_start<Walk>(row);
    y += row_start<Walk>(row);
    float value[Walk::VECTORS][Walk::WIDTH];
    float top = -infinity(), total = 0;
#pragma unroll 1
    for (int chunk = 0; chunk < Walk::CHUNKS; ++chunk) {
#pragma unroll
        for (int v = 0; v < Walk::VECTORS; ++v) {
            int at = Walk::at(chunk, v);
            if (at >= Walk::LENGTH)
                continue;
            load_floats(value[v], x + (int64_t)at * Walk::STRIDE);
#pragma unroll
            for (int i = 0; i < Walk::WIDTH; ++i)
                top = fmaxf(top, value[v][i]);
        }
    }
    top = across_row<Walk::THREADS, Largest>(top);
#pragma unroll 1
    for (int chunk = 0; chunk < Walk::CHUNKS; ++chunk) {
#pragma unroll
        for (int v = 0; v < Walk::VECTORS; ++v) {
            int at = Walk::at(chunk, v);
            if (at >= Walk::LENGTH)
                continue;
            if (!Walk::HELD)
                load_floats(value[v], x + (int64_t)at * Walk::STRIDE);
#pragma unroll
            for (int i = 0; i < Walk::WIDTH; ++i) {
                value[v][i] = exp_of(value[v][i] - top);
                total += value[v][i];
            }
        }
    }
    float inverse = 1.0f / across_row<Walk::THREADS, Total>(total);
#pragma unroll 1
    for (int chunk = 0; chunk < Walk::CHUNKS; ++chunk) {
#pragma unroll
        for (int v = 0; v < Walk::VECTORS; ++v) {
            int at = Walk::at(chunk, v);
            if (at >= Walk::LENGTH)
                continue;
            if (!Walk::HELD)
                load_floats(value[v], x + (int64_t)at * Walk::STRIDE);
#pragma unroll
            for (int i = 0; i < Walk::WIDTH; ++i) {
                float share = Walk::HELD ? value[v][i] : exp_of(value[v][i] - top);
                value[v][i] = share * inverse;
            }
            store_floats(y + (int64_t)at * Walk::STRIDE, value[v]);
        }
    }
}

// The exponential of an 8-bit distance below the largest value, in units of 2**-29.
template <class X>
struct Exponential {
    static __device__ __forceinline__ int32_t of(const int32_t *table, int32_t below)
    {
        return load_cached(table + below);
    }
};

// That of a 16-bit one: the product of the exponentials of its two bytes.
template <>
struct Exponential<int16_t> {
    static __device__ __forceinline__ int32_t of(const int32_t *table, int32_t below)
    {
        int64_t upper = load_cached(table + (below >> 8));
        int64_t lower = load_cached(table + 256 + (below & 255));
        return (int32_t)((upper * lower + ((int64_t)1 << 28)) >> 29);
    }
};

// y = clamp((e + divisor / 2) / divisor + point), with divisor the sum of e times the scale of y,
// which is factor / 2**shift.
template <class Walk, class X, class Y>
__device__ __forceinline__ void integer_softmax(const X *x, const int32_t *table, Y *y, int rows,
                                                int32_t factor, int shift, int32_t point,
                                                int32_t low, int32_t high)
{
    wait_for_previous();
    let_next_start();
    int row = Walk::row();
    if (row >= rows)
        return;
    x += row_start<Walk>(row);
    y += row_start<Walk>(row);
    const int first = threadIdx.x % Walk::THREADS;
    int32_t top = -32768;
    for (int i = first; i < Walk::LENGTH; i += Walk::THREADS)
        top = Largest::of(top, (int32_t)x[(int64_t)i * Walk::STRIDE]);
    top = across_row<Walk::THREADS, Largest>(top);
    int64_t total = 0;
    for (int i = first; i < Walk::LENGTH; i += Walk::THREADS)
        total += Exponential<X>::of(table, top - (int32_t)x[(int64_t)i * Walk::STRIDE]);
    total = across_row<Walk::THREADS, Total>(total);
    int64_t scaled = (total * factor + ((int64_t)1 << (shift - 1))) >> shift;
    int32_t divisor = scaled < 0x7fffffff ? (int32_t)scaled : 0x7fffffff;
    for (int i = first; i < Walk::LENGTH; i += Walk::THREADS) {
        int64_t at = (int64_t)i * Walk::STRIDE;
        int32_t share = Exponential<X>::of(table, top - (int32_t)x[at]);
        // both below 2**31: no sum of theirs is negative as unsigned
        int32_t steps = (int32_t)(((uint32_t)share + (uint32_t)(divisor >> 1)) / (uint32_t)divisor);
        steps += point;
        y[at] = (Y)(steps < low ? low : steps > high ? high : steps);
    }
}

#endif
