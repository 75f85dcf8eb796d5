// Planes of an image become padded pixels.
#ifndef INTAKE_CUH
#define INTAKE_CUH

#include "vectors.cuh"

// [BATCH, CHANNELS, HEIGHT, WIDTH] to [BATCH, OUT_HEIGHT, OUT_WIDTH, OUT_CHANNELS]: a thread makes a
// pixel of value(x), or of the fill value where it lies in the border or beyond the real channels.
template <int BATCH, int CHANNELS, int HEIGHT, int WIDTH, int TOP, int LEFT, int OUT_HEIGHT,
          int OUT_WIDTH, int OUT_CHANNELS, class X, class Y, class Value>
__device__ __forceinline__ void intake(const X *x, Y *y, Y fill, Value value)
{
    constexpr bool AT_ONCE = (OUT_CHANNELS & (OUT_CHANNELS - 1)) == 0 &&
                             OUT_CHANNELS * sizeof(Y) <= 16;
    constexpr int N = AT_ONCE ? OUT_CHANNELS : 1;
    for_each<BATCH * OUT_HEIGHT * OUT_WIDTH, 1>([&](auto, int at) {
        const int image = at / (OUT_HEIGHT * OUT_WIDTH);
        const int row = at / OUT_WIDTH % OUT_HEIGHT - TOP, column = at % OUT_WIDTH - LEFT;
        const bool inside = row >= 0 && row < HEIGHT && column >= 0 && column < WIDTH;
        const X *from = x + (image * CHANNELS * HEIGHT + row) * WIDTH + column;
        Y made[OUT_CHANNELS];
#pragma unroll
        for (int channel = 0; channel < OUT_CHANNELS; ++channel)
            made[channel] = inside && channel < CHANNELS ? value(from[channel * (HEIGHT * WIDTH)])
                                                         : fill;
#pragma unroll
        for (int first = 0; first < OUT_CHANNELS; first += N) {
            Vector<Y, N> lanes;
#pragma unroll
            for (int i = 0; i < N; ++i)
                lanes.lane[i] = made[first + i];
            store_lanes<N>(y + at * OUT_CHANNELS + first, lanes);
        }
    });
}

#endif
