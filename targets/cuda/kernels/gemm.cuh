// Convolutions and matrix products on tensor cores, as implicit matrix products.
//
// out[m, n] = finish(sum over k of pixels[m, k] * weights[n, k] + bias[n]). A row m is an output
// pixel; k runs over the window and, innermost, the channels of an NHWC input, so that no matrix of
// windows exists in memory. A block computes a tile of BM x BN: K passes through shared memory in
// slices of BK bytes, STAGES of them under way at a time. WARPS_K groups of warps share the slices
// of a block, SPLIT blocks share the slices of a tile; the last of those to finish adds up what the
// others left in `partials`, always in the same order, so that results repeat to the bit.
#ifndef GEMM_CUH
#define GEMM_CUH

#include "types.cuh"

// How operands are multiplied. A step of the product is always 32 bytes deep: what one ldmatrix
// reads has the same layout for every type.

struct Float16Product {
    typedef half Element;
    typedef float Accumulator;
    static __device__ __forceinline__ void add(float (&d)[4], const uint32_t (&a)[4],
                                               const uint32_t (&b)[2])
    {
        mma_f16(d, a, b);
    }
};

struct Int8Product {
    typedef int8_t Element;
    typedef int32_t Accumulator;
    static __device__ __forceinline__ void add(int32_t (&d)[4], const uint32_t (&a)[4],
                                               const uint32_t (&b)[2])
    {
        mma_s8(d, a, b);
    }
};

// Weights are rounded to TF32 already.
struct Tf32Product {
    typedef float Element;
    typedef float Accumulator;
    static __device__ __forceinline__ void add(float (&d)[4], const uint32_t (&a)[4],
                                               const uint32_t (&b)[2])
    {
        uint32_t x[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            x[i] = round_tf32(bits_as_float(a[i]));
        mma_tf32(d, x, b);
    }
};

// What TF32 leaves away of a float32, exactly.
__device__ __forceinline__ uint32_t tf32_rest(uint32_t bits)
{
    return float_as_bits(bits_as_float(bits) - bits_as_float(bits & 0xffffe000u));
}

// float32 to within rounding: each operand is the sum of two TF32, and the product of the two lesser
// ones is below what float32 holds.
struct Float32Product {
    typedef float Element;
    typedef float Accumulator;
    static __device__ __forceinline__ void add(float (&d)[4], const uint32_t (&a)[4],
                                               const uint32_t (&b)[2])
    {
        uint32_t x_rest[4], w_rest[2];
#pragma unroll
        for (int i = 0; i < 4; i++)
            x_rest[i] = tf32_rest(a[i]);
#pragma unroll
        for (int i = 0; i < 2; i++)
            w_rest[i] = tf32_rest(b[i]);
        mma_tf32(d, x_rest, b);
        mma_tf32(d, a, w_rest);
        mma_tf32(d, a, b);
    }
};

// Load neighbouring elements, at a multiple of 16 bytes where there are four.
template <int N, class T>
__device__ __forceinline__ Vector<T, N> load_vector(const T *pointer)
{
    const int PIECE = N < 4 ? N : 4;
    Vector<T, N> all;
#pragma unroll
    for (int i = 0; i < N; i += PIECE) {
        Vector<T, PIECE> piece = *(const Vector<T, PIECE> *)(pointer + i);
#pragma unroll
        for (int j = 0; j < PIECE; j++)
            all.lane[i + j] = piece.lane[j];
    }
    return all;
}

// A tile in shared memory: rows of BK bytes in chunks of 16, so permuted that the eight rows which
// ldmatrix reads at once lie in different banks.
template <int BK>
__device__ __forceinline__ int turned(int row, int chunk)
{
    return BK >= 128 ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & 3);
}

template <int BK>
__device__ __forceinline__ int chunk_offset(int row, int chunk)
{
    return row * BK + turned<BK>(row, chunk) * 16;
}

