// What the lanes of a warp compute together.
//
// Fragments are those of the PTX ISA, section "Warp-level matrix instructions". With
// group = lane / 4 and member = lane % 4, a lane's registers hold, lowest bits first:
//
//   m16n8k16, f16   a0: row group,     columns 2 member, +1       b0: rows 2 member, +1,
//                   a1: row group + 8, columns 2 member, +1           column group
//                   a2: row group,     columns 2 member + 8, +9   b1: rows 2 member + 8, +9,
//                   a3: row group + 8, columns 2 member + 8, +9       column group
//
//   m16n8k8, tf32   a0: row group,     column member              b0: row member, column group
//                   a1: row group + 8, column member              b1: row member + 4, column group
//                   a2: row group,     column member + 4
//                   a3: row group + 8, column member + 4
//
//   m16n8k32, s8    a0: row group,     columns 4 member .. +3     b0: rows 4 member .. +3,
//                   a1: row group + 8, columns 4 member .. +3         column group
//                   a2: row group,     columns 4 member + 16 ..   b1: rows 4 member + 16 .. +19,
//                   a3: row group + 8, columns 4 member + 16 ..       column group
//
//   all three       d0, d1: row group, columns 2 member, +1       d2, d3: row group + 8, the same
//
//   ldmatrix        lane 8 m + i gives the address of row i (16 bytes) of matrix m; register m of a
//                   lane holds elements 2 member, +1 of row `group` of matrix m. Transposed: row
//                   2 member, +1 of column `group`.
//
// Products of float16 and of TF32 are exact in float32. The order in which a GPU adds them, and
// with how many bits, is not documented: here it is one after the other, in float32.
#include "warp.h"

#include <string.h>
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace emulator {

#ifdef __aarch64__
typedef __fp16 Half;
#else
typedef _Float16 Half;
#endif

static inline uint32_t word(const Operands &operands)
{
    uint32_t value;
    memcpy(&value, operands.a, sizeof value);
    return value;
}

// A fragment register `index` of A is in row group + 8 * (index % 2), and in the half index / 2 of
// the columns; of B in the half `index` of the rows.
template <class T, unsigned DEPTH>
struct Multiplicands {
    static const unsigned PER_REGISTER = 4 / sizeof(T);

    alignas(64) T a[16][DEPTH]; // [row, k]
    alignas(64) T b[8][DEPTH];  // [column, k]

    explicit Multiplicands(const Operands (&operands)[LANES])
    {
        for (unsigned lane = 0; lane < LANES; ++lane) {
            unsigned group = lane / 4, k = lane % 4 * PER_REGISTER;
            const uint32_t *from = (const uint32_t *)operands[lane].a;
            memcpy(&a[group][k], from, 4);
            memcpy(&a[group + 8][k], from + 1, 4);
            memcpy(&a[group][k + DEPTH / 2], from + 2, 4);
            memcpy(&a[group + 8][k + DEPTH / 2], from + 3, 4);
            from = (const uint32_t *)operands[lane].b;
            memcpy(&b[group][k], from, 4);
            memcpy(&b[group][k + DEPTH / 2], from + 1, 4);
        }
    }
};

// Element [row, column] of the accumulators is a lane's register d[2 * (row / 8)] or the next.
template <class T>
static void gather_accumulators(T (&d)[16][8], const Operands (&operands)[LANES])
{
    for (unsigned lane = 0; lane < LANES; ++lane) {
        const T *from = (const T *)operands[lane].result;
        memcpy(&d[lane / 4][lane % 4 * 2], from, 2 * sizeof(T));
        memcpy(&d[lane / 4 + 8][lane % 4 * 2], from + 2, 2 * sizeof(T));
    }
}

template <class T>
static void scatter_accumulators(const T (&d)[16][8], const Operands (&operands)[LANES])
{
    for (unsigned lane = 0; lane < LANES; ++lane) {
        T *to = (T *)operands[lane].result;
        memcpy(to, &d[lane / 4][lane % 4 * 2], 2 * sizeof(T));
        memcpy(to + 2, &d[lane / 4 + 8][lane % 4 * 2], 2 * sizeof(T));
    }
}

typedef float Row __attribute__((vector_size(32))); // of accumulators, and of B

template <unsigned DEPTH>
static void multiply_floats(const float (&a)[16][DEPTH], const float (&b)[DEPTH][8],
                            const Operands (&operands)[LANES])
{
    alignas(64) float d[16][8];
    gather_accumulators(d, operands);
    for (unsigned row = 0; row < 16; ++row) {
        Row sum = *(const Row *)d[row];
        for (unsigned k = 0; k < DEPTH; ++k)
            sum += a[row][k] * *(const Row *)b[k];
        *(Row *)d[row] = sum;
    }
    scatter_accumulators(d, operands);
}

// Eight at a time, which compilers do not do by themselves.
static inline void widen(float *to, const uint16_t *from)
{
#ifdef __F16C__
    _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)));
#else
    for (unsigned i = 0; i < 8; ++i) {
        Half value;
        memcpy(&value, &from[i], sizeof value);
        to[i] = (float)value;
    }
#endif
}

