// The largest value or the sum under a window that slides over the channels of an NHWC tensor.
//
// `Shape` is a struct of constants: BATCH, HEIGHT, WIDTH, CHANNELS, OUT_HEIGHT, OUT_WIDTH, and pairs
// KERNEL, STRIDE, DILATION and PAD with _DOWN and _ACROSS. A window sees what lies inside x alone.
// An operation is `LargestFloat`, `LargestInteger` or `Sum`; finish(held, pixel) makes an output, `pixel` counted in one
// image.
#ifndef POOL_CUH
#define POOL_CUH

#include "vectors.cuh"

__device__ __forceinline__ float held_value(float x) { return x; }
__device__ __forceinline__ float held_value(half x) { return to_float(x); }
__device__ __forceinline__ int32_t held_value(uint8_t x) { return x; }
__device__ __forceinline__ int32_t held_value(int8_t x) { return x; }
__device__ __forceinline__ int32_t held_value(int16_t x) { return x; }

struct LargestFloat {
    typedef float Held;
    static __device__ __forceinline__ float start() { return bits_as_float(0xff800000u); }
    static __device__ __forceinline__ float join(float a, float b) { return fmaxf(a, b); }
};

template <int LEAST>
struct LargestInteger {
    typedef int32_t Held;
    static __device__ __forceinline__ int32_t start() { return LEAST; }
    static __device__ __forceinline__ int32_t join(int32_t a, int32_t b) { return a > b ? a : b; }
};

template <class Type>
struct Sum {
    typedef Type Held;
    static __device__ __forceinline__ Type start() { return 0; }
    static __device__ __forceinline__ Type join(Type a, Type b) { return a + b; }
};

// clamp(round_half_even(total * factor / 2**places), low, high), exactly, for 0 < places < 63.
__device__ __forceinline__ int32_t averaged(int32_t total, int32_t factor, int places, int32_t low,
                                            int32_t high)
{
    int64_t product = (int64_t)total * factor;
    int64_t quotient = product >> places;
    int64_t rest = product - (quotient << places);
    int64_t tie = (int64_t)1 << (places - 1);
    quotient += rest > tie || (rest == tie && (quotient & 1));
    return (int32_t)(quotient < low ? low : quotient > high ? high : quotient);
}

// Join what one tap sees with what is held, unless the tap lies outside.
template <class Shape, class Operation, int LANES, class X, class Value>
__device__ __forceinline__ void take_tap(typename Operation::Held (&held)[LANES], const X *image,
                                         int row, int column, int channel, Value value)
{
    if ((unsigned)row >= (unsigned)Shape::HEIGHT || (unsigned)column >= (unsigned)Shape::WIDTH)
        return;
    Vector<X, LANES> seen =
        load_lanes<LANES>(image + (row * Shape::WIDTH + column) * Shape::CHANNELS + channel);
#pragma unroll
    for (int i = 0; i < LANES; ++i)
        held[i] = Operation::join(held[i], value(seen.lane[i]));
}

