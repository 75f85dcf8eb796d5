/* Decodes the coded payloads of weights.epw; docs/format.md specifies them under "Sections". */
#ifndef DECODE_H
#define DECODE_H

#include <stdint.h>

/* Turn one coded payload into the `raw_bytes` bytes of its tensor. NULL, or the rule that the
 * payload breaks; then the destination's bytes are undefined. Reads nothing outside the payload,
 * writes nothing outside the destination and allocates nothing. It needs 24 KB of stack. */
const char *decode(const uint8_t *payload, uint64_t encoded_bytes, uint8_t *destination,
                   uint64_t raw_bytes);

#endif
