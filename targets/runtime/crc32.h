/* CRC-32 as in zlib and PNG (polynomial 0xEDB88320, reflected). */
#ifndef CRC32_H
#define CRC32_H

#include <stddef.h>
#include <stdint.h>

/* Checksum of bytes that follow those whose checksum is `crc`; start with 0. */
uint32_t crc32_update(uint32_t crc, const uint8_t *bytes, size_t count);

#endif
