"""The sections of a coded payload: raw, Huffman, sparse, byte planes. See `docs/format.md`.

Reading checks every rule in the order in which `runtime/decode.c` does.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgepress.targets.huffman import (
    MAX_BITS,
    Bytes,
    check_lengths,
    decode_stream,
    encode_stream,
    frame_stream,
)
from edgepress.targets.weight_rules import BrokenRule, Rule

RAW, HUFFMAN, SPARSE, PLANES = range(4)
WORD_BYTES = {
    RAW: (1,),
    HUFFMAN: (1, 2, 4, 8, 16, 32, 64),
    SPARSE: (1, 2, 4, 8, 16, 32, 64),
    PLANES: (2, 4, 8),
}
HEADER = struct.Struct("<BBHII")  # kind, word_bytes, reserved, words, body_bytes
COUNTS = struct.Struct("<II")  # nonzeros, gaps
_BEFORE, _LENGTH = np.divmod(np.arange(256), 16)
_DIFFERENCES = [_LENGTH == _BEFORE, _LENGTH == _BEFORE + 1, _LENGTH == _BEFORE - 1]
_CHANGE_CODES = np.select(_DIFFERENCES, [0b0, 0b01, 0b011], 0b111 | _LENGTH << 3).astype(np.uint8)
_CHANGE_BITS = np.select(_DIFFERENCES, [1, 2, 3], 7)
LONG_GAP = 255  # this many zero words, and no word that is not zero


class Alphabet(NamedTuple):
    """The code of a stream's symbols, and what they stand for.

    Attributes:
        lengths: code length of each symbol, `[symbols]`.
        dictionary: the word of each symbol, `[symbols, word_bytes]`; None where a symbol is itself
            the number or byte.
    """

    lengths: Bytes
    dictionary: Bytes | None = None

    def pack(self) -> bytes:
        """Return the bytes that describe it."""
        changes = self._changes()
        by_bit = _CHANGE_CODES[changes][:, None] >> np.arange(7, dtype=np.uint8) & np.uint8(1)
        is_used = np.arange(7) < _CHANGE_BITS[changes][:, None]
        packed = np.packbits(by_bit[is_used], bitorder="little").tobytes()
        dictionary = b"" if self.dictionary is None else self.dictionary.tobytes()
        return bytes([len(self.lengths) - 1]) + packed + dictionary

    @property
    def size_bytes(self) -> int:
        """Bytes of `pack()`."""
        bits = int(_CHANGE_BITS[self._changes()].sum(dtype=np.int64))
        return 1 + (bits + 7) // 8 + (0 if self.dictionary is None else self.dictionary.size)

    def _changes(self) -> npt.NDArray[np.int64]:
        """Which change each length is: 16 x the one before + this."""
        before = np.append(np.uint8(0), self.lengths[:-1])
        return before.astype(np.int64) << 4 | self.lengths


def raw_section(data: Bytes) -> bytes:
    """Return a section that holds bytes as they are."""
    return _section(RAW, 1, data.size, data.tobytes())


def huffman_section(symbols: Bytes, alphabet: Alphabet, word_bytes: int) -> bytes:
    """Return a section of words that are all coded the same way, given as symbols `[words]`."""
    body = alphabet.pack() + encode_stream(symbols, alphabet.lengths)
    return _section(HUFFMAN, word_bytes, symbols.size, body)


def sparse_section(
    words: int,
    gaps: Bytes,
    gap_alphabet: Alphabet,
    symbols: Bytes,
    alphabet: Alphabet,
    word_bytes: int,
) -> bytes:
    """Return a section of the words that are not zero, and the gaps between them.

    Args:
        words: number of all words.
        gaps: what `gaps_between` gave.
        gap_alphabet: code of the gaps, without a dictionary.
        symbols: the words that are not zero, as symbols `[nonzeros]`.
        alphabet: code and dictionary of those.
        word_bytes: size of a word.
    """
    body = COUNTS.pack(symbols.size, gaps.size) + gap_alphabet.pack() + alphabet.pack()
    body += encode_stream(gaps, gap_alphabet.lengths) + encode_stream(symbols, alphabet.lengths)
    return _section(SPARSE, word_bytes, words, body)


def planes_section(word_bytes: int, words: int, planes: Sequence[bytes]) -> bytes:
    """Return a section of one raw or Huffman section per byte of a word."""
    return _section(PLANES, word_bytes, words, b"".join(planes))


def gaps_between(places: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Bytes:
    """Return the gap symbols for the ascending places `[nonzeros]` of words that are not zero."""
    gaps = np.diff(places, prepend=-1) - 1
    ends = np.cumsum(gaps // LONG_GAP + 1)
    symbols = np.full(int(ends[-1]), LONG_GAP, np.uint8)
    symbols[ends - 1] = gaps % LONG_GAP
    return symbols


def _section(kind: int, word_bytes: int, words: int, body: bytes) -> bytes:
    return HEADER.pack(kind, word_bytes, 0, words, len(body)) + body


def read_sections(payload: bytes, raw_bytes: int) -> bytes:
    """Decode a coded payload into the `raw_bytes` bytes of a tensor, and check all of it.

    Raises:
        BrokenRule: the payload breaks a rule of `docs/format.md`; `.rule` says which.
    """
    data = np.frombuffer(payload, np.uint8)
    pieces: list[Bytes] = []
    at, left = 0, raw_bytes
    while left:
        if at == data.size:
            raise BrokenRule(Rule.WORDS, f"{left} bytes are missing")
        piece, at = _read_section(data, at, left)
        pieces.append(piece)
        left -= piece.size
    if at != data.size:
        raise BrokenRule(Rule.SECTION_SIZE, f"{data.size - at} bytes follow the last section")
    return b"".join(piece.tobytes() for piece in pieces)


def _read_section(data: Bytes, at: int, left: int, plane_words: int = 0) -> tuple[Bytes, int]:
    """Decode one section into at most `left` bytes; inside of planes, into exactly plane_words."""
    if data.size - at < HEADER.size:
        raise BrokenRule(Rule.SECTION_SIZE, f"{data.size - at} bytes instead of a header")
    kind, word_bytes, reserved, words, body_bytes = HEADER.unpack_from(data.data, at)
    in_planes = plane_words and (kind > HUFFMAN or word_bytes != 1 or words != plane_words)
    if word_bytes not in WORD_BYTES.get(kind, ()) or reserved or in_planes:
        raise BrokenRule(Rule.SECTION, f"kind {kind}, {words} words of {word_bytes} bytes")
    if not 0 < words * word_bytes <= left:
        raise BrokenRule(Rule.WORDS, f"{words} words of {word_bytes} bytes, {left} are left")
    at += HEADER.size
    if body_bytes > data.size - at:
        raise BrokenRule(Rule.SECTION_SIZE, f"{body_bytes} bytes, {data.size - at} are there")
    body = data[at : at + body_bytes]
    if kind == RAW:
        if body_bytes != words:
            raise BrokenRule(Rule.SECTION_SIZE, f"{body_bytes} bytes for {words}")
        return body, at + body_bytes
    read = {HUFFMAN: _read_huffman, SPARSE: _read_sparse, PLANES: _read_planes}[kind]
    return read(body, words, word_bytes), at + body_bytes


def _read_huffman(body: Bytes, words: int, word_bytes: int) -> Bytes:
    alphabet, at = _read_alphabet(body, 0, word_bytes)
    frame = frame_stream(body, at, words, alphabet.lengths)
    _check_end(body, frame.end)
    return _words(decode_stream(body, frame, words, alphabet.lengths), alphabet)


def _read_sparse(body: Bytes, words: int, word_bytes: int) -> Bytes:
    if body.size < COUNTS.size:
        raise BrokenRule(Rule.SECTION_SIZE, f"{body.size} bytes instead of two counts")
    nonzeros, count = COUNTS.unpack_from(body.data)
    if not 0 < nonzeros <= count <= words:
        raise BrokenRule(Rule.GAPS, f"{count} gaps for {nonzeros} of {words} words")
    gap_alphabet, at = _read_alphabet(body, COUNTS.size, 0)
    alphabet, at = _read_alphabet(body, at, word_bytes)
    gap_frame = frame_stream(body, at, count, gap_alphabet.lengths)
    frame = frame_stream(body, gap_frame.end, nonzeros, alphabet.lengths)
    _check_end(body, frame.end)
    gaps = decode_stream(body, gap_frame, count, gap_alphabet.lengths)
    symbols = decode_stream(body, frame, nonzeros, alphabet.lengths)
    is_word = gaps < LONG_GAP
    reached = np.cumsum(gaps + is_word.astype(np.int64))
    if np.count_nonzero(is_word) != nonzeros or reached[-1] > words:
        raise BrokenRule(Rule.GAPS, f"they lead to word {reached[-1]} of {words}")
    decoded = np.zeros((words, word_bytes), np.uint8)
    decoded[reached[is_word] - 1] = _words(symbols, alphabet).reshape(-1, word_bytes)
    return decoded.ravel()


def _read_planes(body: Bytes, words: int, word_bytes: int) -> Bytes:
    decoded = np.empty((words, word_bytes), np.uint8)
    at = 0
    for byte in range(word_bytes):
        decoded[:, byte], at = _read_section(body, at, words, words)
    _check_end(body, at)
    return decoded.ravel()


def _read_alphabet(body: Bytes, at: int, word_bytes: int) -> tuple[Alphabet, int]:
    """The alphabet at `at` and where it ends; a word_bytes of 0 means that it is of gaps."""
    if at == body.size:
        raise BrokenRule(Rule.SECTION_SIZE, "an alphabet is missing")
    last = int(body[at])
    lengths, at = _read_lengths(body, at + 1, last + 1)
    has_dictionary = word_bytes > 1 or (word_bytes == 1 and last < 255)
    end = at + (last + 1) * word_bytes * has_dictionary
    if end > body.size:
        raise BrokenRule(Rule.SECTION_SIZE, "a dictionary is cut")
    check_lengths(lengths)
    dictionary = body[at:end].reshape(-1, word_bytes) if has_dictionary else None
    return Alphabet(lengths, dictionary), end


def _read_lengths(body: Bytes, at: int, count: int) -> tuple[Bytes, int]:
    """Code lengths, each as its difference from the one before, and where they end."""
    longest = -(-7 * count // 8)
    there = body[at : at + longest]
    bits = int.from_bytes(there.tobytes(), "little")
    lengths, length, used = np.zeros(count, np.uint8), 0, 0
    for symbol in range(count):
        step = (1, 2, 1, 3, 1, 2, 1, 7)[bits >> used & 7]
        if step == 7:
            length = bits >> used + 3 & 15
        else:
            length += (0, 0, 1, -1)[step]
        used += step
        if used > 8 * there.size:
            raise BrokenRule(Rule.SECTION_SIZE, "code lengths are cut")
        if not 0 <= length <= MAX_BITS:
            raise BrokenRule(Rule.CODE, f"{length} bits")
        lengths[symbol] = length
    if bits >> used & (1 << -used % 8) - 1:
        raise BrokenRule(Rule.CODE, "bits behind the lengths are not 0")
    return lengths, at + (used + 7) // 8


def _words(symbols: Bytes, alphabet: Alphabet) -> Bytes:
    if alphabet.dictionary is None:
        return symbols
    return alphabet.dictionary.take(symbols, axis=0).ravel()


def _check_end(body: Bytes, at: int) -> None:
    if at != body.size:
        raise BrokenRule(Rule.SECTION_SIZE, f"{body.size - at} bytes follow a section's end")
