#define _DEFAULT_SOURCE /* madvise */

#include "weights.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "crc32.h"
#include "decode.h"
#include "error.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "weights are little-endian");

enum {
    VERSION = 1,
    HEADER_BYTES = 40,
    CHECKSUM_AT = 32,
    ENTRY_BYTES = 40,
    ALIGNMENT_BYTES = 64,
    MAX_RANK = 8,
    AROUND_BYTES = 1 << 16,
    CODEC_RAW = 0,
    CODEC_CODED = 1,
};

static const uint8_t MAGIC[8] = {0x89, 'E', 'P', 'W', '\r', '\n', 0x1a, '\n'};

/* bool, uint8, int8, int16, int32, int64, float32 */
static const uint8_t DTYPE_BYTES[] = {1, 1, 1, 2, 4, 8, 4};

/* The rules of docs/format.md. targets/weights.py refuses the same files with the same words. */
static const char NOT_WEIGHTS[] = "not a weights file";
static const char UNKNOWN_VERSION[] = "unknown version of the format";
static const char TRUNCATED[] = "the file is truncated";
static const char TRAILING[] = "bytes follow the last payload";
static const char BAD_HEADER_SIZE[] = "the header's size is wrong";
static const char BAD_HEADER_CHECKSUM[] = "the header's checksum is wrong";
static const char NOT_RESERVED[] = "a reserved field or padding is not zero";
static const char BAD_NAME[] = "a name is empty, not UTF-8 or out of order";
static const char UNKNOWN_DTYPE[] = "unknown dtype";
static const char BAD_SHAPE[] = "a shape has too many axes or elements";
static const char BAD_RAW_SIZE[] = "the raw size is not that of the shape";
static const char UNKNOWN_CODEC[] = "unknown codec";
static const char BAD_ENCODED_SIZE[] = "the encoded size is impossible for the codec";
static const char BAD_OFFSET[] = "a payload does not lie where it must";
static const char BAD_CHECKSUM[] = "a payload's checksum is wrong";

/* One row of the tensor table. */
struct entry {
    const uint8_t *name;
    size_t name_bytes;
    uint32_t codec;
    uint64_t offset;
    uint64_t encoded_bytes;
    uint64_t raw_bytes;
    uint32_t checksum;
    size_t size; /* bytes of the row itself */
};

static uint16_t load16(const uint8_t *bytes)
{
    return (uint16_t)(bytes[0] | bytes[1] << 8);
}

static uint32_t load32(const uint8_t *bytes)
{
    return load16(bytes) | (uint32_t)load16(bytes + 2) << 16;
}

static uint64_t load64(const uint8_t *bytes)
{
    return load32(bytes) | (uint64_t)load32(bytes + 4) << 32;
}

static bool all_zero(const uint8_t *bytes, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++)
        if (bytes[i] != 0)
            return false;
    return true;
}

/* Whether all code points are there, written as short as can be, and no surrogates. */
static bool is_utf8(const uint8_t *text, size_t count)
{
    static const uint32_t SMALLEST[] = {0, 0x80, 0x800, 0x10000}; /* by bytes after the first */
    for (size_t i = 0; i < count;) {
        uint8_t first = text[i++];
        int more = first < 0x80 ? 0 : first < 0xe0 ? 1 : first < 0xf0 ? 2 : 3;
        if ((first & 0xc0) == 0x80 || first >= 0xf8 || (size_t)more > count - i)
            return false;
        uint32_t code = more == 0 ? first : first & (0x3fu >> more);
        for (int k = 0; k < more; k++, i++) {
            if ((text[i] & 0xc0) != 0x80)
                return false;
            code = code << 6 | (text[i] & 0x3f);
        }
        if (code < SMALLEST[more] || code > 0x10ffff || (code >= 0xd800 && code < 0xe000))
            return false;
    }
    return true;
}

/* Whether names are in strictly ascending order of their bytes, which also makes them unique. */
static bool ascending(const struct entry *earlier, const struct entry *later)
{
    size_t common =
        earlier->name_bytes < later->name_bytes ? earlier->name_bytes : later->name_bytes;
    int order = common > 0 ? memcmp(earlier->name, later->name, common) : 0;
    return order < 0 || (order == 0 && earlier->name_bytes < later->name_bytes);
}

