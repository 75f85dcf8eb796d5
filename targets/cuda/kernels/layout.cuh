// Moves elements without computing anything but another type of floats.
#ifndef LAYOUT_CUH
#define LAYOUT_CUH

#include "vectors.cuh"

template <class Y, int N, class X>
__device__ __forceinline__ Vector<Y, N> converted(const Vector<X, N> &given)
{
    Vector<Y, N> made;
#pragma unroll
    for (int i = 0; i < N; ++i)
        made.lane[i] = Converted<Y, X>::of(given.lane[i]);
    return made;
}

// Copy UNITS runs of LANES elements from source(unit) to target(unit), as one of several parts.
template <int UNITS, int LANES, class X, class Y, class Source, class Target>
__device__ __forceinline__ void copy_each(int part, int parts, const X *x, Y *y, Source source,
                                          Target target)
{
    for (int unit = part * blockDim.x + threadIdx.x; unit < UNITS; unit += parts * blockDim.x)
        store_lanes<LANES>(y + target(unit), converted<Y>(load_lanes<LANES>(x + source(unit))));
}

// [BATCH, ROWS, COLUMNS] to [BATCH, COLUMNS, ROWS] for a few rows: a thread takes one column.
template <int BATCH, int ROWS, int COLUMNS, class X, class Y>
__device__ __forceinline__ void interleave_rows(const X *x, Y *y)
{
    constexpr bool AT_ONCE = (ROWS & (ROWS - 1)) == 0 && ROWS * sizeof(Y) <= 16;
    constexpr int N = AT_ONCE ? ROWS : 1;
    for_each<BATCH * COLUMNS, 1>([&](auto, int at) {
        const X *from = x + at / COLUMNS * (ROWS * COLUMNS) + at % COLUMNS;
#pragma unroll
        for (int first = 0; first < ROWS; first += N) {
            Vector<Y, N> made;
#pragma unroll
            for (int i = 0; i < N; ++i)
                made.lane[i] = Converted<Y, X>::of(from[(first + i) * COLUMNS]);
            store_lanes<N>(y + at * ROWS + first, made);
        }
    });
}

// The same for a few columns: a thread takes one row.
template <int BATCH, int ROWS, int COLUMNS, class X, class Y>
__device__ __forceinline__ void separate_columns(const X *x, Y *y)
{
    constexpr bool AT_ONCE = (COLUMNS & (COLUMNS - 1)) == 0 && COLUMNS * sizeof(X) <= 16;
    constexpr int N = AT_ONCE ? COLUMNS : 1;
    for_each<BATCH * ROWS, 1>([&](auto, int at) {
        Y *to = y + at / ROWS * (ROWS * COLUMNS) + at % ROWS;
#pragma unroll
        for (int first = 0; first < COLUMNS; first += N) {
            Vector<X, N> given = load_lanes<N>(x + at * COLUMNS + first);
#pragma unroll
            for (int i = 0; i < N; ++i)
                to[(first + i) * ROWS] = Converted<Y, X>::of(given.lane[i]);
        }
    });
}

// The same for any sizes, tile by tile through shared memory. A word is K elements, which divides
// both sizes; K x K of them are turned in registers. A tile has SIDE words and SIDE * K lines, and
// lines apart by SIDE + 1 words lie in different banks.
template <int BATCH, int ROWS, int COLUMNS, int K, int SIDE, int THREADS, class X, class Y>
__device__ __forceinline__ void transpose_tiles(const X *x, Y *y)
{
    constexpr int TILE = SIDE * K, STEP = THREADS / SIDE;
    constexpr int DOWN = (ROWS + TILE - 1) / TILE, ACROSS = (COLUMNS + TILE - 1) / TILE;
    __shared__ Vector<Y, K> words[K * SIDE][SIDE + 1];
    const int lane = threadIdx.x % SIDE, line = threadIdx.x / SIDE;
    for (int tile = blockIdx.x; tile < BATCH * DOWN * ACROSS; tile += gridDim.x) {
        const int image = tile / (DOWN * ACROSS);
        const int top = tile / ACROSS % DOWN * TILE, left = tile % ACROSS * TILE;
        const X *from = x + image * (ROWS * COLUMNS);
        Y *to = y + image * (ROWS * COLUMNS);
#pragma unroll
        for (int group = line; group < SIDE; group += STEP) {
            const int row = top + group * K, column = left + lane * K;
            if (row >= ROWS || column >= COLUMNS)
                continue;
            Vector<X, K> given[K];
#pragma unroll
            for (int i = 0; i < K; ++i)
                given[i] = load_lanes<K>(from + (row + i) * COLUMNS + column);
#pragma unroll
            for (int j = 0; j < K; ++j) {
                Vector<Y, K> turned;
#pragma unroll
                for (int i = 0; i < K; ++i)
                    turned.lane[i] = Converted<Y, X>::of(given[i].lane[j]);
                words[j * SIDE + lane][group] = turned;
            }
        }
        __syncthreads();
#pragma unroll
        for (int group = line; group < SIDE; group += STEP) {
#pragma unroll
            for (int j = 0; j < K; ++j) {
                const int row = top + lane * K, column = left + group * K + j;
                if (row < ROWS && column < COLUMNS)
                    store_lanes<K>(to + column * ROWS + row, words[j * SIDE + group][lane]);
            }
        }
        __syncthreads();
    }
}

#endif
