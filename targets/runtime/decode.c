#include "decode.h"

#include <stdbool.h>
#include <stddef.h>
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bits are read as little-endian words");

enum { RAW, HUFFMAN, SPARSE, PLANES }; /* kinds of sections */
enum {
    HEADER_BYTES = 12,
    MAX_CODE_BITS = 12,
    SHORT_CODE_BITS = 11, /* tables have one of these two sizes */
    PARTS = 4,
    BLOCK_SYMBOLS = 16384,
    LONG_GAP = 255,      /* stands for no word */
    CHUNK_SYMBOLS = 480, /* decoded before they are used; a multiple of what rounds make */
};

/* The rules of docs/format.md. targets/sections.py refuses the same bytes with the same words. */
static const char BAD_SECTION[] = "a section has an unknown kind or word size";
static const char BAD_SECTION_SIZE[] = "a section's size is wrong";
static const char BAD_WORDS[] = "the sections do not fill the tensor";
static const char BAD_CODE[] = "the code lengths make no prefix code";
static const char BAD_STREAM[] = "a stream does not end with its last symbol";
static const char BAD_GAPS[] = "the gaps do not fit the tensor";

/* Bytes that are not read yet. */
struct bytes {
    const uint8_t *at;
    const uint8_t *end;
};

static uint32_t load(const uint8_t *bytes, size_t count)
{
    uint32_t number = 0;
    memcpy(&number, bytes, count);
    return number;
}

/* The next `count` bytes, or NULL where fewer are left. */
static const uint8_t *take(struct bytes *bytes, uint64_t count)
{
    if (count > (uint64_t)(bytes->end - bytes->at))
        return NULL;
    const uint8_t *taken = bytes->at;
    bytes->at += count;
    return taken;
}

/* A prefix code as tables: the next `table_bits` bits of a stream, as a number, lead to the length
 * of the code that they start with, and to its symbol. */
struct code {
    uint8_t lengths[1 << MAX_CODE_BITS];
    uint8_t symbols[1 << MAX_CODE_BITS];
    int table_bits;            /* 0 where there is only one symbol, symbols[0]: it needs no bits */
    const uint8_t *dictionary; /* words of the symbols; NULL where `symbols` has them */
};

/* Fill the tables. Codes follow each other as numbers whose highest bit comes first; but that bit
 * is the lowest of the stream, so they are counted up from the other end. The tables double with
 * every bit, as what shorter codes lead to does not depend on it. */
static void fill_tables(struct code *code, const uint8_t *lengths, const uint8_t *symbols, int last)
{
    uint32_t next = 0;
    for (int bits = 1; bits <= code->table_bits; bits++) {
        size_t half = (size_t)1 << (bits - 1);
        memcpy(code->lengths + half, code->lengths, half);
        memcpy(code->symbols + half, code->symbols, half);
        for (int i = 0; i <= last; i++) {
            if (lengths[i] != bits)
                continue;
            code->lengths[next] = (uint8_t)bits;
            code->symbols[next] = symbols[i];
            uint32_t bit = (uint32_t)half;
            for (; (next & bit) != 0; bit >>= 1)
                next ^= bit;
            next |= bit;
        }
    }
}

