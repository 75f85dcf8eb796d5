// Layer normalisation of rows, with what stands before and behind it in a transformer: the sum with
// a residual before, the quantization for a product behind.
#ifndef LAYER_NORM_CUH
#define LAYER_NORM_CUH

#include "quantised_rows.cuh"

// The operands of a normalisation; what is not there is null, and never read.
template <class X, class R, class Y, class S, int PADDED>
struct LayerNormOperands {
    const X *x;
    const R *residual;
    const float *scale, *shift, *factors; // per column
    Y *y;
    S *sum;
    QuantisedRows<PADDED> quantised;
};

// What is done, beside the sizes.
template <bool CENTRED_, bool RESIDUAL_, bool SCALED_, bool SHIFTED_, bool SUM_READ_,
          bool QUANTISED_, bool FACTORS_>
struct LayerNormParts {
    static const bool CENTRED = CENTRED_, RESIDUAL = RESIDUAL_, SCALED = SCALED_;
    static const bool SHIFTED = SHIFTED_, SUM_READ = SUM_READ_, QUANTISED = QUANTISED_;
    static const bool FACTORS = FACTORS_;
};

template <class Parts, int N, class Operands>
__device__ __forceinline__ void load_summed(float (&value)[N], const Operands &of, int64_t index)
{
    load_floats(value, of.x + index);
    if (Parts::RESIDUAL) {
        float other[N];
        load_floats(other, of.residual + index);
#pragma unroll
        for (int i = 0; i < N; ++i)
            value[i] += other[i];
    }
}

// What N neighbouring columns are scaled and shifted by.
template <class Parts, int N>
struct Columns {
    float scale[N], shift[N];

    template <class Operands>
    __device__ __forceinline__ void load(const Operands &of, int at)
    {
        if (Parts::SCALED)
            load_floats(scale, of.scale + at);
        if (Parts::SHIFTED)
            load_floats(shift, of.shift + at);
    }

    __device__ __forceinline__ void apply(float (&value)[N]) const
    {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (Parts::SCALED)
                value[i] *= scale[i];
            if (Parts::SHIFTED)
                value[i] += shift[i];
        }
    }
};

// What a product reads of y: rounded as it is stored, times the factors of its columns.
template <class Parts, int N, class X, class R, class Y, class S, int PADDED>
__device__ __forceinline__ void as_read(float (&value)[N],
                                        const LayerNormOperands<X, R, Y, S, PADDED> &of, int at)
{
#pragma unroll
    for (int i = 0; i < N; ++i)
        value[i] = to_float(from_float<Y>(value[i]));
    if (Parts::FACTORS)
        scale_by(value, of.factors + at);
}

// y = (x - mean) / sqrt(variance + epsilon) * scale + shift. The variance is that of the centred
// values: a difference of large sums would lose digits where the mean is larger than the deviation.
template <class Walk, class Parts, class X, class R, class Y, class S, int PADDED>
__device__ __forceinline__ void layer_norm(const LayerNormOperands<X, R, Y, S, PADDED> &of,
                                           int rows, float epsilon)
{
    const int row = Walk::row();
    if (row >= rows)
        return;
    const int64_t base = (int64_t)row * Walk::LENGTH;
    const float share = 1.0f / Walk::LENGTH;
    // columns are constants, there before x is
    const bool early = Walk::HELD && Walk::VECTORS * Walk::WIDTH <= 16;
    Columns<Parts, Walk::WIDTH> columns[early ? Walk::VECTORS : 1];
#pragma unroll
    for (int v = 0; early && v < Walk::VECTORS; ++v)
        if (Walk::at(0, v) < Walk::LENGTH)
            columns[v].load(of, Walk::at(0, v));
    wait_for_previous();
    let_next_start();
    float value[Walk::VECTORS][Walk::WIDTH];
    float total = 0, mean = 0;
#pragma unroll 1
    for (int chunk = 0; chunk < Walk::CHUNKS; ++chunk) {
#pragma unroll
        for (int v = 0; v < Walk::VECTORS; ++v) {
            int at = Walk::at(chunk, v);
            if (at >= Walk::LENGTH)
                continue;
            load_summed<Parts>(value[v], of, base + at);
            if (Parts::SUM_READ)
                store_floats(of.sum + base + at, value[v]);
#pragma unroll
            for (int i = 0; i < Walk::WIDTH; ++i)
                total += Parts::CENTRED ? value[v][i] : value[v][i] * value[v][i];
        }
    }
    total = across_row<Walk::THREADS, Total>(total) * share;
    if (Parts::CENTRED) {
        mean = total;
        total = 0;
#pragma unroll 1
        for (int chunk = 0; chunk < Walk::CHUNKS; ++chunk) {
#pragma unroll
            for (int v = 0; v < Walk::VECTORS; ++v) {
                int at = Walk::at(chunk, v);
                if (at >= Walk::LENGTH)
                    continue;
                if (!Walk::HELD)
                    load_summed<Parts>(value[v], of, base + at);
#pragma unroll
                for (int i = 0; i < Walk::WIDTH; ++i)
                    total += (value[v][i] - mean) * (value[v][i] - mean);
            }
        }
        total = across_row<Walk::THREADS, Total>(total) * share;
    }
    const float inverse = 1.0f / sqrtf(total + epsilon);
    Range range;
#pragma unroll 1
    for (int chunk = 0; chunk < Walk::CHUNKS; ++chunk) {
#pragma unroll
        for (int v = 0; v < Walk::VECTORS; ++v) {
            int at = Walk::at(chunk, v);
            if (at >= Walk::LENGTH)
                continue;
            if (!Walk::HELD)
                load_summed<Parts>(value[v], of, base + at);
#pragma unroll
            for (int i = 0; i < Walk::WIDTH; ++i)
                value[v][i] = (value[v][i] - mean) * inverse;
            if (!early)
                columns[0].load(of, at);
            columns[early ? v : 0].apply(value[v]);
            store_floats(of.y + base + at, value[v]);
            if (Parts::QUANTISED) {
                as_read<Parts>(value[v], of, at);
#pragma unroll
                for (int i = 0; i < Walk::WIDTH; ++i)
                    range.take(value[v][i]);
            }
        }
    }
    if (!Parts::QUANTISED)
        return;
    range.join<Walk::THREADS>();
    const RowScale scale(range);
    of.quantised.template begin<Walk>(row, scale);
#pragma unroll 1
    for (int chunk = 0; chunk < Walk::CHUNKS; ++chunk) {
#pragma unroll
        for (int v = 0; v < Walk::VECTORS; ++v) {
            int at = Walk::at(chunk, v);
            if (at >= Walk::LENGTH)
                continue;
            if (!Walk::HELD)
                load_scaled<Parts::FACTORS>(value[v], of.y + base, of.factors, at);
            of.quantised.store(row, at, scale, value[v]);
        }
    }
}

#endif
