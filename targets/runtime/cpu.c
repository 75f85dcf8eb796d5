/* This file is compiled for the plainest CPU of the architecture and runs before any kernel, so
 * that a wrong CPU gets a message instead of SIGILL. targets/export.py reads the feature names out
 * of the tables below: one row each, the name first. */
#include "cpu.h"

#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "error.h"

#if defined(__x86_64__) || defined(__i386__)

#include <cpuid.h>

enum { EAX, EBX, ECX, EDX };

/* Bits of XCR0: registers that the operating system saves. */
enum { NO_STATE = 0, AVX_STATE = 0x6, AVX512_STATE = 0xe6, AMX_STATE = 0x60000 };

static const struct {
    const char *name;
    unsigned leaf, subleaf;
    int word, bit;
    unsigned state;
} FEATURES[] = {
    {"pni", 1, 0, ECX, 0, NO_STATE},
    {"pclmulqdq", 1, 0, ECX, 1, NO_STATE},
    {"ssse3", 1, 0, ECX, 9, NO_STATE},
    {"fma", 1, 0, ECX, 12, AVX_STATE},
    {"cx16", 1, 0, ECX, 13, NO_STATE},
    {"sse4_1", 1, 0, ECX, 19, NO_STATE},
    {"sse4_2", 1, 0, ECX, 20, NO_STATE},
    {"movbe", 1, 0, ECX, 22, NO_STATE},
    {"popcnt", 1, 0, ECX, 23, NO_STATE},
    {"aes", 1, 0, ECX, 25, NO_STATE},
    {"avx", 1, 0, ECX, 28, AVX_STATE},
    {"f16c", 1, 0, ECX, 29, AVX_STATE},
    {"sse", 1, 0, EDX, 25, NO_STATE},
    {"sse2", 1, 0, EDX, 26, NO_STATE},
    {"bmi1", 7, 0, EBX, 3, NO_STATE},
    {"avx2", 7, 0, EBX, 5, AVX_STATE},
    {"bmi2", 7, 0, EBX, 8, NO_STATE},
    {"avx512f", 7, 0, EBX, 16, AVX512_STATE},
    {"avx512dq", 7, 0, EBX, 17, AVX512_STATE},
    {"adx", 7, 0, EBX, 19, NO_STATE},
    {"avx512ifma", 7, 0, EBX, 21, AVX512_STATE},
    {"avx512cd", 7, 0, EBX, 28, AVX512_STATE},
    {"avx512bw", 7, 0, EBX, 30, AVX512_STATE},
    {"avx512vl", 7, 0, EBX, 31, AVX512_STATE},
    {"avx512vbmi", 7, 0, ECX, 1, AVX512_STATE},
    {"avx512_vbmi2", 7, 0, ECX, 6, AVX512_STATE},
    {"gfni", 7, 0, ECX, 8, NO_STATE},
    {"vaes", 7, 0, ECX, 9, AVX_STATE},
    {"vpclmulqdq", 7, 0, ECX, 10, AVX_STATE},
    {"avx512_vnni", 7, 0, ECX, 11, AVX512_STATE},
    {"avx512_bitalg", 7, 0, ECX, 12, AVX512_STATE},
    {"avx512_vpopcntdq", 7, 0, ECX, 14, AVX512_STATE},
    {"avx512_vp2intersect", 7, 0, EDX, 8, AVX512_STATE},
    {"amx_bf16", 7, 0, EDX, 22, AMX_STATE},
    {"avx512_fp16", 7, 0, EDX, 23, AVX512_STATE},
    {"amx_tile", 7, 0, EDX, 24, AMX_STATE},
    {"amx_int8", 7, 0, EDX, 25, AMX_STATE},
    {"avx_vnni", 7, 1, EAX, 4, AVX_STATE},
    {"avx512_bf16", 7, 1, EAX, 5, AVX512_STATE},
    {"lahf_lm", 0x80000001, 0, ECX, 0, NO_STATE},
    {"abm", 0x80000001, 0, ECX, 5, NO_STATE},
};

