/* SHA-256 (FIPS 180-4) of bytes that come piece by piece. */
#ifndef SHA256_H
#define SHA256_H

#include <stddef.h>
#include <stdint.h>

#define SHA256_BYTES 32
#define SHA256_BLOCK_BYTES 64

struct sha256 {
    uint32_t state[8];
    uint64_t bytes; /* taken in so far */
    uint8_t block[SHA256_BLOCK_BYTES]; /* the last bytes % 64 of them */
};

void sha256_begin(struct sha256 *hash);

void sha256_update(struct sha256 *hash, const void *bytes, size_t count);

/* Write the digest. The hash has to begin anew before it takes in more. */
void sha256_end(struct sha256 *hash, uint8_t digest[SHA256_BYTES]);

#endif
