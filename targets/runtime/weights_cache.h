/* Decoded weights in a file that is mapped: written at the first start, used at the later ones, by
 * several processes at once. */
#ifndef WEIGHTS_CACHE_H
#define WEIGHTS_CACHE_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* What the cached bytes were decoded from, and how many they are. */
struct cache_key {
    uint32_t weights_checksum; /* of the header of weights.epw */
    uint64_t weights_bytes;    /* of the file */
    uint64_t decoded_bytes;
};

enum cache_state { CACHE_UNUSED, CACHE_READ, CACHE_WRITTEN };

struct weights_cache {
    enum cache_state state;
    void *map;
    size_t map_bytes;
    int file;        /* while it is written */
    char *temporary; /* its path until it is whole; NULL otherwise */
};

/* Map the file at `path` if it is whole and has this key. Its decoded bytes, or NULL. */
const uint8_t *cache_open(struct weights_cache *cache, const char *path,
                          const struct cache_key *key);

/* Map a new file beside `path`. Where its decoded bytes go, aligned to 64 bytes; or NULL with
 * error_text() set and nothing to close. */
uint8_t *cache_create(struct weights_cache *cache, const char *path, const struct cache_key *key,
                      mode_t mode);

/* Once the bytes are there: put the file in the place of `path`, as a whole. Where that fails
 * error_text() says why; the bytes can be used in any case. */
void cache_finish(struct weights_cache *cache, const char *path);

void cache_close(struct weights_cache *cache);

/* What the open model does with its cache. */
enum cache_state cache_in_use(void);

#endif