/* Read an alphabet. `word_bytes` is 0 for gaps, which have no dictionary. */
static const char *read_alphabet(struct code *code, struct bytes *bytes, uint32_t word_bytes)
{
    if (bytes->at == bytes->end)
        return BAD_SECTION_SIZE;
    int last = *bytes->at++;
    uint8_t lengths[256], symbols[256];
    uint32_t bits = 0, sum = 0; /* of 2^-length, times 2^MAX_CODE_BITS */
    int valid = 0, length = 0, longest = 0, used = 0, only = 0;
    for (int i = 0; i <= last; i++) {
        for (; valid < 7 && bytes->at < bytes->end; valid += 8)
            bits |= (uint32_t)*bytes->at++ << valid;
        int step = (bits & 1) == 0 ? 1 : (bits & 2) == 0 ? 2 : (bits & 4) == 0 ? 3 : 7;
        length = step == 7 ? (int)(bits >> 3 & 15) : length + (step == 2) - (step == 3);
        bits >>= step;
        valid -= step;
        if (valid < 0 || length < 0 || length > MAX_CODE_BITS)
            return valid < 0 ? BAD_SECTION_SIZE : BAD_CODE;
        lengths[i] = (uint8_t)length;
        longest = length > longest ? length : longest;
        sum += length > 0 ? (uint32_t)1 << (MAX_CODE_BITS - length) : 0;
        used += length > 0;
        only = length > 0 ? i : only;
    }
    bytes->at -= valid / 8; /* a whole byte belongs to what follows */
    if ((bits & ((1u << valid % 8) - 1)) != 0)
        return BAD_CODE;
    bool has_dictionary = word_bytes > 1 || (word_bytes == 1 && last < 255);
    const uint8_t *dictionary = take(bytes, has_dictionary ? (uint64_t)(last + 1) * word_bytes : 0);
    if (dictionary == NULL)
        return BAD_SECTION_SIZE;
    if (sum != (uint32_t)1 << (MAX_CODE_BITS - (used == 1)))
        return BAD_CODE;
    for (int i = 0; i <= last; i++)
        symbols[i] = has_dictionary && word_bytes == 1 ? dictionary[i] : (uint8_t)i;
    code->symbols[0] = symbols[only];
    code->dictionary = word_bytes > 1 ? dictionary : NULL;
    code->table_bits = used == 1 ? 0 : longest > SHORT_CODE_BITS ? MAX_CODE_BITS : SHORT_CODE_BITS;
    fill_tables(code, lengths, symbols, last);
    return NULL;
}

/* The next bits of a part; the first of them is the lowest. */
typedef size_t buffer;
enum {
    BUFFER_BYTES = sizeof(buffer),
    BUFFER_BITS = 8 * BUFFER_BYTES,
    LONG_CODES = (BUFFER_BITS - 8) / MAX_CODE_BITS, /* that a buffer holds for sure */
    SHORT_CODES = (BUFFER_BITS - 8) / SHORT_CODE_BITS,
};

/* One of the parts of a block. */
struct part {
    buffer bits;
    uint32_t valid;    /* bits of the buffer; those above are zeros or right already */
    const uint8_t *at; /* what follows them */
};

struct stream {
    const struct code *code;
    struct bytes blocks;  /* those behind the current one, at least */
    const uint8_t *limit; /* end of the payload: parts may be read beyond their own end */
    uint32_t symbols;     /* that the blocks behind the current one have */
    uint32_t left;        /* symbols of the current block that are not decoded yet */
    uint32_t next;        /* the part, modulo PARTS, that has the first of them */
    struct part parts[PARTS];
    const uint8_t *ends[PARTS];
};

/* Have at least BUFFER_BITS - 8 bits in the buffer; BUFFER_BYTES bytes are read. */
static inline void refill(struct part *part)
{
    buffer next;
    memcpy(&next, part->at, BUFFER_BYTES);
    part->bits |= next << (part->valid & (BUFFER_BITS - 1));
    part->at += ~part->valid >> 3 & (BUFFER_BYTES - 1);
    part->valid |= BUFFER_BITS - 8;
}

static inline uint8_t next_symbol(struct part *part, const uint8_t *lengths,
                                  const uint8_t *symbols, int table_bits)
{
    buffer index = part->bits & (((buffer)1 << table_bits) - 1);
    uint32_t length = lengths[index];
    part->bits >>= length & (BUFFER_BITS - 1);
    part->valid -= length;
    /* Or the compiler keeps all lengths of a round to subtract them at its end, and runs out of
     * registers. */
    __asm__("" : "+r"(part->valid));
    return symbols[index];
}

/* Decode `rounds` times `codes` symbols of each part, with nothing to check on the way. The parts
 * do not depend on each other, so that a CPU decodes them at the same time. */
static inline __attribute__((always_inline)) void
decode_rounds(struct stream *stream, uint8_t *out, uint32_t rounds, int codes, int table_bits)
{
    const uint8_t *lengths = stream->code->lengths, *symbols = stream->code->symbols;
    struct part *parts = stream->parts, a = parts[0], b = parts[1], c = parts[2], d = parts[3];
    for (const uint8_t *end = out + (size_t)rounds * PARTS * (size_t)codes; out != end;) {
        refill(&a), refill(&b), refill(&c), refill(&d);
#pragma GCC unroll 5
        for (int i = 0; i < codes; i++, out += PARTS) {
            out[0] = next_symbol(&a, lengths, symbols, table_bits);
            out[1] = next_symbol(&b, lengths, symbols, table_bits);
            out[2] = next_symbol(&c, lengths, symbols, table_bits);
            out[3] = next_symbol(&d, lengths, symbols, table_bits);
        }
    }
    parts[0] = a, parts[1] = b, parts[2] = c, parts[3] = d;
}

