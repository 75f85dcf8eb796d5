#include "crc32.h"

#include <pthread.h>

/* Slicing by eight (Kounavis and Berry, 2005): tables[k][b] is the checksum of byte b followed by
 * k zero bytes, so that eight bytes are taken in at once. */
static uint32_t tables[8][256];
static pthread_once_t tables_filled = PTHREAD_ONCE_INIT;

static void fill_tables(void)
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
        tables[0][byte] = crc;
    }
    for (int k = 1; k < 8; k++)
        for (int byte = 0; byte < 256; byte++) {
            uint32_t crc = tables[k - 1][byte];
            tables[k][byte] = crc >> 8 ^ tables[0][crc & 255];
        }
}

static uint32_t little_endian(const uint8_t *bytes)
{
    return (uint32_t)bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 |
           (uint32_t)bytes[3] << 24;
}

uint32_t crc32_update(uint32_t crc, const uint8_t *bytes, size_t count)
{
    pthread_once(&tables_filled, fill_tables);
    crc = ~crc;
    for (; count >= 8; bytes += 8, count -= 8) {
        uint32_t low = little_endian(bytes) ^ crc;
        uint32_t high = little_endian(bytes + 4);
        crc = tables[7][low & 255] ^ tables[6][low >> 8 & 255] ^ tables[5][low >> 16 & 255] ^
              tables[4][low >> 24] ^ tables[3][high & 255] ^ tables[2][high >> 8 & 255] ^
              tables[1][high >> 16 & 255] ^ tables[0][high >> 24];
    }
    for (; count > 0; bytes++, count--)
        crc = crc >> 8 ^ tables[0][(crc ^ *bytes) & 255];
    return ~crc;
}
