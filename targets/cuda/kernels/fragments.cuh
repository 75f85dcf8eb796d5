// Tiles of strided matrices in shared memory, and the fragments that tensor cores multiply.
#ifndef FRAGMENTS_CUH
#define FRAGMENTS_CUH

#include "gemm.cuh"

// Where a [batch, heads, rows, columns] tensor lies in another: the first element, and how far
// apart neighbours are. Runs of VECTOR_ neighbouring columns are aligned, and none is cut short.
template <int START, int BATCH, int HEAD, int ROW_, int COLUMN_, int VECTOR_ = 1>
struct Place {
    static const int ROW = ROW_, COLUMN = COLUMN_, VECTOR = VECTOR_;

    template <class T>
    static __device__ __forceinline__ T *matrix(T *tensor, int batch, int head)
    {
        return tensor + START + (int64_t)batch * BATCH + (int64_t)head * HEAD;
    }

    static __device__ __forceinline__ int64_t at(int row, int column)
    {
        return (int64_t)row * ROW + (int64_t)column * COLUMN;
    }
};

// Put N neighbours into shared memory, or zeros where they are not wanted.
template <int N, class E, class T>
struct TileCopy {
    static __device__ __forceinline__ void of(E *shared, const T *global, bool keep)
    {
        Vector<E, N> values;
        Vector<T, N> loaded;
        if (keep)
            loaded = *(const Vector<T, N> *)global;
#pragma unroll
        for (int i = 0; i < N; ++i)
            values.lane[i] = from_float<E>(keep ? to_float(loaded.lane[i]) : 0.0f);
        *(Vector<E, N> *)shared = values;
    }
};

template <int N, class E>
struct TileCopy<N, E, E> {
    static __device__ __forceinline__ void of(E *shared, const E *global, bool keep)
    {
        cp_async_zero<N * sizeof(E)>(shared, global, keep);
    }
};

// no copy of two bytes is asynchronous
template <>
struct TileCopy<1, half, half> {
    static __device__ __forceinline__ void of(half *shared, const half *global, bool keep)
    {
        *shared = keep ? *global : half{0};
    }
};

// Copy [ROWS, COLUMNS] of a matrix to a tile whose rows are PITCH apart, by all THREADS threads of
// a block; what lies behind `rows` and `columns`, which count from the tile's corner, becomes 0.
// Some of it arrives as cp.async does.
template <class Where, int ROWS, int COLUMNS, int PITCH, int THREADS, class E, class T>
__device__ __forceinline__ void copy_tile(E *tile, const T *corner, int rows, int columns)
{
    const int N = Where::VECTOR;
    const bool down = Where::ROW == 1 && Where::COLUMN != 1; // neighbours are below each other
    for (int i = threadIdx.x; i < ROWS * COLUMNS / N; i += THREADS) {
        int row = down ? i % ROWS : i / (COLUMNS / N);
        int column = down ? i / ROWS : i % (COLUMNS / N) * N;
        bool keep = row < rows && column < columns;
        const T *from = keep ? corner + Where::at(row, column) : corner;
        TileCopy<N, E, T>::of(tile + row * PITCH + column, from, keep);
    }
}

// Fragments of a step of the product: 32 bytes deep, as ldmatrix reads them.
template <class E>
struct Fragments {
    static const int DEPTH = 32 / sizeof(E);
    static const int PAD = 16 / sizeof(E); // of rows of tiles: eight of them lie in different banks

    // The left operand: 16 rows.
    static __device__ __forceinline__ void left(uint32_t (&a)[4], const E *corner, int pitch)
    {
        int lane = threadIdx.x % 32;
        ldmatrix_x4(a, corner + lane % 16 * pitch + lane / 16 * PAD);
    }

    // Two right operands, of 8 columns each, whose columns are the rows of the tile.
    static __device__ __forceinline__ void right(uint32_t (&b)[2][2], const E *corner, int pitch)
    {
        uint32_t loaded[4];
        int lane = threadIdx.x % 32, row = lane % 8 + lane / 16 * 8;
        ldmatrix_x4(loaded, corner + row * pitch + lane / 8 % 2 * PAD);
        b[0][0] = loaded[0];
        b[0][1] = loaded[1];
        b[1][0] = loaded[2];
        b[1][1] = loaded[3];
    }
};

// Two right operands whose columns are the columns of the tile. PAIRED: the order of K is that of
// `left_of_results`.
template <bool PAIRED>
__device__ __forceinline__ void right_upright(uint32_t (&b)[2][2], const half *corner, int pitch)
{
    uint32_t loaded[4];
    int lane = threadIdx.x % 32;
    ldmatrix_x4_transposed(loaded, corner + lane % 16 * pitch + lane / 16 * 8);
    b[0][0] = loaded[0];
    b[0][1] = loaded[1];
    b[1][0] = loaded[2];
    b[1][1] = loaded[3];
}

template <bool PAIRED>
__device__ __forceinline__ void right_upright(uint32_t (&b)[2][2], const float *corner, int pitch)
{
    int column = threadIdx.x % 32 / 4, k = threadIdx.x % 4;
    const float *first = corner + (PAIRED ? 2 * k : k) * pitch + column;
    const float *second = first + (PAIRED ? 1 : 4) * pitch;
    b[0][0] = float_as_bits(first[0]);
    b[0][1] = float_as_bits(second[0]);
    b[1][0] = float_as_bits(first[8]);
    b[1][1] = float_as_bits(second[8]);
}

// Results of products as the left operand of the next: the columns of one [16, 8] result are its K,
// or of two for float16. Lanes keep the elements they have, which permutes K for float.
__device__ __forceinline__ void left_of_results(uint32_t (&a)[4], const float (*results)[4],
                                                const half *)
{
    a[0] = half_pair(results[0][0], results[0][1]);
    a[1] = half_pair(results[0][2], results[0][3]);
    a[2] = half_pair(results[1][0], results[1][1]);
    a[3] = half_pair(results[1][2], results[1][3]);
}

__device__ __forceinline__ void left_of_results(uint32_t (&a)[4], const float (*results)[4],
                                                const float *)
{
    a[0] = float_as_bits(results[0][0]);
    a[1] = float_as_bits(results[0][2]);
    a[2] = float_as_bits(results[0][1]);
    a[3] = float_as_bits(results[0][3]);
}

#endif