/* Decode as many symbols as rounds make, at most `count`. How many these are. */
static __attribute__((noinline)) uint32_t decode_fast(struct stream *stream, uint8_t *out,
                                                      uint32_t count)
{
    bool is_short = stream->code->table_bits == SHORT_CODE_BITS;
    uint32_t round_symbols = PARTS * (is_short ? SHORT_CODES : LONG_CODES);
    for (uint32_t done = 0, rounds;; done += rounds * round_symbols) {
        rounds = (count - done) / round_symbols;
        for (int k = 0; k < PARTS; k++) { /* a part advances by less than BUFFER_BYTES a round */
            size_t safe = (size_t)(stream->limit - stream->parts[k].at) / BUFFER_BYTES;
            rounds = safe < rounds ? (uint32_t)safe : rounds;
        }
        if (rounds == 0)
            return done;
        if (is_short)
            decode_rounds(stream, out + done, rounds, SHORT_CODES, SHORT_CODE_BITS);
        else
            decode_rounds(stream, out + done, rounds, LONG_CODES, MAX_CODE_BITS);
    }
}

/* Decode symbols one by one, as near to the end of the payload as they may lie. Where it ends too
 * early, `valid` falls below 0 and so becomes too large, which ends_right sees. */
static void decode_singly(struct stream *stream, uint8_t *out, uint32_t count)
{
    const struct code *code = stream->code;
    for (uint32_t i = 0; i < count; i++) {
        struct part *part = &stream->parts[stream->next++ % PARTS];
        while (part->valid <= BUFFER_BITS - 8 && part->at < stream->limit) {
            part->bits |= (buffer)*part->at++ << part->valid;
            part->valid += 8;
        }
        out[i] = next_symbol(part, code->lengths, code->symbols, code->table_bits);
    }
}

/* Go to the next block; open_stream has seen that it is there. */
static void open_block(struct stream *stream)
{
    const uint8_t *sizes = take(&stream->blocks, 2 * PARTS);
    for (int k = 0; k < PARTS; k++) {
        stream->parts[k] = (struct part){.at = take(&stream->blocks, load(sizes + 2 * k, 2))};
        stream->ends[k] = stream->blocks.at;
    }
    stream->left = stream->symbols < BLOCK_SYMBOLS ? stream->symbols : BLOCK_SYMBOLS;
    stream->symbols -= stream->left;
    stream->next = 0;
}

/* Whether all parts end with the byte of their last code, and with zeros behind it. */
static bool ends_right(const struct stream *stream)
{
    for (int k = 0; k < PARTS; k++) {
        const struct part *part = &stream->parts[k];
        int64_t bits = 8 * (int64_t)(stream->ends[k] - part->at) + part->valid;
        if (bits < 0 || bits > 7 || (part->bits & (((buffer)1 << bits) - 1)) != 0)
            return false;
    }
    return true;
}

/* Decode the next `count` symbols of a stream that has so many. */
static const char *decode_symbols(struct stream *stream, uint8_t *out, uint32_t count)
{
    if (stream->code->table_bits == 0) {
        memset(out, stream->code->symbols[0], count);
        return NULL;
    }
    while (count > 0) {
        if (stream->left == 0)
            open_block(stream);
        uint32_t now = count < stream->left ? count : stream->left;
        uint32_t first = (0u - stream->next) % PARTS; /* up to the turn of part 0 */
        first = first < now ? first : now;
        decode_singly(stream, out, first);
        uint32_t fast = decode_fast(stream, out + first, now - first);
        decode_singly(stream, out + first + fast, now - first - fast);
        stream->left -= now;
        if (stream->left == 0 && !ends_right(stream))
            return BAD_STREAM;
        out += now;
        count -= now;
    }
    return NULL;
}

/* Take a stream from the front of `body`, all of whose parts must lie inside. */
static const char *open_stream(struct stream *stream, const struct code *code, uint32_t symbols,
                               struct bytes *body, const uint8_t *limit)
{
    *stream = (struct stream){.code = code, .blocks = *body, .limit = limit, .symbols = symbols};
    for (uint64_t done = 0; code->table_bits > 0 && done < symbols; done += BLOCK_SYMBOLS) {
        const uint8_t *sizes = take(body, 2 * PARTS);
        for (int k = 0; k < PARTS; k++)
            if (sizes == NULL || take(body, load(sizes + 2 * k, 2)) == NULL)
                return BAD_SECTION_SIZE;
    }
    return NULL;
}

