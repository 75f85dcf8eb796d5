// Rows quantized at run time: the rule of docs/integer.md, "Rows", to the bit.
#ifndef QUANTISED_ROWS_CUH
#define QUANTISED_ROWS_CUH

#include "rows.cuh"

// The range of a row: of this thread's values first, then of all.
struct Range {
    float high = 0, low = 0;
    int32_t bits = 0; // of the largest magnitude

    __device__ __forceinline__ void take(float value)
    {
        high = fmaxf(high, value);
        low = fminf(low, value);
        bits = Largest::of(bits, (int32_t)(float_as_bits(value) & 0x7fffffffu));
    }

    template <int THREADS>
    __device__ __forceinline__ void join()
    {
        high = across_row<THREADS, Largest>(high);
        low = across_row<THREADS, Smallest>(low);
        bits = across_row<THREADS, Largest>(bits);
    }
};

// How a row is quantized. Steps are stored less 128, as int8.
struct RowScale {
    float size, inverse, below, above;
    int32_t point;

    __device__ __forceinline__ explicit RowScale(const Range &range)
    {
        size = fmaxf(divide(range.high - range.low, 255.0f), 0x1p-60f);
        inverse = divide(1.0f, size);
        point = round_even(fmaxf(fminf(multiply(-range.low, inverse), 255.0f), 0.0f));
        below = (float)-point;
        above = (float)(255 - point);
        // what NaN or infinity has reached is NaN in all of the row
        if (range.bits >= 0x7f800000)
            size = bits_as_float(0x7fc00000u);
    }

    __device__ __forceinline__ int8_t step(float value) const
    {
        float scaled = multiply(value, inverse);
        return (int8_t)(round_even(fminf(fmaxf(scaled, below), above)) + point - 128);
    }
};

// Where the quantized rows of a tensor go: q [rows, PADDED], zeros behind the width, the size of
// a step [rows], and the zero point less 128 [rows].
template <int PADDED>
struct QuantisedRows {
    int8_t *q;
    float *step;
    int32_t *point;

    template <class Walk>
    __device__ __forceinline__ void begin(int row, const RowScale &scale) const
    {
        int lane = threadIdx.x % Walk::THREADS;
        if (lane == 0) {
            step[row] = scale.size;
            point[row] = scale.point - 128;
        }
        for (int i = Walk::LENGTH + lane; i < PADDED; i += Walk::THREADS)
            q[(int64_t)row * PADDED + i] = 0;
    }

    template <int N>
    __device__ __forceinline__ void store(int row, int at, const RowScale &scale,
                                          const float (&value)[N]) const
    {
        Vector<int8_t, N> steps;
#pragma unroll
        for (int i = 0; i < N; ++i)
            steps.lane[i] = scale.step(value[i]);
        *(Vector<int8_t, N> *)(q + (int64_t)row * PADDED + at) = steps;
    }
};

template <int N>
__device__ __forceinline__ void scale_by(float (&value)[N], const float *factors)
{
    float factor[N];
    load_floats(factor, factors);
#pragma unroll
    for (int i = 0; i < N; ++i)
        value[i] = multiply(value[i], factor[i]);
}

template <bool SCALED, int N, class X>
__device__ __forceinline__ void load_scaled(float (&value)[N], const X *x, const float *factors,
                                            int at)
{
    load_floats(value, x + at);
    if (SCALED)
        scale_by(value, factors + at);
}

// Quantize the rows of x [rows, Walk::LENGTH], multiplied by factors [Walk::LENGTH] if there are
// any. A row that does not fit the registers is read twice.
template <class Walk, bool SCALED, int PADDED, class X>
__device__ __forceinline__ void quantise_rows(const X *x, const float *factors,
                                              QuantisedRows<PADDED> made, int rows)
{
    wait_for_previous();
    let_next_start();
    int row = Walk::row();
    if (row >= rows)
        return;
    x += (int64_t)row * Walk::LENGTH;
    float value[Walk::VECTORS][Walk::WIDTH];
    Range range;
#pragma unroll 1
    for (int chunk = 0; chunk < Walk::CHUNKS; ++chunk) {
#pragma unroll
        for (int v = 0; v < Walk::VECTORS; ++v) {
            int at = Walk::at(chunk, v);
            if (at >= Walk::LENGTH)
                continue;
            load_scaled<SCALED>(value[v], x, factors, at);
#pragma unroll
            for (int i = 0; i < Walk::WIDTH; ++i)
                range.take(value[v][i]);
        }
    }
    range.join<Walk::THREADS>();
    RowScale scale(range);
    made.template begin<Walk>(row, scale);
#pragma unroll 1
    for (int chunk = 0; chunk < Walk::CHUNKS; ++chunk) {
#pragma unroll
        for (int v = 0; v < Walk::VECTORS; ++v) {
            int at = Walk::at(chunk, v);
            if (at >= Walk::LENGTH)
                continue;
            if (!Walk::HELD)
                load_scaled<SCALED>(value[v], x, factors, at);
            made.store(row, at, scale, value[v]);
        }
    }
}

#endif