/* Registers that the operating system saves when it switches threads. */
static unsigned saved_state(void)
{
    const unsigned osxsave = 1u << 27;
    unsigned word[4];
    if (!__get_cpuid(1, &word[EAX], &word[EBX], &word[ECX], &word[EDX]) ||
        (word[ECX] & osxsave) == 0)
        return 0;
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

static bool has(unsigned row)
{
    unsigned word[4] = {0};
    if (!__get_cpuid_count(FEATURES[row].leaf, FEATURES[row].subleaf, &word[EAX], &word[EBX],
                           &word[ECX], &word[EDX]))
        return false;
    unsigned state = FEATURES[row].state;
    return (word[FEATURES[row].word] >> FEATURES[row].bit & 1) != 0 &&
           (state == NO_STATE || (saved_state() & state) == state);
}

#elif defined(__aarch64__) || defined(__arm__)

#include <sys/auxv.h>

static const struct {
    const char *name;
    unsigned long word;
    int bit;
} FEATURES[] = {
#if defined(__aarch64__)
    {"fp", AT_HWCAP, 0},
    {"asimd", AT_HWCAP, 1},
    {"aes", AT_HWCAP, 3},
    {"pmull", AT_HWCAP, 4},
    {"sha1", AT_HWCAP, 5},
    {"sha2", AT_HWCAP, 6},
    {"crc32", AT_HWCAP, 7},
    {"atomics", AT_HWCAP, 8},
    {"fphp", AT_HWCAP, 9},
    {"asimdhp", AT_HWCAP, 10},
    {"asimdrdm", AT_HWCAP, 12},
    {"jscvt", AT_HWCAP, 13},
    {"fcma", AT_HWCAP, 14},
    {"lrcpc", AT_HWCAP, 15},
    {"dcpop", AT_HWCAP, 16},
    {"sha3", AT_HWCAP, 17},
    {"asimddp", AT_HWCAP, 20},
    {"sha512", AT_HWCAP, 21},
    {"sve", AT_HWCAP, 22},
    {"asimdfhm", AT_HWCAP, 23},
    {"sve2", AT_HWCAP2, 1},
    {"svei8mm", AT_HWCAP2, 9},
    {"i8mm", AT_HWCAP2, 13},
    {"bf16", AT_HWCAP2, 14},
#else
    {"half", AT_HWCAP, 1},
    {"thumb", AT_HWCAP, 2},
    {"fastmult", AT_HWCAP, 4},
    {"vfp", AT_HWCAP, 6},
    {"edsp", AT_HWCAP, 7},
    {"neon", AT_HWCAP, 12},
    {"vfpv3", AT_HWCAP, 13},
    {"tls", AT_HWCAP, 15},
    {"vfpv4", AT_HWCAP, 16},
    {"idiva", AT_HWCAP, 17},
    {"idivt", AT_HWCAP, 18},
    {"vfpd32", AT_HWCAP, 19},
    {"fphp", AT_HWCAP, 22},
    {"asimdhp", AT_HWCAP, 23},
    {"asimddp", AT_HWCAP, 24},
    {"aes", AT_HWCAP2, 0},
    {"crc32", AT_HWCAP2, 4},
#endif
};

static bool has(unsigned row)
{
    return (getauxval(FEATURES[row].word) >> FEATURES[row].bit & 1) != 0;
}

#else
#error "add the feature names of this architecture"
#endif

bool cpu_has(const char *feature)
{
    for (unsigned row = 0; row < sizeof FEATURES / sizeof *FEATURES; row++)
        if (strcmp(FEATURES[row].name, feature) == 0)
            return has(row);
    return false;
}

int cpu_check(const char *const *features)
{
    char missing[256] = "";
    size_t used = 0;
    for (; *features != NULL; features++)
        if (!cpu_has(*features) && used < sizeof missing)
            used += (size_t)snprintf(missing + used, sizeof missing - used, " %s", *features);
    if (used == 0)
        return 0;
    error_set("this CPU lacks%s. Compile the model for this CPU.", missing);
    return -1;
}
