"""`docs/format.md` word for word, one symbol at a time: what fuzzing compares the decoders with.

It shares no code with `targets/`, and writes what the encoder there never would: codes that are
not optimal, alphabets with symbols that do not occur, sections that do not pay.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

RAW, HUFFMAN, SPARSE, PLANES = range(4)
BLOCK, PARTS, LONGEST = 16384, 4, 12
WORD_BYTES = {RAW: (1,), HUFFMAN: (1, 2, 4, 8, 16, 32, 64), PLANES: (2, 4, 8)}
WORD_BYTES[SPARSE] = WORD_BYTES[HUFFMAN]
DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float32")


class Refused(Exception):
    """A payload breaks a rule; `args[0]` is the rule's name in `targets.weights.Rule`."""


class Tensor(NamedTuple):
    """One row of a weights file and its payload."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    codec: int
    payload: bytes

    @property
    def raw_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


class Code(NamedTuple):
    """Symbols by (length, code), and the words they stand for; no codes for a single symbol."""

    symbols: dict[tuple[int, int], int]
    words: list[bytes]
    single: int | None


def weights_file(tensors: Sequence[Tensor]) -> bytes:
    """Lay tensors out, in ascending order of their names; none of them share a payload."""
    names = [tensor.name.encode() for tensor in tensors]
    header_bytes = 40 + sum(
        40 + 8 * len(tensor.shape) + -(-len(name) // 8) * 8
        for tensor, name in zip(tensors, names, strict=True)
    )
    table, payloads, end = b"", b"", header_bytes
    for tensor, name in zip(tensors, names, strict=True):
        gap = -end % 64 if tensor.codec == 0 else 0
        fixed = (len(name), DTYPES.index(tensor.dtype), len(tensor.shape), tensor.codec, end + gap)
        sizes = (len(tensor.payload), tensor.raw_bytes, zlib.crc32(tensor.payload), 0)
        table += struct.pack("<HBBIQQQII", *fixed, *sizes)
        table += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape) + name + bytes(-len(name) % 8)
        payloads += bytes(gap) + tensor.payload
        end += gap + len(tensor.payload)
    header = struct.pack("<8sIIQQII", b"\x89EPW\r\n\x1a\n", 1, len(names), header_bytes, end, 0, 0)
    return signed(header + table + payloads)


def signed(data: bytes) -> bytes:
    """Give a file the checksum that its header should have, where it has a header."""
    header_bytes = struct.unpack_from("<Q", data, 16)[0] if len(data) >= 40 else 0
    if not 40 <= header_bytes <= len(data):
        return data
    header = data[:32] + bytes(4) + data[36:header_bytes]
    return data[:32] + struct.pack("<I", zlib.crc32(header)) + data[36:]


def raw(data: bytes) -> bytes:
    return section(RAW, 1, len(data), data)


def section(kind: int, word_bytes: int, words: int, body: bytes) -> bytes:
    return struct.pack("<BBHII", kind, word_bytes, 0, words, len(body)) + body


def huffman(words: Sequence[bytes], lengths: Sequence[int], dictionary: Sequence[bytes]) -> bytes:
    """A section of words with the given alphabet."""
    symbols = {word: symbol for symbol, word in enumerate(dictionary) if lengths[symbol]}
    body = alphabet(lengths, dictionary) + stream([symbols[word] for word in words], lengths)
    return section(HUFFMAN, len(dictionary[0]), len(words), body)


def sparse(
    words: Sequence[bytes],
    gap_lengths: Sequence[int],
    lengths: Sequence[int],
    dictionary: Sequence[bytes],
) -> bytes:
    """A section of words, zeros skipped; both alphabets are given."""
    gaps, values = split_zeros(words)
    symbols = {word: symbol for symbol, word in enumerate(dictionary) if lengths[symbol]}
    body = struct.pack("<II", len(values), len(gaps))
    body += alphabet(gap_lengths, None) + alphabet(lengths, dictionary)
    body += stream(gaps, gap_lengths) + stream([symbols[word] for word in values], lengths)
    return section(SPARSE, len(dictionary[0]), len(words), body)


def split_zeros(words: Sequence[bytes]) -> tuple[list[int], list[bytes]]:
    """The gaps between words that are not zero, and these words."""
    gaps: list[int] = []
    values: list[bytes] = []
    zeros = 0
    for word in words:
        if any(word):
            gaps += [255] * (zeros // 255) + [zeros % 255]
            values.append(word)
            zeros = 0
        else:
            zeros += 1
    return gaps, values


def planes(word_bytes: int, sections: Sequence[bytes]) -> bytes:
    (words,) = struct.unpack_from("<I", sections[0], 4)
    return section(PLANES, word_bytes, words, b"".join(sections))


def alphabet(lengths: Sequence[int], dictionary: Sequence[bytes] | None) -> bytes:
    bits, before = "", 0
    for length in lengths:
        nibble = f"{length:04b}"[::-1]
        bits += {0: "0", 1: "10", -1: "110"}.get(length - before, "111" + nibble)
        before = length
    packed = bytes(int(bits[at : at + 8][::-1], 2) for at in range(0, len(bits), 8))
    implied = dictionary is None or (len(dictionary[0]) == 1 and len(lengths) == 256)
    return bytes([len(lengths) - 1]) + packed + (b"" if implied else b"".join(dictionary or ()))


def stream(symbols: Sequence[int], lengths: Sequence[int]) -> bytes:
    if sum(map(bool, lengths)) == 1:
        return b""
    codes = {symbol: code for code, symbol in canonical(lengths).items()}
    packed = b""
    for at in range(0, len(symbols), BLOCK):
        block = symbols[at : at + BLOCK]
        parts = [_bits(block[part::PARTS], codes) for part in range(PARTS)]
        packed += struct.pack("<4H", *map(len, parts)) + b"".join(parts)
    return packed


def _bits(symbols: Sequence[int], codes: dict[int, tuple[int, int]]) -> bytes:
    text = "".join(format(code, f"0{length}b") for length, code in map(codes.__getitem__, symbols))
    return bytes(int(text[at : at + 8][::-1], 2) for at in range(0, len(text), 8))


def canonical(lengths: Sequence[int]) -> dict[tuple[int, int], int]:
    """(length, code) to symbol, as in RFC 1951, section 3.2.2."""
    codes: dict[tuple[int, int], int] = {}
    code = 0
    for length in range(1, LONGEST + 1):
        code <<= 1
        for symbol, own in enumerate(lengths):
            if own == length:
                codes[length, code] = symbol
                code += 1
    return codes


def decode(payload: bytes, raw_bytes: int) -> bytes:
    """Decode a payload of codec 1.

    Raises:
        Refused: it breaks a rule.
    """
    tensor = b""
    at = 0
    while len(tensor) < raw_bytes:
        _demand(at < len(payload), "WORDS")
        found, size = _section(payload[at:], raw_bytes - len(tensor))
        tensor += found
        at += size
    _demand(at == len(payload), "SECTION_SIZE")
    return tensor


def _demand(holds: bool, rule: str) -> None:
    if not holds:
        raise Refused(rule)


def _section(data: bytes, room: int, plane_of: int | None = None) -> tuple[bytes, int]:
    """A section's bytes and its size; `plane_of` is the words of the section it is a plane of."""
    _demand(len(data) >= 12, "SECTION_SIZE")
    kind, word_bytes, reserved, words, body_bytes = struct.unpack_from("<BBHII", data)
    _demand(word_bytes in WORD_BYTES.get(kind, ()) and reserved == 0, "SECTION")
    if plane_of is not None:
        _demand(kind in (RAW, HUFFMAN) and word_bytes == 1 and words == plane_of, "SECTION")
    _demand(words >= 1 and words * word_bytes <= room, "WORDS")
    _demand(body_bytes <= len(data) - 12, "SECTION_SIZE")
    body = data[12 : 12 + body_bytes]
    if kind == RAW:
        _demand(body_bytes == words, "SECTION_SIZE")
        tensor = body
    elif kind == HUFFMAN:
        tensor = _huffman(body, word_bytes, words)
    elif kind == SPARSE:
        tensor = _sparse(body, word_bytes, words)
    else:
        tensor = _planes(body, word_bytes, words)
    return tensor, 12 + body_bytes


