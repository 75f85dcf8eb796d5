// Products of rows that were quantized at run time, by the rule of docs/integer.md, "Rows".
#ifndef DYNAMIC_GEMM_CUH
#define DYNAMIC_GEMM_CUH

#include "types.cuh"

struct DynamicOperands {
    const int8_t *q;       // [rows, inputs], steps less 128
    const float *step;     // of a row
    const int32_t *point;  // of a row, less 128
    const int8_t *weights; // [outputs, inputs]
    const int32_t *sums;   // of the weights of an output
    const float *scales, *bias;
};

// A warp has ROW_PARTS x COLUMN_PARTS results of a tensor core, 16 x 8 each. DEPTH_WARPS warps have
// the same ones, of other parts of the depth.
template <int ROW_PARTS_, int COLUMN_PARTS_, int ROW_WARPS, int COLUMN_WARPS, int DEPTH_WARPS_>
struct DynamicTile {
    static const int ROW_PARTS = ROW_PARTS_, COLUMN_PARTS = COLUMN_PARTS_;
    static const int DEPTH_WARPS = DEPTH_WARPS_;
    static const int ROWS = 16 * ROW_PARTS * ROW_WARPS, COLUMNS = 8 * COLUMN_PARTS * COLUMN_WARPS;
    static const int THREADS = 32 * ROW_WARPS * COLUMN_WARPS * DEPTH_WARPS;

    static __device__ __forceinline__ int warp() { return threadIdx.x / 32; }
    static __device__ __forceinline__ int depth_warp()
    {
        return warp() / (ROW_WARPS * COLUMN_WARPS);
    }
    static __device__ __forceinline__ int row()
    {
        return warp() / COLUMN_WARPS % ROW_WARPS * 16 * ROW_PARTS;
    }
    static __device__ __forceinline__ int column()
    {
        return warp() % COLUMN_WARPS * 8 * COLUMN_PARTS;
    }
};

// 16 of the 64 bytes that a product takes at once: a lane's share, in the order that memory has.
// All operands are read in the same order, so it is as good as that of the instruction.
__device__ __forceinline__ Vector<uint32_t, 4> load_words(const int8_t *from)
{
    return *(const Vector<uint32_t, 4> *)from;
}

template <class Finish, int OUTPUTS, class Y>
__device__ __forceinline__ void store_dynamic(const DynamicOperands &of, Y *y, int row, int column,
                                              int32_t sum)
{
    uint32_t shift = (uint32_t)of.point[row] * (uint32_t)load_cached(of.sums + column);
    float real = (float)(int32_t)((uint32_t)sum - shift);
    real = multiply(multiply(real, of.step[row]), load_cached(of.scales + column));
    real = add(real, load_cached(of.bias + column));
    y[(int64_t)row * OUTPUTS + column] = Finish::of(real, 0, typename Finish::Residual());
}

template <class Tile, class Finish, int ROWS, int INPUTS, int OUTPUTS, class Y>
__device__ __forceinline__ void dynamic_gemm(const DynamicOperands &of, Y *y)
{
    const int MI = Tile::ROW_PARTS, NI = Tile::COLUMN_PARTS, PIECE = 64;
    const int row_blocks = (ROWS + Tile::ROWS - 1) / Tile::ROWS;
    const int first_row = blockIdx.x % row_blocks * Tile::ROWS;
    const int first_column = blockIdx.x / row_blocks * Tile::COLUMNS;
    const int lane = threadIdx.x % 32, start = Tile::depth_warp() * PIECE + lane % 4 * 16;
    const int8_t *rows[MI][2], *columns[NI];
#pragma unroll
    for (int m = 0; m < MI; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            int row = first_row + Tile::row() + m * 16 + h * 8 + lane / 4;
            rows[m][h] = of.q + (int64_t)(row < ROWS ? row : ROWS - 1) * INPUTS;
        }
#pragma unroll
    for (int n = 0; n < NI; ++n) {
        int column = first_column + Tile::column() + n * 8 + lane / 4;
        columns[n] = of.weights + (int64_t)(column < OUTPUTS ? column : OUTPUTS - 1) * INPUTS;
    }
    int32_t sums[MI][NI][4];
#pragma unroll
    for (int m = 0; m < MI; ++m)
#pragma unroll
        for (int n = 0; n < NI; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                sums[m][n][i] = 0;
    wait_for_previous();
    let_next_start();
#pragma unroll 2
    for (int k = start; k < INPUTS; k += PIECE * Tile::DEPTH_WARPS) {
        Vector<uint32_t, 4> a[MI][2], b[NI];
#pragma unroll
        for (int m = 0; m < MI; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h)
                a[m][h] = load_words(rows[m][h] + k);
#pragma unroll
        for (int n = 0; n < NI; ++n)
            b[n] = load_words(columns[n] + k);
#pragma unroll
        for (int part = 0; part < 4; part += 2)
#pragma unroll
            for (int m = 0; m < MI; ++m) {
                uint32_t left[4] = {a[m][0].lane[part], a[m][1].lane[part], a[m][0].lane[part + 1],
                                    a[m][1].lane[part + 1]};
#pragma unroll
                for (int n = 0; n < NI; ++n) {
                    uint32_t right[2] = {b[n].lane[part], b[n].lane[part + 1]};
                    mma_s8(sums[m][n], left, right);
                }
            }
    }
    if (Tile::DEPTH_WARPS == 1) {
#pragma unroll
        for (int m = 0; m < MI; ++m)
#pragma unroll
            for (int n = 0; n < NI; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    int row = first_row + Tile::row() + m * 16 + i / 2 * 8 + lane / 4;
                    int column = first_column + Tile::column() + n * 8 + lane % 4 * 2 + i % 2;
                    if (row < ROWS && column < OUTPUTS)
                        store_dynamic<Finish, OUTPUTS>(of, y, row, column, sums[m][n][i]);
                }
        return;
    }
    const int SIZE = Tile::ROWS * Tile::COLUMNS;
    __shared__ int32_t parts[Tile::DEPTH_WARPS == 1 ? 1 : Tile::DEPTH_WARPS * SIZE];
#pragma unroll
    for (int m = 0; m < MI; ++m)
#pragma unroll
        for (int n = 0; n < NI; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int row = Tile::row() + m * 16 + i / 2 * 8 + lane / 4;
                int column = Tile::column() + n * 8 + lane % 4 * 2 + i % 2;
                parts[Tile::depth_warp() * SIZE + row * Tile::COLUMNS + column] = sums[m][n][i];
            }
    __syncthreads();
    for (int i = threadIdx.x; i < SIZE; i += Tile::THREADS) {
        int row = first_row + i / Tile::COLUMNS, column = first_column + i % Tile::COLUMNS;
        uint32_t sum = 0;
#pragma unroll
        for (int part = 0; part < Tile::DEPTH_WARPS; ++part)
            sum += (uint32_t)parts[part * SIZE + i];
        if (row < ROWS && column < OUTPUTS)
            store_dynamic<Finish, OUTPUTS>(of, y, row, column, (int32_t)sum);
    }
}

#endif