// Shape: BATCH, HEIGHT, WIDTH, CHANNELS, OUT_HEIGHT, OUT_WIDTH, OUT_CHANNELS, KERNEL_HEIGHT,
// KERNEL_WIDTH, STRIDE_HEIGHT, STRIDE_WIDTH, DILATION_HEIGHT, DILATION_WIDTH, TOP, LEFT; PADDED:
// whether windows leave the image; FILL: what lies there; K: elements of a row of weights.
// Tile: BM, BN, BK (64, 128 or 256), WARPS_M, WARPS_N, WARPS_K, STAGES, SPLIT; PIECE: bytes of an input
// copied at once, 4, 8 or 16, which divide a pixel's channels.
template <class Product, class Shape, class Tile, class Finish>
struct Gemm {
    typedef typename Product::Element Element;
    typedef typename Product::Accumulator Accumulator;
    typedef typename Finish::Output Output;
    static const int THREADS = 32 * Tile::WARPS_M * Tile::WARPS_N * Tile::WARPS_K;
    static const int BM = Tile::BM, BN = Tile::BN, BK = Tile::BK;
    static const int M = Shape::BATCH * Shape::OUT_HEIGHT * Shape::OUT_WIDTH;
    static const int N = Shape::OUT_CHANNELS;
    static const int CHUNKS = BK / 16;
    static const int ELEMENTS = 16 / (int)sizeof(Element);       // in a chunk
    static const int SLICE = BK / (int)sizeof(Element);          // elements of K in a slice
    static const int SLICES = (Shape::K + SLICE - 1) / SLICE;
    static const int SHARE = (SLICES + Tile::SPLIT - 1) / Tile::SPLIT; // slices of one block
    static const int ROWS_AT_ONCE = THREADS / CHUNKS;
    static const int A_ROWS = BM / ROWS_AT_ONCE;                 // that a thread copies per slice
    static const int B_ROWS = (BN + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    static const int A_BYTES = BM * BK, B_BYTES = BN * BK, STAGE_BYTES = A_BYTES + B_BYTES;
    static const int WARP_M = BM / Tile::WARPS_M, WARP_N = BN / Tile::WARPS_N;
    static const int MT = WARP_M / 16, NT = WARP_N / 8;
    static const int STEPS = BK / 32 / Tile::WARPS_K;            // of one warp in a slice
    // Accumulators pass through shared memory to reach whole rows; the gap spreads the banks.
    static const int PITCH = BN + 4;
    static const int OUT_LANES =
        N % 8 == 0 && sizeof(Output) <= 2 ? 8 : N % 4 == 0 ? 4 : N % 2 == 0 ? 2 : 1;
    static_assert(BM % ROWS_AT_ONCE == 0, "every thread copies as many rows");
    static_assert(STEPS * 32 * Tile::WARPS_K == BK, "the warps share a slice evenly");
    static_assert(NT == 1 || NT % 2 == 0, "weights are read by pairs of columns");

    // Rows of windows are pixels as they lie, one after the other.
    static const bool PLAIN = Shape::KERNEL_HEIGHT == 1 && Shape::KERNEL_WIDTH == 1 &&
                              Shape::STRIDE_HEIGHT == 1 && Shape::STRIDE_WIDTH == 1 &&
                              !Shape::PADDED && Shape::HEIGHT == Shape::OUT_HEIGHT &&
                              Shape::WIDTH == Shape::OUT_WIDTH;
    // A slice lies within one tap of the window, the same for all threads.
    static const bool UNIFORM = Shape::CHANNELS % SLICE == 0;
    static const int SLICES_PER_TAP = UNIFORM ? Shape::CHANNELS / SLICE : 1;
    static_assert(ROWS_AT_ONCE % 8 == 0, "a thread's rows are permuted alike");

    // The window of a row: its corner in the image, which is far outside where there is no such row.
    struct Row {
        const Element *pixel;
        int y, x;
    };

    static __device__ __forceinline__ Row locate(const Element *x, int m)
    {
        Row row;
        if (PLAIN) {
            row.y = row.x = 0;
            row.pixel = x + (int64_t)m * Shape::CHANNELS;
        } else {
            int image = m / (Shape::OUT_HEIGHT * Shape::OUT_WIDTH);
            int within = m - image * (Shape::OUT_HEIGHT * Shape::OUT_WIDTH);
            int out_y = within / Shape::OUT_WIDTH;
            row.y = out_y * Shape::STRIDE_HEIGHT - Shape::TOP;
            row.x = (within - out_y * Shape::OUT_WIDTH) * Shape::STRIDE_WIDTH - Shape::LEFT;
            row.pixel = x + (((int64_t)image * Shape::HEIGHT + row.y) * Shape::WIDTH + row.x) *
                                Shape::CHANNELS;
        }
        if (M % BM != 0 && m >= M)
            row.y = -(1 << 28);
        return row;
    }

    static __device__ __forceinline__ void fill(unsigned char *shared)
    {
        Vector<uint32_t, Tile::PIECE / 4> word;
#pragma unroll
        for (int i = 0; i < Tile::PIECE / 4; i++)
            word.lane[i] = 0x01010101u * (uint8_t)Shape::FILL;
        *(Vector<uint32_t, Tile::PIECE / 4> *)shared = word;
    }

    // Start to copy what one slice reads of the input: one chunk of each of A_ROWS rows. `shared` is
    // where the thread's chunk of its first row goes.
    static __device__ __forceinline__ void copy_pixels(unsigned char *shared, const Row (&rows)[A_ROWS],
                                                       int slice, int chunk)
    {
        const int PIECES = 16 / Tile::PIECE, PIECE_ELEMENTS = ELEMENTS / PIECES;
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++) {
            int within = chunk * ELEMENTS + piece * PIECE_ELEMENTS, tap, channel;
            if (UNIFORM) {
                tap = slice / SLICES_PER_TAP;
                channel = (slice - tap * SLICES_PER_TAP) * SLICE + within;
            } else {
                tap = (slice * SLICE + within) / Shape::CHANNELS;
                channel = slice * SLICE + within - tap * Shape::CHANNELS;
            }
            int tap_y = tap / Shape::KERNEL_WIDTH;
            int dy = tap_y * Shape::DILATION_HEIGHT;
            int dx = (tap - tap_y * Shape::KERNEL_WIDTH) * Shape::DILATION_WIDTH;
            int offset = (dy * Shape::WIDTH + dx) * Shape::CHANNELS + channel;
            bool real = UNIFORM || tap < Shape::KERNEL_HEIGHT * Shape::KERNEL_WIDTH;
#pragma unroll
            for (int i = 0; i < A_ROWS; i++) {
                unsigned char *to = shared + i * ROWS_AT_ONCE * BK + piece * Tile::PIECE;
                bool inside = real && (M % BM == 0 || rows[i].y >= -(1 << 27));
                if (Shape::PADDED) {
                    bool in_image = (unsigned)(rows[i].y + dy) < (unsigned)Shape::HEIGHT &&
                                    (unsigned)(rows[i].x + dx) < (unsigned)Shape::WIDTH;
                    if (Shape::FILL != 0 && inside && !in_image) {
                        fill(to);
                        continue;
                    }
                    inside = inside && in_image;
                }
                cp_async_zero<Tile::PIECE>(to, rows[i].pixel + offset, inside);
            }
        }
    }