def _huffman(body: bytes, word_bytes: int, words: int) -> bytes:
    code, at = _alphabet(body, 0, word_bytes)
    blocks, at = _frames(body, at, words, code)
    _demand(at == len(body), "SECTION_SIZE")
    return b"".join(code.words[symbol] for symbol in _symbols(blocks, words, code))


def _sparse(body: bytes, word_bytes: int, words: int) -> bytes:
    _demand(len(body) >= 8, "SECTION_SIZE")
    nonzeros, gap_count = struct.unpack_from("<II", body)
    _demand(1 <= nonzeros <= gap_count <= words, "GAPS")
    gap_code, at = _alphabet(body, 8, None)
    code, at = _alphabet(body, at, word_bytes)
    gap_blocks, at = _frames(body, at, gap_count, gap_code)
    blocks, at = _frames(body, at, nonzeros, code)
    _demand(at == len(body), "SECTION_SIZE")
    gaps = list(_symbols(gap_blocks, gap_count, gap_code))
    values = list(_symbols(blocks, nonzeros, code))
    _demand(sum(gap < 255 for gap in gaps) == nonzeros, "GAPS")
    tensor = [bytes(word_bytes)] * words
    place = 0
    rest = iter(values)
    for gap in gaps:
        place += gap
        if gap == 255:
            _demand(place <= words, "GAPS")
            continue
        _demand(place < words, "GAPS")
        tensor[place] = code.words[next(rest)]
        place += 1
    return b"".join(tensor)