struct section {
    int kind;
    uint32_t word_bytes;
    uint32_t words;
    struct bytes body;
};

/* Read a section for the next `bytes_left` bytes of the tensor, or for one plane of `whole`. */
static const char *read_section(struct section *section, struct bytes *bytes, uint64_t bytes_left,
                                const struct section *whole)
{
    const uint8_t *header = take(bytes, HEADER_BYTES);
    if (header == NULL)
        return BAD_SECTION_SIZE;
    uint32_t size = section->word_bytes = header[1];
    section->kind = header[0];
    section->words = load(header + 4, 4);
    static const uint8_t SMALLEST[] = {1, 1, 1, 2}, LARGEST[] = {1, 64, 64, 8};
    bool known = section->kind <= PLANES && (size & (size - 1)) == 0 &&
                 size >= SMALLEST[section->kind] && size <= LARGEST[section->kind];
    if (whole != NULL)
        known = known && section->kind <= HUFFMAN && size == 1 && section->words == whole->words;
    if (!known || load(header + 2, 2) != 0)
        return BAD_SECTION;
    if (section->words == 0 || (uint64_t)section->words * size > bytes_left)
        return BAD_WORDS;
    uint32_t body_bytes = load(header + 8, 4);
    section->body.at = take(bytes, body_bytes);
    section->body.end = bytes->at;
    if (section->body.at == NULL || (section->kind == RAW && body_bytes != section->words))
        return BAD_SECTION_SIZE;
    return NULL;
}

/* Copy the words of symbols, to these positions or one behind the other. */
static inline void copy_words(uint8_t *to, const uint8_t *dictionary, const uint8_t *symbols,
                              const uint32_t *positions, uint32_t count, size_t word_bytes)
{
    for (uint32_t i = 0; i < count; i++) {
        const uint8_t *word = dictionary ? dictionary + symbols[i] * word_bytes : &symbols[i];
        memcpy(to + (positions ? positions[i] : i) * word_bytes, word, word_bytes);
    }
}

static void write_words(uint8_t *to, const struct code *code, const uint8_t *symbols,
                        const uint32_t *positions, uint32_t count, uint32_t word_bytes)
{
    switch (word_bytes) { /* the compiler makes copies of a known size fast */
    case 1: copy_words(to, NULL, symbols, positions, count, 1); break;
    case 2: copy_words(to, code->dictionary, symbols, positions, count, 2); break;
    case 4: copy_words(to, code->dictionary, symbols, positions, count, 4); break;
    case 8: copy_words(to, code->dictionary, symbols, positions, count, 8); break;
    case 16: copy_words(to, code->dictionary, symbols, positions, count, 16); break;
    default: copy_words(to, code->dictionary, symbols, positions, count, word_bytes);
    }
}

static void spread_bytes(uint8_t *to, const uint8_t *from, uint32_t count, uint32_t stride)
{
    for (uint32_t i = 0; i < count; i++)
        to[(size_t)i * stride] = from[i];
}

/* Decode a section to every `stride`-th word. */
static __attribute__((noinline)) const char *
decode_huffman(struct section *section, uint8_t *to, uint32_t stride, const uint8_t *limit)
{
    struct code code;
    struct stream stream;
    uint8_t symbols[CHUNK_SYMBOLS];
    const char *broken = read_alphabet(&code, &section->body, section->word_bytes);
    broken = broken ? broken : open_stream(&stream, &code, section->words, &section->body, limit);
    if (broken == NULL && section->body.at != section->body.end)
        broken = BAD_SECTION_SIZE;
    if (broken == NULL && section->word_bytes * stride == 1)
        return decode_symbols(&stream, to, section->words);
    for (uint32_t left = section->words, count; left > 0 && broken == NULL; left -= count) {
        count = left < CHUNK_SYMBOLS ? left : CHUNK_SYMBOLS;
        broken = decode_symbols(&stream, symbols, count);
        if (broken != NULL)
            return broken;
        if (section->word_bytes > 1)
            write_words(to, &code, symbols, NULL, count, section->word_bytes);
        else
            spread_bytes(to, symbols, count, stride);
        to += (size_t)count * section->word_bytes * stride;
    }
    return broken;
}

