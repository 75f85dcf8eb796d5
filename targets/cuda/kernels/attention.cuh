// Attention in one kernel: softmax(scale * Q K^T + mask) V without the scores in memory.
//
// A block has ROW_WARPS x KEY_WARPS warps. Each computes 16 query rows against its TILE_KEYS of the
// keys that the block holds in shared memory at a time, with maxima, sums and results of its own
// that later keys correct; warps that saw different keys of a row join what they have at the end.
// The keys of the next step arrive while values are multiplied, and the other way round.
#ifndef ATTENTION_CUH
#define ATTENTION_CUH

#include "fragments.cuh"
#include "rows.cuh"

// What a lane knows of rows `lane / 4` and `lane / 4 + 8` of its warp's results.
template <int TILES>
struct AttentionRows {
    float top[2], total[2];   // the largest score; the sum of this lane's exponentials
    float mixed[TILES][4];    // results so far, as tensor cores leave them

    __device__ __forceinline__ AttentionRows()
    {
        top[0] = top[1] = -infinity();
        total[0] = total[1] = 0;
#pragma unroll
        for (int n = 0; n < TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                mixed[n][i] = 0;
    }

    // Turn scores into exponentials below the largest known, and correct what is older.
    template <int N>
    __device__ __forceinline__ void take(float (&scores)[N][4])
    {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float largest = top[h];
#pragma unroll
            for (int n = 0; n < N; ++n)
                largest = fmaxf(largest, fmaxf(scores[n][2 * h], scores[n][2 * h + 1]));
            largest = across_lanes<Largest, 4>(largest);
            // while there is no score but -inf, exponentials are 0, not NaN
            float base = largest == -infinity() ? 0.0f : largest;
            float factor = exp_of(top[h] - base);
            top[h] = largest;
            total[h] *= factor;
#pragma unroll
            for (int n = 0; n < TILES; ++n) {
                mixed[n][2 * h] *= factor;
                mixed[n][2 * h + 1] *= factor;
            }
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int i = 2 * h; i < 2 * h + 2; ++i) {
                    scores[n][i] = exp_of(scores[n][i] - base);
                    total[h] += scores[n][i];
                }
        }
    }
};

// What the sums of a row are divided by: rows without a score are NaN, or zeros.
template <bool ZERO_ROWS>
__device__ __forceinline__ float inverse_of(float total)
{
    return ZERO_ROWS && total == 0.0f ? 0.0f : 1.0f / total;
}

// Sizes, in elements and bytes, that follow from a shape and the type of tiles.
template <class Shape, class E>
struct AttentionSizes {
    static const int DEPTH = (Shape::WIDTH + Fragments<E>::DEPTH - 1) / Fragments<E>::DEPTH *
                             Fragments<E>::DEPTH;
    static const int PITCH = DEPTH + Fragments<E>::PAD;
    static const int VALUES = (Shape::SLICE + 15) / 16 * 16;
    static const int VALUE_PITCH = VALUES + Fragments<E>::PAD;
    static const int ROWS = 16 * Shape::ROW_WARPS;
    static const int KEYS = Shape::TILE_KEYS * Shape::KEY_WARPS;
    static const int WARPS = Shape::ROW_WARPS * Shape::KEY_WARPS;
    static const int THREADS = 32 * WARPS;
};

template <class Product, class Shape, class Q, class K, class V, class M, class Y>
struct Attention {
    typedef typename Product::Element E;
    typedef AttentionSizes<Shape, E> Sizes;
    static const int SCORE_TILES = Shape::TILE_KEYS / 8, VALUE_TILES = Sizes::VALUES / 8;
    static const int STEPS = (Shape::KEYS + Sizes::KEYS - 1) / Sizes::KEYS;
    static const int RESULT_PITCH = Sizes::VALUES + 4;

    E *query_tile, *key_tile, *value_tile;
    float *joined; // where the tiles were
    int batch, head, first_query, slice;
    int lane, row, row_warp, key_warp; // `row`: the first of the two of this lane

    __device__ __forceinline__ explicit Attention(unsigned char *shared)
    {
        query_tile = (E *)shared;
        key_tile = query_tile + Sizes::ROWS * Sizes::PITCH;
        value_tile = key_tile + Sizes::KEYS * Sizes::PITCH;
        joined = (float *)shared;
        int task = blockIdx.x;
        const int tiles = (Shape::QUERIES + Sizes::ROWS - 1) / Sizes::ROWS;
        const int slices = (Shape::VALUE_WIDTH + Shape::SLICE - 1) / Shape::SLICE;
        first_query = task % tiles * Sizes::ROWS;
        task /= tiles;
        slice = task % slices * Shape::SLICE;
        task /= slices;
        head = task % Shape::HEADS;
        batch = task / Shape::HEADS;
        lane = threadIdx.x % 32;
        row_warp = threadIdx.x / 32 / Shape::KEY_WARPS;
        key_warp = threadIdx.x / 32 % Shape::KEY_WARPS;
        row = row_warp * 16 + lane / 4;
    }

