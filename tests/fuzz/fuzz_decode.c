/* libFuzzer: decode() on any bytes. The first three say how many bytes the tensor has. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "decode.h"
#include "fuzz.h"

enum { SIZE_BYTES = 3, MOST_RAW_BYTES = 1 << 17 };

const char *fuzz_verdict;

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed)
{
    size = LLVMFuzzerMutate(data, size, max_size);
    if (seed % 2 == 0 && size > SIZE_BYTES)
        fit_section(data + SIZE_BYTES, size - SIZE_BYTES);
    return size;
}

/* Decode into exactly `raw_bytes` bytes on the heap, so that the sanitizer sees any other write. */
static const char *decode_over(const uint8_t *payload, size_t bytes, size_t raw_bytes,
                               int background, uint8_t **tensor)
{
    *tensor = malloc(raw_bytes);
    if (*tensor == NULL)
        abort();
    memset(*tensor, background, raw_bytes);
    return decode(payload, bytes, *tensor, raw_bytes);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_verdict = "too short";
    if (size < SIZE_BYTES)
        return 0;
    size_t raw_bytes = (size_t)(data[0] | data[1] << 8 | data[2] << 16) % MOST_RAW_BYTES + 1;
    size_t bytes = size - SIZE_BYTES;
    uint8_t *payload = malloc(bytes); /* of its exact size too */
    if (payload == NULL)
        abort();
    memcpy(payload, data + SIZE_BYTES, bytes);

    uint8_t *tensor;
    uint8_t *again;
    const char *broken = decode_over(payload, bytes, raw_bytes, 0x00, &tensor);
    const char *broken_again = decode_over(payload, bytes, raw_bytes, 0xff, &again);
    if (broken != broken_again)
        abort(); /* what was in memory before decides */
    if (broken == NULL && memcmp(tensor, again, raw_bytes) != 0)
        abort(); /* not every byte was written */
    fuzz_verdict = broken != NULL ? broken : "accepted";
    free(tensor);
    free(again);
    free(payload);
    return 0;
}
