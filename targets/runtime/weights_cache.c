#define _DEFAULT_SOURCE

#include "weights_cache.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "crc32.h"
#include "error.h"

/* Little-endian and without padding. Only the machine that wrote it reads it: when the layout
 * changes, the magic changes, and older files are written again. */
struct header {
    uint8_t magic[8];
    uint32_t checksum; /* of the decoded bytes */
    uint32_t weights_checksum;
    uint64_t weights_bytes;
    uint64_t decoded_bytes;
    uint8_t zeros[32];
};
_Static_assert(sizeof(struct header) == 64, "decoded bytes are aligned to 64 bytes");

static const uint8_t MAGIC[8] = {0x89, 'E', 'P', 'C', '\r', '\n', 0x1a, '\n'};

static void fail(const char *path, const char *why)
{
    error_set("the cache %s: %s. The weights are decoded to memory instead.", path, why);
}

static struct header make_header(const struct cache_key *key, uint32_t checksum)
{
    struct header header = {
        .checksum = checksum,
        .weights_checksum = key->weights_checksum,
        .weights_bytes = key->weights_bytes,
        .decoded_bytes = key->decoded_bytes,
    };
    memcpy(header.magic, MAGIC, sizeof MAGIC);
    return header;
}

static bool is_right(const void *map, const struct cache_key *key)
{
    const uint8_t *decoded = (const uint8_t *)map + sizeof(struct header);
    struct header found;
    memcpy(&found, map, sizeof found);
    struct header wanted = make_header(key, found.checksum);
    return memcmp(&found, &wanted, sizeof found) == 0 &&
           crc32_update(0, decoded, (size_t)key->decoded_bytes) == found.checksum;
}

const uint8_t *cache_open(struct weights_cache *cache, const char *path,
                          const struct cache_key *key)
{
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (file < 0)
        return NULL;
    struct stat status;
    size_t bytes = sizeof(struct header) + (size_t)key->decoded_bytes;
    void *map = MAP_FAILED;
    if (fstat(file, &status) == 0 && S_ISREG(status.st_mode) && status.st_size == (off_t)bytes)
        map = mmap(NULL, bytes, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (map == MAP_FAILED)
        return NULL;
    if (!is_right(map, key)) {
        munmap(map, bytes);
        return NULL;
    }
    *cache = (struct weights_cache){.state = CACHE_READ, .map = map, .map_bytes = bytes};
    return (const uint8_t *)map + sizeof(struct header);
}

/* Whether writing to `path` would destroy something else than a cache. */
static bool is_something_else(const char *path)
{
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (file < 0)
        return errno != ENOENT;
    uint8_t magic[sizeof MAGIC];
    struct stat status;
    bool is_plain = fstat(file, &status) == 0 && S_ISREG(status.st_mode);
    ssize_t got = is_plain ? read(file, magic, sizeof magic) : -1;
    close(file);
    return got < 0 || memcmp(magic, MAGIC, (size_t)got) != 0;
}

/* Make the file and map it. 0, or an error number; cache_close undoes what was done. */
static int map_new_file(struct weights_cache *cache, const char *path, mode_t mode)
{
    size_t path_bytes = strlen(path) + sizeof ".XXXXXX";
    char *temporary = malloc(path_bytes);
    if (temporary == NULL)
        return ENOMEM;
    snprintf(temporary, path_bytes, "%s.XXXXXX", path);
    cache->file = mkstemp(temporary);
    if (cache->file < 0) {
        int error = errno;
        free(temporary);
        return error;
    }
    cache->temporary = temporary;
    /* Without this a full disk would stop the process when a page is written. */
    int error;
    do
        error = posix_fallocate(cache->file, 0, (off_t)cache->map_bytes);
    while (error == EINTR);
    if (error != 0)
        return error;
    if (fchmod(cache->file, mode) != 0)
        return errno;
    void *map = mmap(NULL, cache->map_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, cache->file, 0);
    if (map == MAP_FAILED)
        return errno;
    cache->map = map;
    return 0;
}

uint8_t *cache_create(struct weights_cache *cache, const char *path, const struct cache_key *key,
                      mode_t mode)
{
    if (is_something_else(path)) {
        fail(path, "it is something else than a cache, or cannot be read");
        return NULL;
    }
    cache->map_bytes = sizeof(struct header) + (size_t)key->decoded_bytes;
    int error = map_new_file(cache, path, mode);
    if (error != 0) {
        cache_close(cache);
        fail(path, strerror(error));
        return NULL;
    }
    struct header header = make_header(key, 0);
    memcpy(cache->map, &header, sizeof header);
    return (uint8_t *)cache->map + sizeof header;
}

void cache_finish(struct weights_cache *cache, const char *path)
{
    struct header *header = cache->map;
    const uint8_t *decoded = (const uint8_t *)cache->map + sizeof *header;
    header->checksum = crc32_update(0, decoded, (size_t)header->decoded_bytes);
    mprotect(cache->map, cache->map_bytes, PROT_READ);
    if (msync(cache->map, cache->map_bytes, MS_SYNC) != 0 || fsync(cache->file) != 0 ||
        rename(cache->temporary, path) != 0) {
        fail(path, strerror(errno));
        unlink(cache->temporary);
    } else {
        cache->state = CACHE_WRITTEN;
    }
    close(cache->file);
    free(cache->temporary);
    cache->temporary = NULL;
}

void cache_close(struct weights_cache *cache)
{
    if (cache->temporary != NULL) {
        close(cache->file);
        unlink(cache->temporary);
        free(cache->temporary);
    }
    if (cache->map != NULL)
        munmap(cache->map, cache->map_bytes);
    memset(cache, 0, sizeof *cache);
}
