/* Reads weights.epw; docs/format.md specifies its bytes. */
#ifndef WEIGHTS_H
#define WEIGHTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "weights_cache.h"

struct weight {
    const void *data; /* aligned to 64 bytes, read-only; NULL while it is coded */
    uint64_t bytes;
    const uint8_t *payload; /* its bytes in the file */
    uint64_t payload_bytes;
    uint32_t checksum; /* of the payload */
    uint32_t first;    /* the first tensor with this payload, mostly the tensor itself */
    bool is_coded;
};

struct weights {
    const char *path;
    mode_t mode; /* who may read and write the file */
    void *map;
    size_t map_bytes;
    uint32_t checksum; /* of the header, which covers the payloads' checksums */
    uint32_t count;
    struct weight *tensors; /* in the order of the file */
    void *memory;           /* of decoded tensors, where they are not in a cache file */
    struct weights_cache cache;
};

/* Map a file, and check all of it but its coded payloads. `path` must stay until weights_decode
 * returns. 0, or -1 with error_text() set and nothing to close. */
int weights_open(struct weights *weights, const char *path);

/* Check and decode the coded payloads, if there are any. With a `cache_path` that is not NULL they
 * come from there, or go there the first time. Where that cannot be, error_text() says why, and they
 * are decoded to memory. 0, or -1 with error_text() set. */
int weights_decode(struct weights *weights, const char *cache_path);

void weights_close(struct weights *weights);

#endif