    __device__ __forceinline__ void copy_keys(const K *keys, int step)
    {
        const int first = step * Sizes::KEYS;
        copy_tile<typename Shape::Key, Sizes::KEYS, Sizes::DEPTH, Sizes::PITCH, Sizes::THREADS>(
            key_tile, keys + Shape::Key::at(first, 0), Shape::KEYS - first, Shape::WIDTH);
    }

    __device__ __forceinline__ void copy_values(const V *values, int step)
    {
        const int first = step * Sizes::KEYS;
        copy_tile<typename Shape::Value, Sizes::KEYS, Sizes::VALUES, Sizes::VALUE_PITCH,
                  Sizes::THREADS>(value_tile, values + Shape::Value::at(first, slice),
                                  Shape::KEYS - first, Shape::VALUE_WIDTH - slice);
    }

    // The mask at this lane's scores; -inf where there is no key.
    __device__ __forceinline__ void load_mask(float (&bias)[SCORE_TILES][4], const M *mask,
                                              int step)
    {
        const int N = Shape::Mask::VECTOR % 2 ? 1 : 2; // a pair of keys is there or is not
        const int first = step * Sizes::KEYS + key_warp * Shape::TILE_KEYS + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < SCORE_TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; i += N) {
                int query = first_query + row + i / 2 * 8, key = first + n * 8 + i % 2;
                float part[N];
#pragma unroll
                for (int j = 0; j < N; ++j)
                    part[j] = key + j < Shape::KEYS ? 0.0f : -infinity();
                if (Shape::MASKED && key < Shape::KEYS && query < Shape::QUERIES)
                    load_floats(part, mask + Shape::Mask::at(query, key));
#pragma unroll
                for (int j = 0; j < N; ++j)
                    bias[n][i + j] = part[j];
            }
    }

    __device__ __forceinline__ void score(float (&scores)[SCORE_TILES][4])
    {
        const E *queries = query_tile + row_warp * 16 * Sizes::PITCH;
        const E *keys = key_tile + key_warp * Shape::TILE_KEYS * Sizes::PITCH;
#pragma unroll
        for (int n = 0; n < SCORE_TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                scores[n][i] = 0;
#pragma unroll 4
        for (int k = 0; k < Sizes::DEPTH; k += Fragments<E>::DEPTH) {
            uint32_t a[4], b[2][2];
            Fragments<E>::left(a, queries + k, Sizes::PITCH);
#pragma unroll
            for (int n = 0; n < SCORE_TILES; n += 2) {
                Fragments<E>::right(b, keys + n * 8 * Sizes::PITCH + k, Sizes::PITCH);
                Product::add(scores[n], a, b[0]);
                Product::add(scores[n + 1], a, b[1]);
            }
        }
    }

    __device__ __forceinline__ void mix(AttentionRows<VALUE_TILES> &rows,
                                        const float (&scores)[SCORE_TILES][4])
    {
        const E *values = value_tile + key_warp * Shape::TILE_KEYS * Sizes::VALUE_PITCH;
#pragma unroll
        for (int k = 0; k < Shape::TILE_KEYS; k += Fragments<E>::DEPTH) {
            uint32_t a[4], b[2][2];
            left_of_results(a, &scores[k / 8], values);
#pragma unroll
            for (int n = 0; n < VALUE_TILES; n += 2) {
                right_upright<true>(b, values + k * Sizes::VALUE_PITCH + n * 8, Sizes::VALUE_PITCH);
                Product::add(rows.mixed[n], a, b[0]);
                Product::add(rows.mixed[n + 1], a, b[1]);
            }
        }
    }

    __device__ __forceinline__ void store(Y *results, int at_row, int column, float value)
    {
        int query = first_query + at_row;
        if (query < Shape::QUERIES && slice + column < Shape::VALUE_WIDTH)
            results[Shape::Output::at(query, slice + column)] = from_float<Y>(value);
    }

    // Store two neighbouring columns, the first of them even.
    __device__ __forceinline__ void store_pair(Y *results, int at_row, int column, float first,
                                               float second)
    {
        if (Shape::Output::VECTOR % 2) {
            store(results, at_row, column, first);
            store(results, at_row, column + 1, second);
            return;
        }
        int query = first_query + at_row;
        if (query < Shape::QUERIES && slice + column < Shape::VALUE_WIDTH) {
            float pair[2] = {first, second};
            store_floats(results + Shape::Output::at(query, slice + column), pair);
        }
    }

    // Divide by the sums and store; every row is one warp's.
    __device__ __forceinline__ void finish(Y *results, const AttentionRows<VALUE_TILES> &rows)
    {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float inverse = inverse_of<Shape::ZERO_ROWS>(rows.total[h]);
#pragma unroll
            for (int n = 0; n < VALUE_TILES; ++n)
                store_pair(results, row + 8 * h, n * 8 + lane % 4 * 2,
                           rows.mixed[n][2 * h] * inverse, rows.mixed[n][2 * h + 1] * inverse);
        }
    }

    // The same where warps have parts of a row each.
    __device__ __forceinline__ void join(Y *results, const AttentionRows<VALUE_TILES> &rows)
    {
        __syncthreads(); // tiles are read no more
        float *tops = joined + Shape::KEY_WARPS * Sizes::ROWS * RESULT_PITCH;
        float *totals = tops + Shape::KEY_WARPS * Sizes::ROWS;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            int part = key_warp * Sizes::ROWS + row + 8 * h;
            if (lane % 4 == 0) {
                tops[part] = rows.top[h];
                totals[part] = rows.total[h];
            }
#pragma unroll
            for (int n = 0; n < VALUE_TILES; ++n) {
                float pair[2] = {rows.mixed[n][2 * h], rows.mixed[n][2 * h + 1]};
                store_floats(joined + part * RESULT_PITCH + n * 8 + lane % 4 * 2, pair);
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < Sizes::ROWS * Sizes::VALUES / 2; i += Sizes::THREADS) {
            int at_row = i / (Sizes::VALUES / 2), column = i % (Sizes::VALUES / 2) * 2;
            float top = -infinity(), total = 0, pair[2] = {0, 0};
#pragma unroll
            for (int part = 0; part < Shape::KEY_WARPS; ++part)
                top = fmaxf(top, tops[part * Sizes::ROWS + at_row]);
            float base = top == -infinity() ? 0.0f : top;
#pragma unroll
            for (int part = 0; part < Shape::KEY_WARPS; ++part) {
                int at = part * Sizes::ROWS + at_row;
                float factor = exp_of(tops[at] - base);
                total += totals[at] * factor;
                pair[0] += joined[at * RESULT_PITCH + column] * factor;
                pair[1] += joined[at * RESULT_PITCH + column + 1] * factor;
            }
            float inverse = inverse_of<Shape::ZERO_ROWS>(total);
            store_pair(results, at_row, column, pair[0] * inverse, pair[1] * inverse);
        }
    }

    __device__ __forceinline__ void run(const Q *q, const K *k, const V *v, const M *m, Y *y)
    {
        const Q *queries = Shape::Query::matrix(q, batch, head) + Shape::Query::at(first_query, 0);
        const K *keys = Shape::Key::matrix(k, batch, head);
        const V *values = Shape::Value::matrix(v, batch, head);
        const M *mask = Shape::MASKED ? Shape::Mask::matrix(m, batch, head) : m;
        wait_for_previous();
        let_next_start();
        copy_tile<typename Shape::Query, Sizes::ROWS, Sizes::DEPTH, Sizes::PITCH, Sizes::THREADS>(
            query_tile, queries, Shape::QUERIES - first_query, Shape::WIDTH);
        copy_keys(keys, 0);
        cp_async_commit();
        copy_values(values, 0);
        cp_async_commit();
        AttentionRows<VALUE_TILES> rows;
#pragma unroll 1
        for (int step = 0; step < STEPS; ++step) {
            float scores[SCORE_TILES][4], bias[SCORE_TILES][4];
            load_mask(bias, mask, step);
            cp_async_wait<1>(); // for keys
            __syncthreads();
            score(scores);
#pragma unroll
            for (int n = 0; n < SCORE_TILES; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    scores[n][i] = scores[n][i] * Shape::scale() + bias[n][i];
            rows.take(scores);
            cp_async_wait<0>(); // for values
            __syncthreads();
            if (step + 1 < STEPS)
                copy_keys(keys, step + 1);
            cp_async_commit();
            mix(rows, scores);
            if (step + 1 < STEPS) {
                __syncthreads();
                copy_values(values, step + 1);
            }
            cp_async_commit();
        }
#pragma unroll
        for (int h = 0; h < 2; ++h)
            rows.total[h] = across_lanes<Total, 4>(rows.total[h]);
        Y *results = Shape::Output::matrix(y, batch, head);
        if (Shape::KEY_WARPS == 1)
            finish(results, rows);
        else
            join(results, rows);
    }
};

template <class Product, class Shape, class Q, class K, class V, class M, class Y>
__device__ __forceinline__ void attention(const Q *q, const K *k, const V *v, const M *mask, Y *y)
{
    SHARED_MEMORY(shared);
    Attention<Product, Shape, Q, K, V, M, Y>(shared).run(q, k, v, mask, y);
}

#endif
