/* What libFuzzer and standalone.c both offer to a target, and what a target offers to them. */
#ifndef FUZZ_H
#define FUZZ_H

#include <stddef.h>
#include <stdint.h>

/* Run one input; 0. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Change `size` bytes into at most `max_size`; returns how many there are now. */
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);

/* The same, by a target that knows the format. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed);

/* What the latest input came to, in words: standalone.c counts them. */
extern const char *fuzz_verdict;

/* Make a payload's first section as long as the payload, so that what is inside is looked at. */
static inline void fit_section(uint8_t *payload, size_t size)
{
    for (int i = 0; i < 4 && size >= 12; i++)
        payload[8 + i] = (uint8_t)((size - 12) >> 8 * i);
}

#endif