/* Bytes of a tensor of this shape, or UINT64_MAX where they are 2^63 or more. */
static uint64_t tensor_bytes(const uint8_t *shape, int rank, uint8_t item_bytes)
{
    uint64_t limit = (uint64_t)1 << 63;
    uint64_t bytes = item_bytes;
    bool empty = false;
    for (int axis = 0; axis < rank; axis++) {
        uint64_t size = load64(shape + 8 * axis);
        if (size >= limit)
            return UINT64_MAX;
        empty = empty || size == 0;
    }
    for (int axis = 0; axis < rank && !empty; axis++) {
        uint64_t size = load64(shape + 8 * axis);
        if (size > (limit - 1) / bytes)
            return UINT64_MAX;
        bytes *= size;
    }
    return empty ? 0 : bytes;
}

/* Read one row from the `left` bytes that the table still has. NULL, or the rule it breaks. */
static const char *read_entry(struct entry *entry, const uint8_t *bytes, size_t left)
{
    if (left < ENTRY_BYTES)
        return BAD_HEADER_SIZE;
    entry->name_bytes = load16(bytes);
    uint8_t dtype = bytes[2];
    uint8_t rank = bytes[3];
    entry->codec = load32(bytes + 4);
    entry->offset = load64(bytes + 8);
    entry->encoded_bytes = load64(bytes + 16);
    entry->raw_bytes = load64(bytes + 24);
    entry->checksum = load32(bytes + 32);
    uint32_t reserved = load32(bytes + 36);

    if (rank > MAX_RANK)
        return BAD_SHAPE;
    size_t name_at = ENTRY_BYTES + 8 * (size_t)rank;
    entry->size = name_at + (entry->name_bytes + 7) / 8 * 8;
    if (left < entry->size)
        return BAD_HEADER_SIZE;
    entry->name = bytes + name_at;
    size_t name_end = name_at + entry->name_bytes;
    if (reserved != 0 || !all_zero(bytes + name_end, entry->size - name_end))
        return NOT_RESERVED;
    if (dtype >= sizeof DTYPE_BYTES)
        return UNKNOWN_DTYPE;
    uint64_t raw_bytes = tensor_bytes(bytes + ENTRY_BYTES, rank, DTYPE_BYTES[dtype]);
    if (raw_bytes == UINT64_MAX)
        return BAD_SHAPE;
    if (entry->raw_bytes != raw_bytes)
        return BAD_RAW_SIZE;
    if (entry->codec != CODEC_RAW && entry->codec != CODEC_CODED)
        return UNKNOWN_CODEC;
    if (entry->codec == CODEC_RAW ? entry->encoded_bytes != entry->raw_bytes
                                  : entry->encoded_bytes == 0 ||
                                        entry->encoded_bytes >= entry->raw_bytes)
        return BAD_ENCODED_SIZE;
    if (entry->name_bytes == 0 || !is_utf8(entry->name, entry->name_bytes))
        return BAD_NAME;
    return NULL;
}

static bool same_payload(const struct entry *a, const struct entry *b)
{
    return a->codec == b->codec && a->offset == b->offset &&
           a->encoded_bytes == b->encoded_bytes && a->raw_bytes == b->raw_bytes &&
           a->checksum == b->checksum;
}

static uint64_t aligned(uint64_t bytes)
{
    return (bytes + ALIGNMENT_BYTES - 1) / ALIGNMENT_BYTES * ALIGNMENT_BYTES;
}

/* Check the tensor table. NULL, or the rule that is broken. */
static const char *read_table(struct weights *weights, struct entry *entries, uint64_t header_bytes)
{
    const uint8_t *file = weights->map;
    uint64_t file_bytes = weights->map_bytes;
    uint64_t at = HEADER_BYTES;
    uint64_t end = header_bytes;
    for (uint32_t i = 0; i < weights->count; i++) {
        struct entry *entry = &entries[i];
        const char *broken = read_entry(entry, file + at, (size_t)(header_bytes - at));
        if (broken != NULL)
            return broken;
        if (i > 0 && !ascending(&entries[i - 1], entry))
            return BAD_NAME;
        at += entry->size;

        uint32_t earlier = 0;
        while (earlier < i && !same_payload(&entries[earlier], entry))
            earlier++;
        if (earlier == i) {
            uint64_t start = entry->codec == CODEC_RAW ? aligned(end) : end;
            if (entry->offset != start || start > file_bytes ||
                entry->encoded_bytes > file_bytes - start)
                return BAD_OFFSET;
            if (!all_zero(file + end, start - end))
                return NOT_RESERVED;
            end = start + entry->encoded_bytes;
        }
        struct weight *tensor = &weights->tensors[i];
        tensor->bytes = entry->raw_bytes;
        tensor->payload = file + entry->offset;
        tensor->payload_bytes = entry->encoded_bytes;
        tensor->checksum = entry->checksum;
        tensor->is_coded = entry->codec == CODEC_CODED;
        tensor->first = earlier;
    }
    if (at != header_bytes)
        return BAD_HEADER_SIZE;
    if (end != file_bytes)
        return TRAILING;
    return NULL;
}

