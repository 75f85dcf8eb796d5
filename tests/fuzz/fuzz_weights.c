/* libFuzzer: weights_open() and weights_decode() on any file. After most changes checksums are made
 * right again: without that no change would be seen by more than the checksums. */
#define _GNU_SOURCE

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "crc32.h"
#include "error.h"
#include "fuzz.h"
#include "weights.h"

enum { HEADER_BYTES = 40, ENTRY_BYTES = 40, MAX_ENTRIES = 64, MOST_RAW_BYTES = 1 << 22 };

const char *fuzz_verdict;

/* Where an entry of a file's table is, as far as the table can be read. */
struct place {
    size_t entry;
    uint32_t codec;
    uint64_t offset, encoded_bytes, raw_bytes;
};

static uint64_t load(const uint8_t *bytes, int count)
{
    uint64_t number = 0;
    for (int i = count - 1; i >= 0; i--)
        number = number << 8 | bytes[i];
    return number;
}

static void store(uint8_t *bytes, int count, uint64_t number)
{
    for (int i = 0; i < count; i++, number >>= 8)
        bytes[i] = (uint8_t)number;
}

/* The entries of a table that lie inside the file; returns how many. */
static int find_entries(const uint8_t *file, size_t bytes, struct place *places)
{
    if (bytes < HEADER_BYTES)
        return 0;
    uint64_t stated = load(file + 16, 8);
    size_t end = stated < bytes ? (size_t)stated : bytes;
    size_t at = HEADER_BYTES;
    int count = 0;
    while (count < MAX_ENTRIES && (uint64_t)count < load(file + 12, 4) && at < end &&
           end - at >= ENTRY_BYTES) {
        const uint8_t *entry = file + at;
        places[count++] = (struct place){at, (uint32_t)load(entry + 4, 4), load(entry + 8, 8),
                                         load(entry + 16, 8), load(entry + 24, 8)};
        at += ENTRY_BYTES + 8 * (size_t)entry[3] + (load(entry, 2) + 7) / 8 * 8;
    }
    return count;
}

/* Give every payload that lies in the file, and the header, the checksum that it should have. */
static void sign(uint8_t *file, size_t bytes)
{
    struct place places[MAX_ENTRIES];
    int count = find_entries(file, bytes, places);
    for (int i = 0; i < count; i++)
        if (places[i].offset <= bytes && places[i].encoded_bytes <= bytes - places[i].offset)
            store(file + places[i].entry + 32, 4,
                  crc32_update(0, file + places[i].offset, (size_t)places[i].encoded_bytes));
    uint64_t header_bytes = bytes < HEADER_BYTES ? 0 : load(file + 16, 8);
    if (header_bytes < HEADER_BYTES || header_bytes > bytes)
        return;
    store(file + 32, 4, 0);
    store(file + 32, 4, crc32_update(0, file, (size_t)header_bytes));
}

/* Put `payload` in the place of one entry's, move those behind it, and make the table fit. Returns
 * the file's new size, or 0 where the old file does not allow it. */
static size_t replace(uint8_t *file, size_t bytes, size_t max_bytes, const struct place *places,
                      int count, int chosen, const uint8_t *payload, size_t payload_bytes)
{
    uint8_t *old = malloc(bytes);
    if (old == NULL)
        abort();
    memcpy(old, file, bytes);
    size_t end = (size_t)load(file + 16, 8);
    bool fits = end <= bytes;
    for (int i = 0; i < count && fits; i++) {
        const struct place *place = &places[i];
        size_t size = i == chosen ? payload_bytes : (size_t)place->encoded_bytes;
        size_t start = place->codec == 0 ? (end + 63) / 64 * 64 : end;
        fits = place->offset <= bytes && place->encoded_bytes <= bytes - place->offset &&
               start <= max_bytes && size <= max_bytes - start;
        if (!fits)
            break;
        memset(file + end, 0, start - end);
        memcpy(file + start, i == chosen ? payload : old + place->offset, size);
        store(file + place->entry + 8, 8, start);
        store(file + place->entry + 16, 8, size);
        end = start + size;
    }
    if (fits)
        store(file + 24, 8, end);
    else
        memcpy(file, old, bytes);
    free(old);
    return fits ? end : 0;
}

/* Change one tensor's payload. Returns the file's new size, or 0 where there is no such tensor. */
static size_t change_payload(uint8_t *file, size_t bytes, size_t max_bytes, unsigned seed)
{
    struct place places[MAX_ENTRIES];
    int count = find_entries(file, bytes, places);
    if (count == 0)
        return 0;
    int chosen = (int)(seed % (unsigned)count);
    const struct place *place = &places[chosen];
    if (place->offset > bytes || place->encoded_bytes > bytes - place->offset)
        return 0;
    size_t size = (size_t)place->encoded_bytes;
    size_t most = size + (max_bytes > bytes ? max_bytes - bytes : 0);
    uint8_t *payload = calloc(most + 1, 1);
    if (payload == NULL)
        abort();
    memcpy(payload, file + place->offset, size);
    size = LLVMFuzzerMutate(payload, size, most);
    if (place->codec != 0 && seed / (unsigned)count % 2 == 0)
        fit_section(payload, size);
    size_t changed = replace(file, bytes, max_bytes, places, count, chosen, payload, size);
    free(payload);
    return changed;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed)
{
    unsigned kind = seed % 16;
    size_t changed = 0;
    if (kind < 10)
        changed = change_payload(data, size, max_size, seed / 16);
    if (changed == 0 && kind < 14 && size > HEADER_BYTES) {
        uint64_t header_bytes = load(data + 16, 8);
        size_t some = header_bytes < size ? (size_t)header_bytes : size;
        LLVMFuzzerMutate(data + 8, some > 8 ? some - 8 : 0, some > 8 ? some - 8 : 0);
        changed = size;
    }
    if (changed == 0)
        changed = LLVMFuzzerMutate(data, size, max_size);
    if (kind != 15)
        sign(data, changed);
    return changed;
}

/* Whether the file states tensors that are too large to look at in the time that a run has. */
static bool too_large(const uint8_t *file, size_t bytes)
{
    struct place places[MAX_ENTRIES];
    int count = find_entries(file, bytes, places);
    for (int i = 0; i < count; i++)
        if (places[i].codec != 0 && places[i].raw_bytes > MOST_RAW_BYTES)
            return true;
    return false;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static int file = -1;
    static char path[64];
    if (file < 0) {
        file = memfd_create("weights.epw", MFD_CLOEXEC);
        snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    }
    fuzz_verdict = "too large";
    if (too_large(data, size))
        return 0;
    if (file < 0 || ftruncate(file, 0) != 0 || pwrite(file, data, size, 0) != (ssize_t)size)
        abort();
    struct weights weights;
    bool is_open = weights_open(&weights, path) == 0;
    if (is_open && weights_decode(&weights, NULL) == 0) {
        fuzz_verdict = "accepted";
        for (uint32_t i = 0; i < weights.count; i++)
            crc32_update(0, weights.tensors[i].data, (size_t)weights.tensors[i].bytes);
    } else {
        static char verdict[ERROR_TEXT_BYTES];
        const char *text = error_text();
        if (strncmp(text, path, strlen(path)) != 0)
            abort();
        snprintf(verdict, sizeof verdict, "%s", text + strlen(path) + 2);
        verdict[strcspn(verdict, ".")] = '\0';
        fuzz_verdict = verdict;
    }
    if (is_open)
        weights_close(&weights);
    return 0;
}