def _planes(body: bytes, word_bytes: int, words: int) -> bytes:
    tensor = bytearray(words * word_bytes)
    at = 0
    for plane in range(word_bytes):
        tensor[plane::word_bytes], size = _section(body[at:], words, plane_of=words)
        at += size
    _demand(at == len(body), "SECTION_SIZE")
    return bytes(tensor)


def _alphabet(body: bytes, at: int, word_bytes: int | None) -> tuple[Code, int]:
    """An alphabet and where it ends; without word_bytes it has no dictionary."""
    _demand(at < len(body), "SECTION_SIZE")
    count = body[at] + 1
    lengths, words_at = _lengths(body, at + 1, count)
    implied = word_bytes is None or (word_bytes == 1 and count == 256)
    width = 1 if word_bytes is None else word_bytes
    end = words_at + (0 if implied else count * width)
    _demand(end <= len(body), "SECTION_SIZE")
    if implied:
        words = [bytes([symbol]) for symbol in range(count)]
    else:
        words = [body[k : k + width] for k in range(words_at, end, width)]

    used = [symbol for symbol in range(count) if lengths[symbol]]
    if len(used) == 1:
        _demand(lengths[used[0]] == 1, "CODE")
        return Code({}, words, used[0]), end
    _demand(sum(2 ** (LONGEST - lengths[symbol]) for symbol in used) == 2**LONGEST, "CODE")
    return Code(canonical(lengths), words, None), end


def _lengths(body: bytes, at: int, count: int) -> tuple[list[int], int]:
    """Code lengths, and where the byte ends that has the last bit of them."""
    bits = "".join(format(byte, "08b")[::-1] for byte in body[at : at + count])
    steps = {"0": 0, "10": 1, "110": -1}
    lengths: list[int] = []
    used = 0
    while len(lengths) < count:
        code = next((code for code in (*steps, "111") if bits.startswith(code, used)), None)
        _demand(code is not None, "SECTION_SIZE")
        used += len(str(code))
        if code == "111":
            _demand(used + 4 <= len(bits), "SECTION_SIZE")
            length = int(bits[used : used + 4][::-1], 2)
            used += 4
        else:
            length = (lengths[-1] if lengths else 0) + steps[str(code)]
        _demand(0 <= length <= LONGEST, "CODE")
        lengths.append(length)
    end = -(-used // 8)
    _demand("1" not in bits[used : 8 * end], "CODE")
    return lengths, at + end


def _frames(body: bytes, at: int, count: int, code: Code) -> tuple[list[list[bytes]], int]:
    """The parts of all blocks of the stream that begins at `at`, and where it ends."""
    blocks: list[list[bytes]] = []
    while code.single is None and len(blocks) * BLOCK < count:
        _demand(at + 8 <= len(body), "SECTION_SIZE")
        sizes = struct.unpack_from("<4H", body, at)
        at += 8
        _demand(at + sum(sizes) <= len(body), "SECTION_SIZE")
        ends = [at + sum(sizes[: part + 1]) for part in range(PARTS)]
        blocks.append([body[end - size : end] for size, end in zip(sizes, ends, strict=True)])
        at = ends[-1]
    return blocks, at


def _symbols(blocks: list[list[bytes]], count: int, code: Code) -> Iterator[int]:
    if code.single is not None:
        yield from [code.single] * count
    for index, parts in enumerate(blocks):
        yield from _block(parts, min(BLOCK, count - index * BLOCK), code)


def _block(parts: list[bytes], count: int, code: Code) -> list[int]:
    symbols = [0] * count
    for part, data in enumerate(parts):
        places = range(part, count, PARTS)
        bits = [byte >> bit & 1 for byte in data for bit in range(8)]
        at = 0
        for place in places:
            length, value = 0, 0
            while (length, value) not in code.symbols:
                _demand(at < len(bits), "STREAM")
                length, value = length + 1, value << 1 | bits[at]
                at += 1
            symbols[place] = code.symbols[length, value]
        _demand(-(-at // 8) == len(data) and not any(bits[at:]), "STREAM")
    return symbols