/* Add up gaps: `at` is the first word behind them, `positions` get those of the nonzero words.
 * The number of these, or -1 where a gap leads beyond `words`. */
static int add_gaps(const uint8_t *gaps, uint32_t count, uint32_t words, uint32_t *at,
                    uint32_t *positions)
{
    int found = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t covered = gaps[i] == LONG_GAP ? LONG_GAP : gaps[i] + 1u;
        if (covered > words - *at)
            return -1;
        positions[found] = *at + gaps[i];
        found += gaps[i] != LONG_GAP;
        *at += covered;
    }
    return found;
}

static __attribute__((noinline)) const char *decode_sparse(struct section *section, uint8_t *to,
                                                           const uint8_t *limit)
{
    struct code gap_code, word_code;
    struct stream gaps, words;
    uint8_t symbols[CHUNK_SYMBOLS];
    uint32_t positions[CHUNK_SYMBOLS];
    struct bytes *body = &section->body;
    const uint8_t *counts = take(body, 8);
    if (counts == NULL)
        return BAD_SECTION_SIZE;
    uint32_t words_left = load(counts, 4);
    uint32_t gaps_left = load(counts + 4, 4);
    if (words_left == 0 || gaps_left < words_left || gaps_left > section->words)
        return BAD_GAPS;
    const char *broken = read_alphabet(&gap_code, body, 0);
    broken = broken ? broken : read_alphabet(&word_code, body, section->word_bytes);
    broken = broken ? broken : open_stream(&gaps, &gap_code, gaps_left, body, limit);
    broken = broken ? broken : open_stream(&words, &word_code, words_left, body, limit);
    if (broken == NULL && body->at != body->end)
        broken = BAD_SECTION_SIZE;
    if (broken != NULL)
        return broken;

    memset(to, 0, (size_t)section->words * section->word_bytes);
    uint32_t at = 0;
    for (uint32_t count; gaps_left > 0; gaps_left -= count) {
        count = gaps_left < CHUNK_SYMBOLS ? gaps_left : CHUNK_SYMBOLS;
        broken = decode_symbols(&gaps, symbols, count);
        if (broken != NULL)
            return broken;
        int found = add_gaps(symbols, count, section->words, &at, positions);
        if (found < 0 || (uint32_t)found > words_left)
            return BAD_GAPS;
        broken = decode_symbols(&words, symbols, (uint32_t)found);
        if (broken != NULL)
            return broken;
        write_words(to, &word_code, symbols, positions, (uint32_t)found, section->word_bytes);
        words_left -= (uint32_t)found;
    }
    return words_left == 0 ? NULL : BAD_GAPS;
}

static const char *decode_planes(struct section *section, uint8_t *to, const uint8_t *limit)
{
    uint32_t stride = section->word_bytes;
    for (uint32_t k = 0; k < stride; k++) {
        struct section plane;
        const char *broken = read_section(&plane, &section->body, section->words, section);
        if (broken == NULL && plane.kind == HUFFMAN)
            broken = decode_huffman(&plane, to + k, stride, limit);
        if (broken != NULL)
            return broken;
        if (plane.kind == RAW)
            spread_bytes(to + k, plane.body.at, plane.words, stride);
    }
    return section->body.at == section->body.end ? NULL : BAD_SECTION_SIZE;
}

const char *decode(const uint8_t *payload, uint64_t encoded_bytes, uint8_t *destination,
                   uint64_t raw_bytes)
{
    struct bytes bytes = {payload, payload + encoded_bytes};
    for (uint64_t left = raw_bytes; left > 0;) {
        if (bytes.at == bytes.end)
            return BAD_WORDS;
        struct section section;
        const char *broken = read_section(&section, &bytes, left, NULL);
        if (broken != NULL)
            return broken;
        uint8_t *to = destination + (raw_bytes - left);
        switch (section.kind) {
        case RAW: memcpy(to, section.body.at, section.words); break;
        case HUFFMAN: broken = decode_huffman(&section, to, 1, bytes.end); break;
        case SPARSE: broken = decode_sparse(&section, to, bytes.end); break;
        default: broken = decode_planes(&section, to, bytes.end);
        }
        if (broken != NULL)
            return broken;
        left -= (uint64_t)section.words * section.word_bytes;
    }
    return bytes.at == bytes.end ? NULL : BAD_SECTION_SIZE;
}
