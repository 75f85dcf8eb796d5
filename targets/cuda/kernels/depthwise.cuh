// Depthwise convolution, NHWC: every channel has its own window.
//
// A thread has LANES neighbouring channels of a strip of pixels. Each input that its windows cover
// is loaded once. Of the rows of the input that a strip sees, output row r has KERNEL_HEIGHT from
// r * STRIDE_Y on; they are DILATION_Y apart, which is 1 where there are several output rows.
#ifndef DEPTHWISE_CUH
#define DEPTHWISE_CUH

#include "strips.cuh"

// Where a strip's windows begin.
template <class T>
struct Corner {
    const T *x;     // the first input, which need not be inside the image
    int top, left;  // its place there
    uint32_t fill;  // a word of what stands beyond the image
};

// A vector of weights per tap, all of them in registers where they are HELD, or in memory.
template <class S, class W>
struct Weights {
    const W *pointer;
    Vector<W, S::LANES> held[S::HELD ? S::HELD : 1];

    __device__ __forceinline__ void load()
    {
        if (S::HELD) {
#pragma unroll
            for (int i = 0; i < S::HELD; ++i)
                held[i] = *(const Vector<W, S::LANES> *)(pointer + i * S::CHANNELS);
        }
    }

    __device__ __forceinline__ Vector<W, S::LANES> at(int i) const
    {
        return S::HELD ? held[i] : *(const Vector<W, S::LANES> *)(pointer + i * S::CHANNELS);
    }
};

template <class S>
struct Rows {
    static const int COUNT = (S::ROWS - 1) * S::STRIDE_Y + S::KERNEL_HEIGHT;
    static const int PITCH = S::DILATION_Y * S::WIDTH * S::CHANNELS;  // elements of x
};

// One tap at a time -----------------------------------------------------------------------------

// Add the products of TAPS columns of the window, from `first` on. Weights are
// [row][column][channel].
template <class S, int TAPS, class X, class W, class A>
__device__ __forceinline__ void add_taps(A (&sums)[S::ROWS][S::COLUMNS][S::LANES],
                                         const Corner<X> &corner, const Weights<S, W> &weights,
                                         int first)
{
    const int COUNT = Rows<S>::COUNT, AT_ONCE = S::ROWS_AT_ONCE;
    const X *x = corner.x + first * (S::DILATION_X * S::CHANNELS);
    const int left = corner.left + first * S::DILATION_X;
#pragma unroll(S::UNROLLED ? COUNT : 1)
    for (int begin = 0; begin < COUNT; begin += AT_ONCE) {
        Inputs<X, S::LANES> lines[AT_ONCE][Span<S, TAPS>::COLUMNS];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            int row = begin + i;
            if (row < COUNT)
                load_span<S, TAPS, S::CHANNELS>(lines[i], x + row * Rows<S>::PITCH, left,
                                                row_inside<S>(corner.top + row * S::DILATION_Y),
                                                corner.fill);
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
#pragma unroll
            for (int out = 0; out < S::ROWS; ++out) {
                int tap_row = begin + i - out * S::STRIDE_Y;
                if (tap_row < 0 || tap_row >= S::KERNEL_HEIGHT)
                    continue;
#pragma unroll
                for (int tap = 0; tap < TAPS; ++tap) {
                    Vector<W, S::LANES> w =
                        weights.at(tap_row * S::KERNEL_WIDTH + first + tap);
#pragma unroll
                    for (int pixel = 0; pixel < S::COLUMNS; ++pixel) {
                        int column = pixel * S::STRIDE_X + tap * S::DILATION_X;
#pragma unroll
                        for (int lane = 0; lane < S::LANES; ++lane)
                            multiply_add(sums[out][pixel][lane], lines[i][column].lane(lane),
                                         w.lane[lane]);
                    }
                }
            }
        }
    }
}

// Four taps at a time ---------------------------------------------------------------------------

// Turn up to four rows of four bytes into a word per column of theirs. Of three or four rows, byte
// i of word c is byte c of row i; of two, byte c % 2 * 2 + i is; one row stays as it is.
__device__ __forceinline__ void transpose_bytes(uint32_t (&words)[4], const uint32_t (&rows)[4],
                                                int count)
{
    if (count == 1) {
        words[0] = words[1] = words[2] = words[3] = rows[0];
        return;
    }
    uint32_t low = byte_permute(rows[0], rows[1], 0x5140);
    uint32_t high = byte_permute(rows[0], rows[1], 0x7362);
    if (count == 2) {
        words[0] = words[1] = low;
        words[2] = words[3] = high;
        return;
    }
    if (count == 3) {
        // the last byte is any: its weight is 0
        words[0] = byte_permute(low, rows[2], 0x4410);
        words[1] = byte_permute(low, rows[2], 0x5532);
        words[2] = byte_permute(high, rows[2], 0x6610);
        words[3] = byte_permute(high, rows[2], 0x7732);
        return;
    }
    uint32_t other_low = byte_permute(rows[2], rows[3], 0x5140);
    uint32_t other_high = byte_permute(rows[2], rows[3], 0x7362);
    words[0] = byte_permute(low, other_low, 0x5410);
    words[1] = byte_permute(low, other_low, 0x7632);
    words[2] = byte_permute(high, other_high, 0x5410);
    words[3] = byte_permute(high, other_high, 0x7632);
}

