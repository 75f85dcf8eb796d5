// Every output pixel is a weighted sum of a few input pixels, all channels alike.
#ifndef RESIZE_CUH
#define RESIZE_CUH

#include "vectors.cuh"

// x is [BATCH, IMAGE elements], y [BATCH, OUT_HEIGHT, OUT_WIDTH, CHANNELS]; rows [OUT_HEIGHT, DOWN]
// and columns [OUT_WIDTH, ACROSS] are offsets in elements, and the weights go with them. With one
// place a pixel nothing is calculated, and there are no weights.
template <int BATCH, int IMAGE, int OUT_HEIGHT, int OUT_WIDTH, int CHANNELS, int DOWN, int ACROSS,
          int LANES, class X, class Y>
__device__ __forceinline__ void resize(const X *x, const int32_t *rows, const int32_t *columns,
                                       const float *row_weights, const float *column_weights, Y *y)
{
    constexpr int GROUPS = CHANNELS / LANES;
    for_each<BATCH * OUT_HEIGHT * OUT_WIDTH * GROUPS, 1>([&](auto, int at) {
        const int channel = at % GROUPS * LANES, pixel = at / GROUPS;
        const int column = pixel % OUT_WIDTH, row = pixel / OUT_WIDTH % OUT_HEIGHT;
        const X *from = x + pixel / (OUT_WIDTH * OUT_HEIGHT) * IMAGE + channel;
        Vector<Y, LANES> made;
        if constexpr (DOWN * ACROSS == 1) {
            Vector<X, LANES> seen = load_lanes<LANES>(from + rows[row] + columns[column]);
#pragma unroll
            for (int i = 0; i < LANES; ++i)
                made.lane[i] = Converted<Y, X>::of(seen.lane[i]);
        } else {
            float total[LANES];
#pragma unroll
            for (int i = 0; i < LANES; ++i)
                total[i] = 0.0f;
#pragma unroll
            for (int down = 0; down < DOWN; ++down) {
#pragma unroll
                for (int across = 0; across < ACROSS; ++across) {
                    const int place = rows[row * DOWN + down] + columns[column * ACROSS + across];
                    const float weight =
                        row_weights[row * DOWN + down] * column_weights[column * ACROSS + across];
                    Vector<X, LANES> seen = load_lanes<LANES>(from + place);
#pragma unroll
                    for (int i = 0; i < LANES; ++i)
                        total[i] += to_float(seen.lane[i]) * weight;
                }
            }
#pragma unroll
            for (int i = 0; i < LANES; ++i)
                made.lane[i] = from_float<Y>(total[i]);
        }
        store_lanes<LANES>(y + at * LANES, made);
    });
}

#endif