    // `weights` is the thread's chunk of its first row in the first slice of all.
    static __device__ __forceinline__ void copy_weights(unsigned char *shared,
                                                        const Element *weights, int slice,
                                                        int first_row, int chunk, int column)
    {
        bool real = Shape::K % SLICE == 0 || slice * SLICE + chunk * ELEMENTS < Shape::K;
#pragma unroll
        for (int i = 0; i < B_ROWS; i++) {
            int row = first_row + i * ROWS_AT_ONCE;
            if (BN % ROWS_AT_ONCE != 0 && row >= BN)
                continue;
            bool inside = real && (N % BN == 0 || column + row < N);
            const Element *from = weights + i * ROWS_AT_ONCE * Shape::K + slice * SLICE;
            cp_async_zero<16>(shared + i * ROWS_AT_ONCE * BK, from, inside);
        }
    }

    // What a warp multiplies in one step: 32 bytes of K.
    struct Operands {
        uint32_t x[MT][4], w[NT][2];
    };

    // Load the operands of a step. `a` and `b` are where the lane's rows of the first step lie,
    // relative to `shared`; another step changes the same bits of both, see chunk_offset.
    static __device__ __forceinline__ void load(Operands &operands, const unsigned char *shared,
                                                int a, int b, int step)
    {
#pragma unroll
        for (int m = 0; m < MT; m++)
            ldmatrix_x4(operands.x[m], shared + (a ^ (step * 32)) + m * 16 * BK);
        if (NT == 1)
            ldmatrix_x2(operands.w[0], shared + (b ^ (step * 32)));
#pragma unroll
        for (int n = 0; n + 1 < NT; n += 2) {
            uint32_t both[4];
            ldmatrix_x4(both, shared + (b ^ (step * 32)) + n * 8 * BK);
            operands.w[n][0] = both[0], operands.w[n][1] = both[1];
            operands.w[n + 1][0] = both[2], operands.w[n + 1][1] = both[3];
        }
    }

