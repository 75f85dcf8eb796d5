// Convolutions in groups, and others that tensor cores do not suit, NHWC and without staging.
//
// A thread has OUTPUTS neighbouring output channels of one group, of COLUMNS neighbouring pixels.
// It reads INPUTS input channels at a time, each once for all taps of a line of the window. Where
// several threads share a strip, each takes part of the input channels. Weights are
// [row][column][input of the group][output channel].
//
// Words of four 8-bit integers are inputs too: X is `uint32_t`, and weights are words alike.
#ifndef GROUPED_CUH
#define GROUPED_CUH

#include "strips.cuh"

// Of four 8-bit integers.
__device__ __forceinline__ void multiply_add(int32_t &sum, uint32_t x, int32_t w)
{
    sum = dp4a((int32_t)x, w, sum);
}

// Turn unsigned bytes into signed ones, 128 less.
template <class S, class T>
__device__ __forceinline__ T signed_input(T x)
{
    return x;
}

template <class S>
__device__ __forceinline__ uint32_t signed_input(uint32_t x)
{
    return x ^ S::SIGNS;
}

// Add the products of TAPS columns of one row of the window, from `first` on.
template <class S, int TAPS, class X, class W, class A>
__device__ __forceinline__ void add_inputs(A (&sums)[1][S::COLUMNS][S::OUTPUTS],
                                           const X *x, const W *__restrict__ weights,
                                           int left, bool row_exists, uint32_t fill)
{
    const int STEPS = S::GROUP_INPUTS / S::INPUTS;
    const int share = S::SHARING > 1 ? (int)threadIdx.z : 0;
#pragma unroll(S::UNROLL)
    for (int step = share; step < STEPS; step += S::SHARING) {
        Inputs<X, S::INPUTS> line[Span<S, TAPS>::COLUMNS];
        load_span<S, TAPS, S::PIXEL>(line, x + step * S::INPUTS, left, row_exists, fill);
#pragma unroll
        for (int tap = 0; tap < TAPS; ++tap) {
#pragma unroll
            for (int input = 0; input < S::INPUTS; ++input) {
                int at = tap * S::GROUP_INPUTS + step * S::INPUTS + input;
                Vector<W, S::OUTPUTS> w =
                    *(const Vector<W, S::OUTPUTS> *)(weights + at * S::OUT_CHANNELS);
#pragma unroll
                for (int pixel = 0; pixel < S::COLUMNS; ++pixel) {
                    int column = pixel * S::STRIDE_X + tap * S::DILATION_X;
                    X seen = signed_input<S>(line[column].lane(input));
#pragma unroll
                    for (int output = 0; output < S::OUTPUTS; ++output)
                        multiply_add(sums[0][pixel][output], seen, w.lane[output]);
                }
            }
        }
    }
}

// Add the sums of all threads that share a strip to those of the first.
template <class S, class A>
__device__ __forceinline__ void combine_shares(A (&sums)[1][S::COLUMNS][S::OUTPUTS])
{
    const int THREADS = S::BLOCK_X * S::BLOCK_Y, SIZE = S::COLUMNS * S::OUTPUTS;
    __shared__ A others[S::SHARING > 1 ? (S::SHARING - 1) * SIZE * THREADS : 1];
    int thread = (int)threadIdx.y * S::BLOCK_X + (int)threadIdx.x;
    int share = (int)threadIdx.z;
    if (share > 0) {
#pragma unroll
        for (int i = 0; i < SIZE; ++i)
            others[((share - 1) * SIZE + i) * THREADS + thread] =
                sums[0][i / S::OUTPUTS][i % S::OUTPUTS];
    }
    __syncthreads();
    if (share > 0)
        return;
#pragma unroll 1
    for (int other = 0; other < S::SHARING - 1; ++other) {
#pragma unroll
        for (int i = 0; i < SIZE; ++i) {
            A &sum = sums[0][i / S::OUTPUTS][i % S::OUTPUTS];
            sum = wrapping_sum(sum, others[(other * SIZE + i) * THREADS + thread]);
        }
    }
}

// X is `uint32_t` where words are multiplied.
template <class S, class Finish, class X, class W, class A>
__device__ __forceinline__ void grouped(const X *x, const W *__restrict__ weights,
                                        const A *bias,
                                        const typename Finish::Factor *factors,
                                        const typename Finish::Residual *residual,
                                        typename Finish::Output *y, uint32_t fill)
{
    Strip strip = strip_of_thread<S>();
    if (S::SHARING == 1 && !strip.exists)
        return;
    const int TAPS = S::TAPS_AT_ONCE, ROW = S::WIDTH * S::PIXEL;
    const int channel = strip.part * S::OUTPUTS;
    A sums[1][S::COLUMNS][S::OUTPUTS] = {};
    // Constants do not depend on the kernel before.
    Vector<A, S::OUTPUTS> start = {};
    Vector<typename Finish::Factor, S::OUTPUTS> scales = {};
    if (strip.exists) {
        start = *(const Vector<A, S::OUTPUTS> *)(bias + channel);
        if (Finish::HAS_FACTOR)
            scales = *(const Vector<typename Finish::Factor, S::OUTPUTS> *)(factors + channel);
    }
    wait_for_previous();
    let_next_start();
    if (strip.exists) {
        int top = strip.row * S::STRIDE_Y - S::PAD_TOP;
        int left = strip.column * S::STRIDE_X - S::PAD_LEFT;
        x += (int64_t)strip.image * S::HEIGHT * ROW + top * ROW + left * S::PIXEL +
             channel / S::GROUP_OUTPUTS * S::GROUP_INPUTS;
        weights += channel;
#pragma unroll 1
        for (int tap_row = 0; tap_row < S::KERNEL_HEIGHT; ++tap_row) {
            bool exists = row_inside<S>(top + tap_row * S::DILATION_Y);
            const X *line = x + tap_row * S::DILATION_Y * ROW;
            const W *w = weights + tap_row * S::KERNEL_WIDTH * S::GROUP_INPUTS * S::OUT_CHANNELS;
            int first = 0;
#pragma unroll 1
            for (; first + TAPS <= S::KERNEL_WIDTH; first += TAPS)
                add_inputs<S, TAPS>(sums, line + first * S::DILATION_X * S::PIXEL,
                                    w + first * S::GROUP_INPUTS * S::OUT_CHANNELS,
                                    left + first * S::DILATION_X, exists, fill);
            if (S::KERNEL_WIDTH % TAPS)
                add_inputs<S, S::KERNEL_WIDTH % TAPS ? S::KERNEL_WIDTH % TAPS : 1>(
                    sums, line + first * S::DILATION_X * S::PIXEL,
                    w + first * S::GROUP_INPUTS * S::OUT_CHANNELS, left + first * S::DILATION_X,
                    exists, fill);
        }
    }
    if (S::SHARING > 1)
        combine_shares<S>(sums);
    if (!strip.exists || (S::SHARING > 1 && threadIdx.z > 0))
        return;
#pragma unroll
    for (int pixel = 0; pixel < S::COLUMNS; ++pixel)
#pragma unroll
        for (int output = 0; output < S::OUTPUTS; ++output)
            sums[0][pixel][output] = wrapping_sum(sums[0][pixel][output], start.lane[output]);
    int64_t line = (int64_t)strip.image * S::OUT_HEIGHT + strip.row;
    int64_t at = (line * S::OUT_WIDTH + strip.column) * S::OUT_CHANNELS + channel;
    store_strip<S, Finish>(sums, strip, scales, Finish::HAS_RESIDUAL ? residual + at : residual,
                           y + at);
}

#endif