static bool is_whole(const struct weight *tensor)
{
    return crc32_update(0, tensor->payload, (size_t)tensor->payload_bytes) == tensor->checksum;
}

/* Check the raw payloads, and let their tensors point to them. NULL, or the rule that is broken. */
static const char *use_raw_payloads(struct weights *weights)
{
    for (uint32_t i = 0; i < weights->count; i++) {
        struct weight *tensor = &weights->tensors[i];
        if (tensor->is_coded)
            continue;
        if (tensor->first == i && !is_whole(tensor))
            return BAD_CHECKSUM;
        tensor->data = tensor->payload;
    }
    return NULL;
}

/* Check a mapped file. NULL, or the rule that is broken. */
static const char *read_file(struct weights *weights)
{
    const uint8_t *file = weights->map;
    size_t file_bytes = weights->map_bytes;
    if (memcmp(file, MAGIC, file_bytes < sizeof MAGIC ? file_bytes : sizeof MAGIC) != 0)
        return NOT_WEIGHTS;
    if (file_bytes < HEADER_BYTES)
        return TRUNCATED;
    if (load32(file + 8) != VERSION)
        return UNKNOWN_VERSION;
    weights->count = load32(file + 12);
    uint64_t header_bytes = load64(file + 16);
    uint64_t stated_bytes = load64(file + 24);
    if (file_bytes != stated_bytes)
        return file_bytes < stated_bytes ? TRUNCATED : TRAILING;
    if (header_bytes < HEADER_BYTES || header_bytes > file_bytes)
        return BAD_HEADER_SIZE;

    static const uint8_t no_checksum[4];
    weights->checksum = load32(file + CHECKSUM_AT);
    uint32_t crc = crc32_update(0, file, CHECKSUM_AT);
    crc = crc32_update(crc, no_checksum, sizeof no_checksum);
    crc = crc32_update(crc, file + CHECKSUM_AT + 4, (size_t)header_bytes - CHECKSUM_AT - 4);
    if (crc != weights->checksum)
        return BAD_HEADER_CHECKSUM;
    if (load32(file + CHECKSUM_AT + 4) != 0)
        return NOT_RESERVED;
    if (weights->count > (header_bytes - HEADER_BYTES) / ENTRY_BYTES)
        return BAD_HEADER_SIZE;

    struct entry *entries = calloc((size_t)weights->count + 1, sizeof *entries);
    weights->tensors = calloc((size_t)weights->count + 1, sizeof *weights->tensors);
    const char *broken = "no memory for its table";
    if (entries != NULL && weights->tensors != NULL)
        broken = read_table(weights, entries, header_bytes);
    free(entries);
    return broken != NULL ? broken : use_raw_payloads(weights);
}

static void refuse(const struct weights *weights, const char *broken)
{
    error_set("%s: %s. Copy the bundle again as a whole.", weights->path, broken);
}

int weights_open(struct weights *weights, const char *path)
{
    memset(weights, 0, sizeof *weights);
    weights->path = path;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) {
        error_set("%s: %s", path, strerror(errno));
        return -1;
    }
    struct stat status;
    if (fstat(file, &status) != 0 || !S_ISREG(status.st_mode) || status.st_size == 0 ||
        (uint64_t)status.st_size > SIZE_MAX) {
        error_set("%s: %s", path, NOT_WEIGHTS);
        close(file);
        return -1;
    }
    weights->mode = status.st_mode & 0666;
    weights->map_bytes = (size_t)status.st_size;
    weights->map = mmap(NULL, weights->map_bytes, PROT_READ, MAP_PRIVATE, file, 0);
    close(file);
    if (weights->map == MAP_FAILED) {
        error_set("%s: %s", path, strerror(errno));
        return -1;
    }
    const char *broken = read_file(weights);
    if (broken != NULL) {
        refuse(weights, broken);
        weights_close(weights);
        return -1;
    }
    return 0;
}

