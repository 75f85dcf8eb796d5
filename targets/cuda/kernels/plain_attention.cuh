// Attention for rows so wide that no tile of them fits shared memory: a block per query row and
// slice of the values, a thread per key, then per column.
#ifndef PLAIN_ATTENTION_CUH
#define PLAIN_ATTENTION_CUH

#include "attention.cuh"

template <class Shape, class Q, class K, class V, class M, class Y>
__device__ __forceinline__ void plain_attention(const Q *q, const K *k, const V *v, const M *m,
                                                Y *y)
{
    const int THREADS = Shape::SLICE;
    const int slices = (Shape::VALUE_WIDTH + THREADS - 1) / THREADS;
    const int query = blockIdx.x % Shape::QUERIES;
    const int column = blockIdx.x / Shape::QUERIES % slices * THREADS + threadIdx.x;
    const int head = blockIdx.x / Shape::QUERIES / slices % Shape::HEADS;
    const int batch = blockIdx.x / Shape::QUERIES / slices / Shape::HEADS;
    const Q *queries = Shape::Query::matrix(q, batch, head);
    const K *keys = Shape::Key::matrix(k, batch, head);
    const V *values = Shape::Value::matrix(v, batch, head);
    const M *mask = Shape::MASKED ? Shape::Mask::matrix(m, batch, head) : m;
    wait_for_previous();
    let_next_start();
    __shared__ float shares[THREADS];
    float top = -infinity(), total = 0, mixed = 0;
    for (int first = 0; first < Shape::KEYS; first += THREADS) {
        const int key = first + threadIdx.x;
        float score = -infinity();
        if (key < Shape::KEYS) {
            score = 0;
            for (int i = 0; i < Shape::WIDTH; ++i)
                score += to_float(queries[Shape::Query::at(query, i)]) *
                         to_float(keys[Shape::Key::at(key, i)]);
            score *= Shape::scale();
            if (Shape::MASKED)
                score += to_float(mask[Shape::Mask::at(query, key)]);
        }
        const float largest = fmaxf(top, across_row<THREADS, Largest>(score));
        const float base = largest == -infinity() ? 0.0f : largest;
        const float factor = exp_of(top - base);
        top = largest;
        const float share = exp_of(score - base);
        total = total * factor + across_row<THREADS, Total>(share);
        __syncthreads();
        shares[threadIdx.x] = share;
        __syncthreads();
        mixed *= factor;
        if (column < Shape::VALUE_WIDTH)
            for (int i = 0; i < THREADS && first + i < Shape::KEYS; ++i)
                mixed += shares[i] * to_float(values[Shape::Value::at(first + i, column)]);
    }
    if (column < Shape::VALUE_WIDTH)
        Shape::Output::matrix(y, batch, head)[Shape::Output::at(query, column)] =
            from_float<Y>(mixed * inverse_of<Shape::ZERO_ROWS>(total));
}

#endif