static void mma_f16(const Operands (&operands)[LANES])
{
    Multiplicands<uint16_t, 16> given(operands);
    alignas(64) uint16_t turned[16][8];
    alignas(64) float a[16][16], b[16][8];
    for (unsigned k = 0; k < 16; ++k)
        for (unsigned column = 0; column < 8; ++column)
            turned[k][column] = given.b[column][k];
    for (unsigned i = 0; i < 16; ++i) {
        widen(a[i], given.a[i]);
        widen(a[i] + 8, given.a[i] + 8);
        widen(b[i], turned[i]);
    }
    multiply_floats(a, b, operands);
}

// The last 13 bits of TF32 do not count.
static void mma_tf32(const Operands (&operands)[LANES])
{
    Multiplicands<uint32_t, 8> given(operands);
    alignas(64) uint32_t bits_b[8][8];
    for (unsigned row = 0; row < 16; ++row)
        for (unsigned k = 0; k < 8; ++k)
            given.a[row][k] &= ~0x1fffu;
    for (unsigned column = 0; column < 8; ++column)
        for (unsigned k = 0; k < 8; ++k)
            bits_b[k][column] = given.b[column][k] & ~0x1fffu;
    alignas(64) float a[16][8], b[8][8];
    memcpy(a, given.a, sizeof a);
    memcpy(b, bits_b, sizeof b);
    multiply_floats(a, b, operands);
}

static void mma_s8(const Operands (&operands)[LANES])
{
    Multiplicands<int8_t, 32> given(operands);
    alignas(64) int16_t a[16][32], b[8][32]; // two products and their sum are one instruction
    for (unsigned row = 0; row < 16; ++row)
        for (unsigned k = 0; k < 32; ++k)
            a[row][k] = given.a[row][k];
    for (unsigned column = 0; column < 8; ++column)
        for (unsigned k = 0; k < 32; ++k)
            b[column][k] = given.b[column][k];
    alignas(64) int32_t d[16][8];
    gather_accumulators(d, operands);
    for (unsigned row = 0; row < 16; ++row)
        for (unsigned column = 0; column < 8; ++column) {
            int32_t sum = 0;
            for (unsigned k = 0; k < 32; ++k)
                sum += (int32_t)a[row][k] * (int32_t)b[column][k];
            d[row][column] = (int32_t)((uint32_t)d[row][column] + (uint32_t)sum);
        }
    scatter_accumulators(d, operands);
}

static void ldmatrix(const Operands (&operands)[LANES], unsigned matrices, bool transposed)
{
    uint16_t matrix[4][8][8];
    for (unsigned lane = 0; lane < 8 * matrices; ++lane)
        memcpy(matrix[lane / 8][lane % 8], operands[lane].a, 16);
    for (unsigned lane = 0; lane < LANES; ++lane)
        for (unsigned m = 0; m < matrices; ++m) {
            unsigned group = lane / 4, element = lane % 4 * 2;
            uint32_t low = transposed ? matrix[m][element][group] : matrix[m][group][element];
            uint32_t high =
                transposed ? matrix[m][element + 1][group] : matrix[m][group][element + 1];
            ((uint32_t *)operands[lane].result)[m] = low | high << 16;
        }
}

static void shuffle_words(Operation operation, const Operands (&operands)[LANES])
{
    uint32_t given[LANES];
    for (unsigned lane = 0; lane < LANES; ++lane)
        given[lane] = word(operands[lane]);
    for (unsigned lane = 0; lane < LANES; ++lane) {
        unsigned parameter = operands[lane].parameter, source = lane;
        switch (operation) {
        case Operation::SHUFFLE:
            source = parameter % LANES;
            break;
        case Operation::SHUFFLE_XOR:
            source = lane ^ parameter;
            break;
        case Operation::SHUFFLE_DOWN:
            source = lane + parameter;
            break;
        default:
            source = lane - parameter;
        }
        if (source >= LANES) // a lane that is not there: the lane keeps its own
            source = lane;
        memcpy(operands[lane].result, &given[source], sizeof(uint32_t));
    }
}

static void ballot_words(const Operands (&operands)[LANES])
{
    uint32_t result = 0;
    for (unsigned lane = 0; lane < LANES; ++lane)
        result |= word(operands[lane]) << lane;
    for (unsigned lane = 0; lane < LANES; ++lane)
        memcpy(operands[lane].result, &result, sizeof result);
}

void compute(Operation operation, const Operands (&operands)[LANES])
{
    switch (operation) {
    case Operation::SHUFFLE:
    case Operation::SHUFFLE_XOR:
    case Operation::SHUFFLE_DOWN:
    case Operation::SHUFFLE_UP:
        return shuffle_words(operation, operands);
    case Operation::BALLOT:
        return ballot_words(operands);
    case Operation::LDMATRIX_X4:
        return ldmatrix(operands, 4, false);
    case Operation::LDMATRIX_X4_TRANSPOSED:
        return ldmatrix(operands, 4, true);
    case Operation::LDMATRIX_X2:
        return ldmatrix(operands, 2, false);
    case Operation::LDMATRIX_X2_TRANSPOSED:
        return ldmatrix(operands, 2, true);
    case Operation::MMA_F16:
        return mma_f16(operands);
    case Operation::MMA_TF32:
        return mma_tf32(operands);
    case Operation::MMA_S8:
        return mma_s8(operands);
    case Operation::SYNCWARP:
    case Operation::BARRIER:
    case Operation::EXIT:
        return;
    }
}

} // namespace emulator