    // Multiply what a warp has of one slice.
    static __device__ __forceinline__ void multiply_slice(Accumulator (&sums)[MT][NT][4],
                                                          const unsigned char *shared, int a, int b)
    {
        Operands operands[2];
        load(operands[0], shared, a, b, 0);
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            if (i + 1 < STEPS)
                load(operands[(i + 1) & 1], shared, a, b, i + 1);
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int n = 0; n < NT; n++)
                    Product::add(sums[m][n], operands[i & 1].x[m], operands[i & 1].w[n]);
        }
    }

    // Leave the sums of the whole block in shared memory, [BM][PITCH].
    static __device__ __forceinline__ void gather(Accumulator *tile,
                                                  Accumulator (&sums)[MT][NT][4], int lane,
                                                  int warp_m, int warp_n, int warp_k)
    {
#pragma unroll
        for (int group = 0; group < Tile::WARPS_K; group++) {
            __syncthreads();
            if (warp_k != group)
                continue;
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int n = 0; n < NT; n++)
#pragma unroll
                    for (int upper = 0; upper < 2; upper++) {
                        int row = warp_m * WARP_M + m * 16 + upper * 8 + (lane >> 2);
                        int column = warp_n * WARP_N + n * 8 + (lane & 3) * 2;
                        Vector<Accumulator, 2> *pair =
                            (Vector<Accumulator, 2> *)(tile + row * PITCH + column);
                        Vector<Accumulator, 2> sum;
                        sum.lane[0] = sums[m][n][2 * upper];
                        sum.lane[1] = sums[m][n][2 * upper + 1];
                        if (group > 0) {
                            Vector<Accumulator, 2> others = *pair;
                            sum.lane[0] += others.lane[0];
                            sum.lane[1] += others.lane[1];
                        }
                        *pair = sum;
                    }
        }
        __syncthreads();
    }

    // Whether this block is the last of its tile; if so, all sums are in `tile`.
    static __device__ __forceinline__ bool combine(Accumulator *tile, Accumulator *partials,
                                                   uint32_t *counters)
    {
        const int QUADS = BM * BN / 4;
        __shared__ uint32_t arrived;
        int place = blockIdx.y * gridDim.x + blockIdx.x;
        int tiles = gridDim.x * gridDim.y;
        Vector<Accumulator, 4> *all = (Vector<Accumulator, 4> *)partials;
        for (int i = threadIdx.x; i < QUADS; i += THREADS) {
            int row = i / (BN / 4), column = (i - row * (BN / 4)) * 4;
            all[((int64_t)blockIdx.z * tiles + place) * QUADS + i] =
                *(const Vector<Accumulator, 4> *)(tile + row * PITCH + column);
        }
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0)
            arrived = atomicAdd(&counters[place], 1u);
        __syncthreads();
        if (arrived != Tile::SPLIT - 1)
            return false;
        __threadfence();
        for (int i = threadIdx.x; i < QUADS; i += THREADS) {
            int row = i / (BN / 4), column = (i - row * (BN / 4)) * 4;
            Vector<Accumulator, 4> sum, part[Tile::SPLIT];
#pragma unroll
            for (int split = 0; split < Tile::SPLIT; split++)
                part[split] = load_global(&all[((int64_t)split * tiles + place) * QUADS + i]);
            sum = part[0];
#pragma unroll
            for (int split = 1; split < Tile::SPLIT; split++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    sum.lane[j] += part[split].lane[j];
            *(Vector<Accumulator, 4> *)(tile + row * PITCH + column) = sum;
        }
        if (threadIdx.x == 0)
            counters[place] = 0;
        __syncthreads();
        return true;
    }

    static __device__ __forceinline__ void store(const Accumulator *tile, const Accumulator *bias,
                                                 const typename Finish::Factor *factors,
                                                 const typename Finish::Residual *residual,
                                                 Output *y)
    {
        const int L = OUT_LANES, ACROSS = BN / L, ROWS = THREADS / ACROSS;
        typedef typename Finish::Factor Factor;
        typedef typename Finish::Residual Residual;
        static_assert(THREADS % ACROSS == 0, "a thread stays in its columns");
        int column = threadIdx.x % ACROSS * L, n = blockIdx.x * BN + column;
        if (N % BN != 0 && n >= N)
            return;
        Vector<Accumulator, L> offset = load_vector<L>(bias + n);
        Vector<Factor, L> factor;
        if (Finish::HAS_FACTOR)
            factor = load_vector<L>(factors + n);
#pragma unroll 4
        for (int row = threadIdx.x / ACROSS; row < BM; row += ROWS) {
            int m = blockIdx.y * BM + row;
            if (M % BM != 0 && m >= M)
                break;
            int64_t place = (int64_t)m * N + n;
            Vector<Residual, L> added;
            if (Finish::HAS_RESIDUAL)
                added = *(const Vector<Residual, L> *)(residual + place);
            Vector<Accumulator, L> sum = load_vector<L>(tile + row * PITCH + column);
            Vector<Output, L> out;
#pragma unroll
            for (int j = 0; j < L; j++)
                out.lane[j] =
                    Finish::of(sum.lane[j] + offset.lane[j], factor.lane[j], added.lane[j]);
            *(Vector<Output, L> *)(y + place) = out;
        }
    }

    static __device__ __forceinline__ void run(const Element *x, const Element *weights,
                                               const Accumulator *bias,
                                               const typename Finish::Factor *factors,
                                               const typename Finish::Residual *residual,
                                               Accumulator *partials, Output *y,
                                               uint32_t *counters)
    {
        SHARED_MEMORY(shared);
        int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
        int warp_m = warp % Tile::WARPS_M, warp_n = warp / Tile::WARPS_M % Tile::WARPS_N;
        int warp_k = warp / (Tile::WARPS_M * Tile::WARPS_N);
        int chunk = threadIdx.x % CHUNKS, first_row = threadIdx.x / CHUNKS;
        int column = blockIdx.x * BN;
        int first = blockIdx.z * SHARE;
        int count = SLICES - first < SHARE ? SLICES - first : SHARE;

        // Weights do not depend on the kernel before.
        const int copied = chunk_offset<BK>(first_row, chunk);
        weights += (int64_t)(column + first_row) * Shape::K + chunk * ELEMENTS;
#pragma unroll
        for (int i = 0; i < Tile::STAGES - 1; i++)
            if (i < count)
                copy_weights(shared + i * STAGE_BYTES + A_BYTES + copied, weights, first + i,
                             first_row, chunk, column);
        Row rows[A_ROWS];
#pragma unroll
        for (int i = 0; i < A_ROWS; i++)
            rows[i] = locate(x, blockIdx.y * BM + first_row + i * ROWS_AT_ONCE);
        Accumulator sums[MT][NT][4] = {};
        // The first step of a warp and where its lanes find the rows of both operands. An aligned
        // group of steps shares a slice, so that a step is one more bit in the number of a chunk.
        const int step = warp_k * STEPS * 2;
        int a = chunk_offset<BK>(warp_m * WARP_M + (lane & 15), step + (lane >> 4));
        int b = A_BYTES + (NT == 1 ? chunk_offset<BK>(warp_n * WARP_N + (lane & 7),
                                                      step + ((lane >> 3) & 1))
                                   : chunk_offset<BK>(warp_n * WARP_N + (lane & 7) +
                                                          ((lane >> 4) << 3),
                                                      step + ((lane >> 3) & 1)));
        wait_for_previous();
#pragma unroll
        for (int i = 0; i < Tile::STAGES - 1; i++) {
            if (i < count)
                copy_pixels(shared + i * STAGE_BYTES + copied, rows, first + i, chunk);
            cp_async_commit();
        }
        int reading = 0, writing = (Tile::STAGES - 1) * STAGE_BYTES;
        for (int i = 0; i < count; i++) {
            cp_async_wait<Tile::STAGES - 2>();
            __syncthreads();
            int next = i + Tile::STAGES - 1;
            if (next < count) {
                copy_weights(shared + writing + A_BYTES + copied, weights, first + next, first_row,
                             chunk, column);
                copy_pixels(shared + writing + copied, rows, first + next, chunk);
            }
            cp_async_commit();
            multiply_slice(sums, shared + reading, a, b);
            reading = reading + STAGE_BYTES == Tile::STAGES * STAGE_BYTES ? 0 : reading + STAGE_BYTES;
            writing = writing + STAGE_BYTES == Tile::STAGES * STAGE_BYTES ? 0 : writing + STAGE_BYTES;
        }
        cp_async_wait<0>();
        let_next_start();
        Accumulator *tile = (Accumulator *)shared;
        gather(tile, sums, lane, warp_m, warp_n, warp_k);
        if (Tile::SPLIT > 1 && !combine(tile, partials, counters))
            return;
        store(tile, bias, factors, residual, y);
    }
};

#endif