// Each thread takes LANES channels of an output pixel.
template <class Shape, class Operation, int LANES, class X, class Y, class Value, class Finish>
__device__ __forceinline__ void pool(const X *x, Y *y, Value value, Finish finish)
{
    constexpr int GROUPS = Shape::CHANNELS / LANES, PIXELS = Shape::OUT_HEIGHT * Shape::OUT_WIDTH;
    constexpr bool SMALL = Shape::KERNEL_DOWN * Shape::KERNEL_ACROSS <= 25;
    for_each<Shape::BATCH * PIXELS * GROUPS, 1>([&](auto, int at) {
        const int channel = at % GROUPS * LANES, place = at / GROUPS;
        const int pixel = place % PIXELS;
        const X *image =
            x + place / PIXELS * (Shape::HEIGHT * Shape::WIDTH * Shape::CHANNELS);
        const int top = pixel / Shape::OUT_WIDTH * Shape::STRIDE_DOWN - Shape::PAD_DOWN;
        const int left = pixel % Shape::OUT_WIDTH * Shape::STRIDE_ACROSS - Shape::PAD_ACROSS;
        typename Operation::Held held[LANES];
#pragma unroll
        for (int i = 0; i < LANES; ++i)
            held[i] = Operation::start();
#pragma unroll(SMALL ? Shape::KERNEL_DOWN : 1)
        for (int i = 0; i < Shape::KERNEL_DOWN; ++i) {
#pragma unroll(SMALL ? Shape::KERNEL_ACROSS : 1)
            for (int j = 0; j < Shape::KERNEL_ACROSS; ++j)
                take_tap<Shape, Operation, LANES>(held, image, top + i * Shape::DILATION_DOWN,
                                                  left + j * Shape::DILATION_ACROSS, channel,
                                                  value);
        }
        Vector<Y, LANES> made;
#pragma unroll
        for (int i = 0; i < LANES; ++i)
            made.lane[i] = finish(held[i], pixel);
        store_lanes<LANES>(y + at * LANES, made);
    });
}

// The same for large windows: a block takes TOGETHER times LANES channels of an output pixel, and
// its other threads share the taps. THREADS is a power of two times TOGETHER.
template <class Shape, class Operation, int LANES, int TOGETHER, int THREADS, class X, class Y,
          class Value, class Finish>
__device__ __forceinline__ void pool_shared(const X *x, Y *y, Value value, Finish finish)
{
    typedef typename Operation::Held Held;
    constexpr int PIXELS = Shape::OUT_HEIGHT * Shape::OUT_WIDTH, SHARES = THREADS / TOGETHER;
    constexpr int GROUPS = (Shape::CHANNELS / LANES + TOGETHER - 1) / TOGETHER;
    __shared__ Held parts[LANES][THREADS];
    const int share = threadIdx.x / TOGETHER;
    for (int at = blockIdx.x; at < Shape::BATCH * PIXELS * GROUPS; at += gridDim.x) {
        const int channel = (at % GROUPS * TOGETHER + threadIdx.x % TOGETHER) * LANES;
        const int place = at / GROUPS, pixel = place % PIXELS;
        const bool real = channel < Shape::CHANNELS;
        const X *image =
            x + place / PIXELS * (Shape::HEIGHT * Shape::WIDTH * Shape::CHANNELS);
        const int top = pixel / Shape::OUT_WIDTH * Shape::STRIDE_DOWN - Shape::PAD_DOWN;
        const int left = pixel % Shape::OUT_WIDTH * Shape::STRIDE_ACROSS - Shape::PAD_ACROSS;
        Held held[LANES];
#pragma unroll
        for (int i = 0; i < LANES; ++i)
            held[i] = Operation::start();
        if (real) {
#pragma unroll 4
            for (int tap = share; tap < Shape::KERNEL_DOWN * Shape::KERNEL_ACROSS; tap += SHARES)
                take_tap<Shape, Operation, LANES>(
                    held, image, top + tap / Shape::KERNEL_ACROSS * Shape::DILATION_DOWN,
                    left + tap % Shape::KERNEL_ACROSS * Shape::DILATION_ACROSS, channel, value);
        }
#pragma unroll
        for (int i = 0; i < LANES; ++i)
            parts[i][threadIdx.x] = held[i];
#pragma unroll
        for (int others = SHARES / 2; others > 0; others /= 2) {
            __syncthreads();
            if (share < others) {
#pragma unroll
                for (int i = 0; i < LANES; ++i) {
                    held[i] = Operation::join(held[i], parts[i][threadIdx.x + others * TOGETHER]);
                    parts[i][threadIdx.x] = held[i];
                }
            }
        }
        if (real && share == 0) {
            Vector<Y, LANES> made;
#pragma unroll
            for (int i = 0; i < LANES; ++i)
                made.lane[i] = finish(held[i], pixel);
            store_lanes<LANES>(y + place * Shape::CHANNELS + channel, made);
        }
        __syncthreads();
    }
}

#endif
