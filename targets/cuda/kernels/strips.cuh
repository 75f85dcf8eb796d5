// Windows that slide over an NHWC tensor: which outputs a thread has, and which inputs they need.
//
// A thread has a strip: ROWS x COLUMNS output pixels next to each other, of some channels. `S` is a
// struct of constants that `targets/cuda/strips.py` writes.
//
// Compilers may move loads by pointers that are `__restrict__` past `wait_for_previous`, either
// way. So no pointer is, but one to constants that are read after it.
#ifndef STRIPS_CUH
#define STRIPS_CUH

#include "types.cuh"

struct Strip {
    int image, row, column;  // of the first output pixel
    int part;                // which channels
    bool exists;             // blocks reach beyond the last strip
};

// Threads: x counts parts, y strips along a line; z strips one below the other, or nothing where
// several threads share a strip.
template <class S>
__device__ __forceinline__ Strip strip_of_thread()
{
    Strip strip;
    int along = (int)blockIdx.x / S::BLOCKS_OF_PARTS;
    int below = S::SHARING > 1 ? (int)blockIdx.y : (int)blockIdx.y * S::BLOCK_Z + (int)threadIdx.z;
    strip.part = (int)blockIdx.x % S::BLOCKS_OF_PARTS * S::BLOCK_X + (int)threadIdx.x;
    strip.column = (along * S::BLOCK_Y + (int)threadIdx.y) * S::COLUMNS;
    strip.row = below * S::ROWS;
    strip.image = (int)blockIdx.z;
    strip.exists =
        strip.part < S::PARTS && strip.column < S::OUT_WIDTH && strip.row < S::OUT_HEIGHT;
    return strip;
}

// Tell whether a row of the input is inside the image, where some strip reads beyond it.
template <class S>
__device__ __forceinline__ bool row_inside(int row)
{
    return !S::BEYOND_ROWS || (unsigned)row < (unsigned)S::HEIGHT;
}

template <class S>
__device__ __forceinline__ bool column_inside(int column)
{
    return !S::BEYOND_COLUMNS || (unsigned)column < (unsigned)S::WIDTH;
}

// Columns from the first that TAPS neighbouring taps of a strip read to the last.
template <class S, int TAPS>
struct Span {
    static const int COLUMNS = (S::COLUMNS - 1) * S::STRIDE_X + (TAPS - 1) * S::DILATION_X + 1;

    // Tell whether any of them reads this one.
    static __device__ __forceinline__ constexpr bool reads(int column)
    {
        for (int pixel = 0; pixel < S::COLUMNS; ++pixel)
            for (int tap = 0; tap < TAPS; ++tap)
                if (pixel * S::STRIDE_X + tap * S::DILATION_X == column)
                    return true;
        return false;
    }
};

// An element of a word.
template <class T>
struct Element {
    static __device__ __forceinline__ T of(uint32_t word, int i)
    {
        return (T)(word >> 8 * (int)sizeof(T) * i);
    }
};

template <>
struct Element<half> {
    static __device__ __forceinline__ half of(uint32_t word, int i)
    {
        return half{(uint16_t)(word >> 16 * i)};
    }
};

template <>
struct Element<float> {
    static __device__ __forceinline__ float of(uint32_t word, int) { return bits_as_float(word); }
};

// N neighbouring elements as they are in memory. What is beyond the image takes whole words, since
// compilers would choose element by element, and wait for each before they load the next.
template <class T, int N>
struct Inputs {
    static const int PER_WORD = 4 / (int)sizeof(T), WORDS = N < PER_WORD ? 1 : N / PER_WORD;
    Vector<uint32_t, WORDS> words;

    __device__ __forceinline__ T lane(int i) const
    {
        return Element<T>::of(words.lane[i / PER_WORD], i % PER_WORD);
    }

    __device__ __forceinline__ void fill(uint32_t word)
    {
#pragma unroll
        for (int i = 0; i < WORDS; ++i)
            words.lane[i] = word;
    }

    __device__ __forceinline__ void load(const T *x)
    {
        if (N >= PER_WORD)
            words = *(const Vector<uint32_t, WORDS> *)x;
        else if (N * sizeof(T) == 2)
            words.lane[0] = *(const uint16_t *)x;
        else
            words.lane[0] = *(const uint8_t *)x;
    }
};

// Load a row of inputs, each N neighbouring elements of one pixel; beyond the image, `fill` is each
// word of them. `x` is where the span's first column lies, `left` its index in the image; PITCH
// elements lie between two columns.
template <class S, int TAPS, int PITCH, class T, int N>
__device__ __forceinline__ void load_span(Inputs<T, N> (&line)[Span<S, TAPS>::COLUMNS], const T *x,
                                          int left, bool row_exists, uint32_t fill)
{
#pragma unroll
    for (int column = 0; column < Span<S, TAPS>::COLUMNS; ++column) {
        if (!Span<S, TAPS>::reads(column))
            continue;
        line[column].fill(fill);
        if (row_exists && column_inside<S>(left + column))
            line[column].load(x + column * PITCH);
    }
}

// Products of floats, and of integers, which wrap.
template <class X, class W>
__device__ __forceinline__ void multiply_add(float &sum, X x, W w)
{
    sum += to_float(x) * to_float(w);
}

template <class X, class W>
__device__ __forceinline__ void multiply_add(int32_t &sum, X x, W w)
{
    sum = (int32_t)((uint32_t)sum + (uint32_t)(int32_t)x * (uint32_t)(int32_t)w);
}

__device__ __forceinline__ float wrapping_sum(float a, float b) { return a + b; }

__device__ __forceinline__ int32_t wrapping_sum(int32_t a, int32_t b)
{
    return (int32_t)((uint32_t)a + (uint32_t)b);
}

// Finish the outputs of a strip and store those that exist; `y` is where the first one lies.
template <class S, class Finish, int N, class A>
__device__ __forceinline__ void store_strip(const A (&sums)[S::ROWS][S::COLUMNS][N],
                                            const Strip &strip,
                                            const Vector<typename Finish::Factor, N> &factors,
                                            const typename Finish::Residual *residual,
                                            typename Finish::Output *y)
{
    typedef typename Finish::Residual Residual;
    typedef Vector<typename Finish::Output, N> Outputs;
#pragma unroll
    for (int row = 0; row < S::ROWS; ++row) {
#pragma unroll
        for (int column = 0; column < S::COLUMNS; ++column) {
            if (S::OUT_HEIGHT % S::ROWS && strip.row + row >= S::OUT_HEIGHT)
                continue;
            if (S::OUT_WIDTH % S::COLUMNS && strip.column + column >= S::OUT_WIDTH)
                continue;
            int at = (row * S::OUT_WIDTH + column) * S::OUT_CHANNELS;
            Vector<Residual, N> added = {};
            if (Finish::HAS_RESIDUAL)
                added = *(const Vector<Residual, N> *)(residual + at);
            Outputs outputs;
#pragma unroll
            for (int lane = 0; lane < N; ++lane)
                outputs.lane[lane] = Finish::of(sums[row][column][lane], factors.lane[lane],
                                                added.lane[lane]);
            *(Outputs *)(y + at) = outputs;
        }
    }
}

#endif
