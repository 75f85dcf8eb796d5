// Every instruction that CUDA C++ has no word for, and every intrinsic: nothing else in this folder
// contains inline PTX. Fragments are laid out as the PTX ISA says, section "Warp-level matrix
// instructions".
#ifndef INSTRUCTIONS_CUH
#define INSTRUCTIONS_CUH

#include "integers.cuh"

// A block's dynamic shared memory, as an array of bytes.
#define SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]

// The order of kernels -----------------------------------------------------------------------------
// From compute capability 9.0 on, a kernel may start before the one before it has ended.

// Wait until all kernels before this one are done and what they wrote is there.
__device__ __forceinline__ void wait_for_previous()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Let the next kernel start as soon as every block of this one has come here.
__device__ __forceinline__ void let_next_start()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Copies from global to shared memory that do not pass through registers -------------------------

__device__ __forceinline__ uint32_t shared_address(const void *pointer)
{
    return (uint32_t)__cvta_generic_to_shared(pointer);
}

// Copy 4, 8 or 16 bytes, or write zeros where they are not wanted; `global` is not read then.
template <int BYTES>
__device__ __forceinline__ void cp_async_zero(void *shared, const void *global, bool keep)
{
    int bytes = keep ? BYTES : 0;
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                     "l"(global), "r"(bytes)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                     "l"(global), "n"(BYTES), "r"(bytes)
                     : "memory");
}

template <int BYTES>
__device__ __forceinline__ void cp_async(void *shared, const void *global)
{
    cp_async_zero<BYTES>(shared, global, true);
}

// End a group of copies.
__device__ __forceinline__ void cp_async_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Wait until all of this thread's groups but the latest COUNT have arrived.
template <int COUNT>
__device__ __forceinline__ void cp_async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(COUNT) : "memory");
}

// Matrix fragments, all lanes of a warp together -----------------------------------------------

// Load four 8 x 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same, transposed on the way.
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&r)[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Load two such matrices; the addresses of lanes 16 to 31 are not used.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_transposed(uint32_t (&r)[2], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

// d += a * b for a [16, 16] row-major, b [16, 8] column-major, both float16; d [16, 8] float32.
__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2])
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same for a [16, 8] and b [8, 8] in TF32: float32 of which the last 13 bits do not count.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2])
{
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same for a [16, 32] and b [32, 8] in int8; d int32, which wraps.
__device__ __forceinline__ void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[2])
{
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Integers -------------------------------------------------------------------------------------

// c plus the dot product of four int8 in a and four in b.
__device__ __forceinline__ int32_t dp4a(int32_t a, int32_t b, int32_t c)
{
    return __dp4a(a, b, c);
}

// Four of the eight bytes of a (0 to 3) and b (4 to 7), as the nibbles of the selector say.
__device__ __forceinline__ uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector)
{
    return __byte_perm(a, b, selector);
}

// Floats ---------------------------------------------------------------------------------------

// Round to TF32, to nearest, ties away from zero.
__device__ __forceinline__ uint32_t round_tf32(float x)
{
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}

// Bits of a float16, rounded to nearest even.
__device__ __forceinline__ uint16_t half_bits(float x)
{
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

__device__ __forceinline__ float half_value(uint16_t bits)
{
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

// Two float16 in one word, the first in the lower bits.
__device__ __forceinline__ uint32_t half_pair(float low, float high)
{
    uint32_t bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

// A product and a sum that the compiler may not fuse: integer outputs depend on every bit.
__device__ __forceinline__ float multiply(float a, float b)
{
    return __fmul_rn(a, b);
}

__device__ __forceinline__ float add(float a, float b)
{
    return __fadd_rn(a, b);
}

// The quotient as IEEE 754 rounds it.
__device__ __forceinline__ float divide(float a, float b)
{
    return __fdiv_rn(a, b);
}

// Nearest integer, half to even.
__device__ __forceinline__ int32_t round_even(float x)
{
    return __float2int_rn(x);
}

__device__ __forceinline__ float bits_as_float(uint32_t bits)
{
    return __uint_as_float(bits);
}

__device__ __forceinline__ uint32_t float_as_bits(float x)
{
    return __float_as_uint(x);
}

__device__ __forceinline__ float exp_of(float x)
{
    return expf(x);
}

__device__ __forceinline__ float tanh_of(float x)
{
    return tanhf(x);
}

__device__ __forceinline__ float erf_of(float x)
{
    return erff(x);
}

__device__ __forceinline__ float inverse_root(float x)
{
    return rsqrtf(x);
}

// Memory ---------------------------------------------------------------------------------------

// Load through the cache for what no kernel writes while this one runs.
template <class T>
__device__ __forceinline__ T load_cached(const T *pointer)
{
    return __ldg(pointer);
}

// Load 16 bytes that another block of this kernel has written: past this multiprocessor's cache.
template <class T>
__device__ __forceinline__ T load_global(const T *pointer)
{
    static_assert(sizeof(T) == 16, "16 bytes at once");
    uint4 words = __ldcg((const uint4 *)pointer);
    return *(const T *)&words;
}

#endif
