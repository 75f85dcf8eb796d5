/* Reads weights.epw; docs/format.md specifies its bytes. */
#ifndef WEIGHTS_H
#define WEIGHTS_H

#include <stddef.h>
#include <stdint.h>

struct weight {
    const void *data; /* aligned to 64 bytes, read-only */
    uint64_t bytes;
};

struct weights {
    void *map;
    size_t map_bytes;
    uint32_t checksum; /* of the header, which covers the payloads' checksums */
    uint32_t count;
    struct weight *tensors; /* in the order of the file */
};

/* Map a file and check every byte of it. 0, or -1 with error_text() set and nothing to close. */
int weights_open(struct weights *weights, const char *path);

void weights_close(struct weights *weights);

#endif
