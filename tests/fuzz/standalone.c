/* Fuzzing without libFuzzer: replays a corpus, then runs changed copies of it.
 *
 *     PROGRAM RUNS SEED FILE...
 *
 * The same arguments run the same inputs everywhere. Prints how often there was which verdict. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fuzz.h"

enum { MAX_BYTES = 1 << 17, MAX_VERDICTS = 64, MAX_CHANGES = 4 };

struct input {
    uint8_t *bytes;
    size_t count;
};

struct tally {
    char verdict[128];
    unsigned long runs;
};

static uint64_t state;

/* splitmix64 (Steele, Lea and Flood, 2014) */
static uint32_t random_below(uint32_t limit)
{
    uint64_t mixed = state += 0x9e3779b97f4a7c15u;
    mixed = (mixed ^ mixed >> 30) * 0xbf58476d1ce4e5b9u;
    mixed = (mixed ^ mixed >> 27) * 0x94d049bb133111ebu;
    return (uint32_t)((mixed ^ mixed >> 31) >> 32) % limit;
}

static size_t erase(uint8_t *data, size_t size, size_t at)
{
    size_t count = 1 + random_below(size - at < 8 ? (uint32_t)(size - at) : 8);
    memmove(data + at, data + at + count, size - at - count);
    return size - count;
}

static size_t insert(uint8_t *data, size_t size, size_t max_size, size_t at)
{
    size_t count = 1 + random_below(8);
    if (count > max_size - size)
        return size;
    memmove(data + at + count, data + at, size - at);
    for (size_t k = 0; k < count; k++)
        data[at + k] = (uint8_t)random_below(256);
    return size + count;
}

/* Overwrite up to four bytes by a number that decides something in many formats. */
static void overwrite(uint8_t *data, size_t size, size_t at)
{
    static const uint32_t NUMBERS[] = {0,   1,   2,      12,      13,         16,        64,
                                       254, 255, 0xffff, 0x10000, 0x7fffffff, 0xffffffff};
    uint32_t number = NUMBERS[random_below(sizeof NUMBERS / sizeof *NUMBERS)];
    size_t width = (size_t)1 << random_below(3);
    for (size_t k = 0; k < width && at + k < size; k++)
        data[at + k] = (uint8_t)(number >> 8 * k);
}

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size)
{
    uint32_t changes = 1 + random_below(MAX_CHANGES);
    for (uint32_t change = 0; change < changes; change++) {
        if (size == 0) {
            size = insert(data, size, max_size, 0);
            continue;
        }
        size_t at = random_below((uint32_t)size);
        switch (random_below(6)) {
        case 0:
            data[at] ^= (uint8_t)(1 << random_below(8));
            break;
        case 1:
            data[at] = (uint8_t)random_below(256);
            break;
        case 2:
            data[at] += random_below(2) ? 1 : 255;
            break;
        case 3:
            overwrite(data, size, at);
            break;
        case 4:
            size = erase(data, size, at);
            break;
        default:
            size = insert(data, size, max_size, at);
        }
    }
    return size;
}

/* Used where the target has none of its own. */
__attribute__((weak)) size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size,
                                                     unsigned seed)
{
    (void)seed;
    return LLVMFuzzerMutate(data, size, max_size);
}

static int read_input(struct input *input, const char *path)
{
    static uint8_t bytes[MAX_BYTES];
    FILE *file = fopen(path, "rb");
    if (file == NULL) {
        perror(path);
        return -1;
    }
    input->count = fread(bytes, 1, sizeof bytes, file);
    fclose(file);
    input->bytes = malloc(input->count + 1);
    if (input->bytes == NULL)
        return -1;
    memcpy(input->bytes, bytes, input->count);
    return 0;
}

static void count_verdict(struct tally *tallies)
{
    int at = 0;
    while (tallies[at].runs > 0 && strcmp(tallies[at].verdict, fuzz_verdict) != 0)
        if (++at == MAX_VERDICTS)
            abort();
    snprintf(tallies[at].verdict, sizeof tallies[at].verdict, "%s", fuzz_verdict);
    tallies[at].runs++;
}

int main(int count, char **arguments)
{
    static uint8_t changed[MAX_BYTES];
    static struct tally tallies[MAX_VERDICTS];
    if (count < 4) {
        fprintf(stderr, "usage: %s RUNS SEED FILE...\n", arguments[0]);
        return 2;
    }
    unsigned long runs = strtoul(arguments[1], NULL, 10);
    state = strtoul(arguments[2], NULL, 10);
    uint32_t files = (uint32_t)count - 3;
    struct input *inputs = calloc(files, sizeof *inputs);
    if (inputs == NULL)
        return 1;
    for (uint32_t i = 0; i < files; i++) {
        if (read_input(&inputs[i], arguments[i + 3]) != 0)
            return 1;
        LLVMFuzzerTestOneInput(inputs[i].bytes, inputs[i].count);
        count_verdict(tallies);
    }
    for (unsigned long run = 0; run < runs; run++) {
        const struct input *input = &inputs[random_below(files)];
        memcpy(changed, input->bytes, input->count);
        unsigned seed = random_below(UINT32_MAX);
        size_t size = LLVMFuzzerCustomMutator(changed, input->count, sizeof changed, seed);
        LLVMFuzzerTestOneInput(changed, size);
        count_verdict(tallies);
    }
    for (int i = 0; i < MAX_VERDICTS && tallies[i].runs > 0; i++)
        printf("%lu %s\n", tallies[i].runs, tallies[i].verdict);
    for (uint32_t i = 0; i < files; i++)
        free(inputs[i].bytes);
    free(inputs);
    return 0;
}