/* Bytes of all coded tensors behind each other, or UINT64_MAX where no memory can hold them. */
static uint64_t decoded_bytes(const struct weights *weights)
{
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < weights->count; i++) {
        const struct weight *tensor = &weights->tensors[i];
        if (!tensor->is_coded || tensor->first != i)
            continue;
        if (tensor->bytes > SIZE_MAX / 2 || aligned(tensor->bytes) > SIZE_MAX / 2 - bytes)
            return UINT64_MAX;
        bytes += aligned(tensor->bytes);
    }
    return bytes;
}

/* Let the coded tensors point to where they lie, or will lie, in decoded bytes. */
static void use_decoded(struct weights *weights, const uint8_t *decoded)
{
    for (uint32_t i = 0; i < weights->count; i++) {
        struct weight *tensor = &weights->tensors[i];
        if (tensor->is_coded && tensor->first == i) {
            tensor->data = decoded;
            decoded += aligned(tensor->bytes);
        } else if (tensor->is_coded) {
            tensor->data = weights->tensors[tensor->first].data;
        }
    }
}

/* Give back the pages of a payload that is decoded; what else is in them comes from the file again.
 * Linux maps up to 64 KB around a page that is touched, so these go too. */
static void give_back(const struct weights *weights, const struct weight *tensor)
{
    size_t page_bytes = (size_t)sysconf(_SC_PAGESIZE);
    uint8_t *file = weights->map;
    size_t start = (size_t)(tensor->payload - file);
    size_t end = start + (size_t)tensor->payload_bytes;
    start = start > AROUND_BYTES ? (start - AROUND_BYTES) / page_bytes * page_bytes : 0;
    madvise(file + start, end - start, MADV_DONTNEED);
}

/* Decode tensor by tensor, so that not all of the file and all tensors are in memory at once.
 * NULL, or the rule that is broken. */
static const char *decode_payloads(struct weights *weights, uint8_t *decoded)
{
    for (uint32_t i = 0; i < weights->count; i++) {
        const struct weight *tensor = &weights->tensors[i];
        if (!tensor->is_coded || tensor->first != i)
            continue;
        if (!is_whole(tensor))
            return BAD_CHECKSUM;
        const char *broken =
            decode(tensor->payload, tensor->payload_bytes, decoded, tensor->bytes);
        if (broken != NULL)
            return broken;
        decoded += aligned(tensor->bytes);
        give_back(weights, tensor);
    }
    return NULL;
}

int weights_decode(struct weights *weights, const char *cache_path)
{
    uint64_t bytes = decoded_bytes(weights);
    if (bytes == 0)
        return 0;
    struct cache_key key = {weights->checksum, weights->map_bytes, bytes};
    uint8_t *decoded = NULL;
    bool in_cache = false;
    if (cache_path != NULL && bytes != UINT64_MAX) {
        const uint8_t *cached = cache_open(&weights->cache, cache_path, &key);
        if (cached != NULL) {
            use_decoded(weights, cached);
            return 0;
        }
        decoded = cache_create(&weights->cache, cache_path, &key, weights->mode);
        in_cache = decoded != NULL;
    }
    if (decoded == NULL && bytes <= SIZE_MAX / 2)
        decoded = weights->memory = aligned_alloc(ALIGNMENT_BYTES, (size_t)bytes);
    if (decoded == NULL) {
        error_set("no memory for %llu bytes of weights", (unsigned long long)bytes);
        return -1;
    }
    const char *broken = decode_payloads(weights, decoded);
    if (broken != NULL) {
        refuse(weights, broken);
        return -1;
    }
    if (in_cache)
        cache_finish(&weights->cache, cache_path);
    use_decoded(weights, decoded);
    return 0;
}

void weights_close(struct weights *weights)
{
    if (weights->map != NULL)
        munmap(weights->map, weights->map_bytes);
    cache_close(&weights->cache);
    free(weights->memory);
    free(weights->tensors);
    memset(weights, 0, sizeof *weights);
}
