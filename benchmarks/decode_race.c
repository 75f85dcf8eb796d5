/* Races decode() against libzstd on the same tensors: one thread, by turns, tensor by tensor.
 *
 *     decode_race FILE ROUNDS
 *
 * FILE, as weight_coding.py writes it, little-endian: tensors and codings, 4 bytes each; then per
 * tensor its size, 8 bytes, and its bytes, and per coding of it the size, 8 bytes, and the bytes.
 * The first coding is ours, the others are frames of zstd. All are decoded once, compared with the
 * tensor's bytes, and then timed. Every coding has its turn on a tensor before the next tensor, and
 * who comes first changes from round to round; a turn decodes the tensor so often that the clock
 * does not matter. Prints nanoseconds per decoding, a line per round and tensor. */
#define _POSIX_C_SOURCE 200809L

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <zstd.h>

#include "decode.h"

enum { MAX_CODINGS = 8, TURN_BYTES = 1 << 20 };

struct bytes {
    uint8_t *data;
    uint64_t count;
};

struct tensor {
    struct bytes raw;
    struct bytes codings[MAX_CODINGS];
};

static void fail(const char *why)
{
    fprintf(stderr, "%s\n", why);
    exit(1);
}

static void read_exactly(void *data, size_t count, FILE *file)
{
    if (fread(data, 1, count, file) != count)
        fail("the file is cut");
}

static struct bytes read_bytes(FILE *file)
{
    struct bytes bytes;
    read_exactly(&bytes.count, sizeof bytes.count, file);
    bytes.data = malloc(bytes.count + 1);
    if (bytes.data == NULL)
        fail("no memory");
    read_exactly(bytes.data, bytes.count, file);
    return bytes;
}

static void decode_once(ZSTD_DCtx *zstd, const struct tensor *tensor, uint32_t coding,
                        uint8_t *decoded)
{
    const struct bytes *coded = &tensor->codings[coding];
    if (coding == 0) {
        const char *broken = decode(coded->data, coded->count, decoded, tensor->raw.count);
        if (broken != NULL)
            fail(broken);
    } else if (ZSTD_decompressDCtx(zstd, decoded, tensor->raw.count, coded->data, coded->count) !=
               tensor->raw.count) {
        fail("zstd does not decode its frame");
    }
}

static double now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e9 + (double)now.tv_nsec;
}

int main(int count, char **arguments)
{
    FILE *file = count == 3 ? fopen(arguments[1], "rb") : NULL;
    if (file == NULL)
        fail("usage: decode_race FILE ROUNDS");
    uint32_t tensors;
    uint32_t codings;
    read_exactly(&tensors, sizeof tensors, file);
    read_exactly(&codings, sizeof codings, file);
    struct tensor *all = calloc(tensors, sizeof *all);
    ZSTD_DCtx *zstd = ZSTD_createDCtx();
    if (all == NULL || zstd == NULL || codings > MAX_CODINGS)
        fail("no memory");
    uint64_t most = 0;
    for (uint32_t i = 0; i < tensors; i++) {
        all[i].raw = read_bytes(file);
        for (uint32_t k = 0; k < codings; k++)
            all[i].codings[k] = read_bytes(file);
        most = all[i].raw.count > most ? all[i].raw.count : most;
    }
    fclose(file);

    uint8_t *decoded = malloc(most);
    if (decoded == NULL)
        fail("no memory");
    for (uint32_t i = 0; i < tensors; i++)
        for (uint32_t k = 0; k < codings; k++) {
            memset(decoded, 0xa5, most);
            decode_once(zstd, &all[i], k, decoded);
            if (memcmp(decoded, all[i].raw.data, all[i].raw.count) != 0)
                fail("what is decoded is not the tensor");
        }

    long rounds = strtol(arguments[2], NULL, 10);
    for (long round = 0; round < rounds; round++)
        for (uint32_t i = 0; i < tensors; i++) {
            double times[MAX_CODINGS];
            int repeats = (int)(TURN_BYTES / (all[i].raw.count + 1)) + 1;
            for (uint32_t turn = 0; turn < codings; turn++) {
                uint32_t coding = (turn + (uint32_t)round) % codings;
                double start = now_ns();
                for (int repeat = 0; repeat < repeats; repeat++)
                    decode_once(zstd, &all[i], coding, decoded);
                times[coding] = (now_ns() - start) / repeats;
            }
            for (uint32_t k = 0; k < codings; k++)
                printf("%.0f%c", times[k], k + 1 < codings ? ' ' : '\n');
        }
    return 0;
}