// The same of 8-bit inputs, four channels a word and four rows at a time. Weights are words,
// [four rows][output row][column][channel], a byte for each row as `transpose_bytes` puts them.
template <class S, int TAPS>
__device__ __forceinline__ void add_words(int32_t (&sums)[S::ROWS][S::COLUMNS][S::LANES],
                                          const Corner<uint32_t> &corner,
                                          const Weights<S, int32_t> &weights, int first)
{
    const int COUNT = Rows<S>::COUNT, WORDS = S::LANES / 4, PITCH = S::CHANNELS / 4;
    const uint32_t *x = corner.x + first * (S::DILATION_X * PITCH);
    const int left = corner.left + first * S::DILATION_X;
#pragma unroll(S::UNROLLED ? COUNT : 1)
    for (int begin = 0; begin < COUNT; begin += 4) {
        Inputs<uint32_t, WORDS> lines[4][Span<S, TAPS>::COLUMNS];
        const int count = S::UNROLLED && COUNT - begin < 4 ? COUNT - begin : 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int row = begin + i;
            if (i < count)
                load_span<S, TAPS, PITCH>(lines[i], x + row * (Rows<S>::PITCH / 4), left,
                                          row < COUNT &&
                                              row_inside<S>(corner.top + row * S::DILATION_Y),
                                          corner.fill);
        }
#pragma unroll
        for (int column = 0; column < Span<S, TAPS>::COLUMNS; ++column) {
            if (!Span<S, TAPS>::reads(column))
                continue;
#pragma unroll
            for (int word = 0; word < WORDS; ++word) {
                uint32_t rows[4] = {}, seen[4];
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (i < count)
                        rows[i] = lines[i][column].lane(word) ^ S::SIGNS;
                transpose_bytes(seen, rows, count);
#pragma unroll
                for (int tap = 0; tap < TAPS; ++tap) {
                    int place = column - tap * S::DILATION_X, pixel = place / S::STRIDE_X;
                    if (place < 0 || place % S::STRIDE_X || pixel >= S::COLUMNS)
                        continue;
#pragma unroll
                    for (int out = 0; out < S::ROWS; ++out) {
                        int at = (begin / 4 * S::ROWS + out) * S::KERNEL_WIDTH + first + tap;
                        Vector<int32_t, S::LANES> w = weights.at(at);
#pragma unroll
                        for (int lane = 0; lane < 4; ++lane) {
                            int32_t &sum = sums[out][pixel][4 * word + lane];
                            sum = dp4a((int32_t)seen[lane], w.lane[4 * word + lane], sum);
                        }
                    }
                }
            }
        }
    }
}

// The whole window -----------------------------------------------------------------------------

template <class X>
struct Products {
    template <class S, int TAPS, class Sums, class W>
    static __device__ __forceinline__ void add(Sums &sums, const Corner<X> &corner,
                                               const Weights<S, W> &weights, int first)
    {
        add_taps<S, TAPS>(sums, corner, weights, first);
    }
};

template <>
struct Products<uint32_t> {
    template <class S, int TAPS, class Sums>
    static __device__ __forceinline__ void add(Sums &sums, const Corner<uint32_t> &corner,
                                               const Weights<S, int32_t> &weights, int first)
    {
        add_words<S, TAPS>(sums, corner, weights, first);
    }
};

// X is `uint32_t` where words are multiplied.
template <class S, class Finish, class X, class W, class A>
__device__ __forceinline__ void depthwise(const X *x, const W *weights,
                                          const A *bias,
                                          const typename Finish::Factor *factors,
                                          typename Finish::Output *y, uint32_t fill)
{
    Strip strip = strip_of_thread<S>();
    if (!strip.exists)
        return;
    const int PER_X = S::CHANNELS_PER_X, TAPS = S::TAPS_AT_ONCE;
    int channel = strip.part * S::LANES;
    Corner<X> corner;
    corner.fill = fill;
    corner.top = strip.row * S::STRIDE_Y - S::PAD_TOP;
    corner.left = strip.column * S::STRIDE_X - S::PAD_LEFT;
    corner.x = x + ((int64_t)strip.image * S::HEIGHT * S::WIDTH * (S::CHANNELS / PER_X) +
                    (corner.top * S::WIDTH + corner.left) * (S::CHANNELS / PER_X) +
                    channel / PER_X);
    // Constants do not depend on the kernel before.
    Weights<S, W> held;
    held.pointer = weights + channel;
    held.load();
    Vector<A, S::LANES> start = *(const Vector<A, S::LANES> *)(bias + channel);
    Vector<typename Finish::Factor, S::LANES> scales = {};
    if (Finish::HAS_FACTOR)
        scales = *(const Vector<typename Finish::Factor, S::LANES> *)(factors + channel);
    wait_for_previous();
    let_next_start();
    A sums[S::ROWS][S::COLUMNS][S::LANES];
#pragma unroll
    for (int row = 0; row < S::ROWS; ++row)
#pragma unroll
        for (int column = 0; column < S::COLUMNS; ++column)
#pragma unroll
            for (int lane = 0; lane < S::LANES; ++lane)
                sums[row][column][lane] = start.lane[lane];
#pragma unroll 1
    for (int first = 0; first + TAPS <= S::KERNEL_WIDTH; first += TAPS)
        Products<X>::template add<S, TAPS>(sums, corner, held, first);
    if (S::KERNEL_WIDTH % TAPS)
        Products<X>::template add<S, S::KERNEL_WIDTH % TAPS ? S::KERNEL_WIDTH % TAPS : 1>(
            sums, corner, held, S::KERNEL_WIDTH / TAPS * TAPS);
    int64_t at = (int64_t)strip.image * S::OUT_HEIGHT * S::OUT_WIDTH * S::CHANNELS +
                 (strip.row * S::OUT_WIDTH + strip.column) * S::CHANNELS + channel;
    store_strip<S, Finish>(sums, strip, scales, (const typename Finish::Residual *)nullptr, y + at);
}

#endif
