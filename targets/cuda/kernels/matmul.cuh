// Products of two float matrices that are both computed, for every matrix of a batch. Slices of
// both pass through shared memory, two of them under way at a time.
#ifndef MATMUL_CUH
#define MATMUL_CUH

#include "fragments.cuh"
#include "rows.cuh"

// A block computes SIDE x SIDE results by 2 x 2 warps. The right operand lies UPRIGHT,
// [depth, width], or as [width, depth].
template <class Product, class Shape, class A, class B, class Y>
struct MatMul {
    typedef typename Product::Element E;
    static const int SIDE = Shape::SIDE, THREADS = 128;
    static const int SLICE = 2 * Fragments<E>::DEPTH; // of the depth
    static const int STEPS = (Shape::DEPTH + SLICE - 1) / SLICE;
    static const int PITCH = SLICE + Fragments<E>::PAD;
    static const int RIGHT_PITCH = Shape::UPRIGHT ? SIDE + 8 : PITCH;
    static const int LEFT_SIZE = SIDE * PITCH;
    static const int RIGHT_SIZE = (Shape::UPRIGHT ? SLICE : SIDE) * RIGHT_PITCH;
    static const int ROW_PARTS = SIDE / 32, COLUMN_PARTS = SIDE / 16; // of a warp, 16 x 8 each

    E *tiles;
    const A *a;
    const B *b;
    int first_row, first_column, warp_row, warp_column;

    __device__ __forceinline__ void copy_slice(int step)
    {
        E *left = tiles + step % 2 * (LEFT_SIZE + RIGHT_SIZE), *right = left + LEFT_SIZE;
        const int depth = step * SLICE;
        copy_tile<typename Shape::Left, SIDE, SLICE, PITCH, THREADS>(
            left, a + Shape::Left::at(first_row, depth), Shape::ROWS - first_row,
            Shape::DEPTH - depth);
        if (Shape::UPRIGHT)
            copy_tile<typename Shape::Right, SLICE, SIDE, RIGHT_PITCH, THREADS>(
                right, b + Shape::Right::at(depth, first_column), Shape::DEPTH - depth,
                Shape::WIDTH - first_column);
        else
            copy_tile<typename Shape::Right, SIDE, SLICE, RIGHT_PITCH, THREADS>(
                right, b + Shape::Right::at(first_column, depth), Shape::WIDTH - first_column,
                Shape::DEPTH - depth);
    }

    __device__ __forceinline__ void add_slice(float (&sums)[ROW_PARTS][COLUMN_PARTS][4], int step)
    {
        const E *left = tiles + step % 2 * (LEFT_SIZE + RIGHT_SIZE), *right = left + LEFT_SIZE;
#pragma unroll
        for (int k = 0; k < SLICE; k += Fragments<E>::DEPTH) {
            uint32_t x[ROW_PARTS][4], w[2][2];
#pragma unroll
            for (int m = 0; m < ROW_PARTS; ++m)
                Fragments<E>::left(x[m], left + (warp_row + m * 16) * PITCH + k, PITCH);
#pragma unroll
            for (int n = 0; n < COLUMN_PARTS; n += 2) {
                const int column = warp_column + n * 8;
                if (Shape::UPRIGHT)
                    right_upright<false>(w, right + k * RIGHT_PITCH + column, RIGHT_PITCH);
                else
                    Fragments<E>::right(w, right + column * RIGHT_PITCH + k, RIGHT_PITCH);
#pragma unroll
                for (int m = 0; m < ROW_PARTS; ++m) {
                    Product::add(sums[m][n], x[m], w[0]);
                    Product::add(sums[m][n + 1], x[m], w[1]);
                }
            }
        }
    }

    __device__ __forceinline__ void run(const A *left, const B *right, Y *y, unsigned char *shared)
    {
        const int row_blocks = (Shape::ROWS + SIDE - 1) / SIDE;
        const int column_blocks = (Shape::WIDTH + SIDE - 1) / SIDE;
        const int matrix = blockIdx.x / (row_blocks * column_blocks);
        first_row = blockIdx.x % row_blocks * SIDE;
        first_column = blockIdx.x / row_blocks % column_blocks * SIDE;
        warp_row = threadIdx.x / 64 * (SIDE / 2);
        warp_column = threadIdx.x / 32 % 2 * (SIDE / 2);
        tiles = (E *)shared;
        a = Shape::Left::matrix(left, matrix / Shape::HEADS, matrix % Shape::HEADS);
        b = Shape::Right::matrix(right, matrix / Shape::HEADS, matrix % Shape::HEADS);
        float sums[ROW_PARTS][COLUMN_PARTS][4];
#pragma unroll
        for (int m = 0; m < ROW_PARTS; ++m)
#pragma unroll
            for (int n = 0; n < COLUMN_PARTS; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    sums[m][n][i] = 0;
        wait_for_previous();
        let_next_start();
        copy_slice(0);
        cp_async_commit();
#pragma unroll 1
        for (int step = 0; step < STEPS; ++step) {
            if (step + 1 < STEPS)
                copy_slice(step + 1);
            cp_async_commit();
            cp_async_wait<1>();
            __syncthreads();
            add_slice(sums, step);
            __syncthreads();
        }
        y += (int64_t)matrix * Shape::ROWS * Shape::WIDTH;
#pragma unroll
        for (int m = 0; m < ROW_PARTS; ++m)
#pragma unroll
            for (int n = 0; n < COLUMN_PARTS; ++n)
#pragma unroll
                for (int h = 0; h < 2; ++h)
                    store(y, m * 16 + h * 8, n * 8, sums[m][n][2 * h], sums[m][n][2 * h + 1]);
    }

    // Store two neighbouring results.
    __device__ __forceinline__ void store(Y *y, int row, int column, float first, float second)
    {
        row += first_row + warp_row + threadIdx.x % 32 / 4;
        column += first_column + warp_column + threadIdx.x % 4 * 2;
        if (row >= Shape::ROWS || column >= Shape::WIDTH)
            return;
        y += (int64_t)row * Shape::WIDTH + column;
        if (Shape::WIDTH % 2 == 0) {
            float pair[2] = {first, second};
            store_floats(y, pair);
            return;
        }
        y[0] = from_float<Y>(first);
        if (column + 1 < Shape::WIDTH)
            y[1] = from_float<Y>(second);
    }
};

template <class Product, class Shape, class A, class B, class Y>
__device__ __forceinline__ void matmul(const A *left, const B *right, Y *y)
{
    SHARED_MEMORY(shared);
    MatMul<Product, Shape, A, B, Y>().run(left, right, y, shared);
}

#endif
