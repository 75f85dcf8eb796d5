"""Codes one tensor without loss: raw, Huffman, sparse or byte planes, whatever is smallest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgepress.targets._runs import MOST_SYMBOLS, Run, cut
from edgepress.targets._word_index import MOST_WORDS, index_words
from edgepress.targets.huffman import Bytes, Counts, entropy_bits, good_lengths, stream_bytes
from edgepress.targets.sections import (
    COUNTS,
    HEADER,
    HUFFMAN,
    WORD_BYTES,
    Alphabet,
    gaps_between,
    huffman_section,
    planes_section,
    raw_section,
    sparse_section,
)

_MOST_ELEMENTS = 16  # of a word: more are not shared in practice
_MOST_BYTES = 1 << 31  # of a tensor: sections count in 32 bits
_EVERY_BYTE = np.arange(256, dtype=np.uint8)[:, None]


@dataclass(frozen=True)
class Coded:
    """A tensor's payload.

    Attributes:
        payload: the bytes for the file.
        codec: `raw` or `coded`, as in the file.
        coding: kinds of the sections that make most of it: `raw`, `huffman`, `sparse`, `planes`,
            or several, joined by `+`.
        word_bytes: size of the words that are coded as one symbol.
        sections: number of sections; 0 where the payload is raw.
        entropy_bytes: the zero-order Shannon bound of the symbols and gaps, plus dictionaries.
            What is stored raw counts in full.
    """

    payload: bytes
    codec: str
    coding: str
    word_bytes: int
    sections: int
    entropy_bytes: float


class _Coding(NamedTuple):
    """One or more sections that could be made, and how large they will be."""

    kinds: frozenset[str]
    word_bytes: int
    sections: int
    size_bytes: int
    entropy_bytes: float
    make: Callable[[], bytes]


class _Option(NamedTuple):
    """What may become a `_Coding`, and a size that it cannot be below."""

    least_bytes: float
    plan: Callable[[], _Coding]


class _Words(NamedTuple):
    """A tensor as numbered words: numbers `[n]`, what they stand for `[distinct, word_bytes]`."""

    numbers: npt.NDArray[Any]
    dictionary: Bytes

    @property
    def word_bytes(self) -> int:
        return int(self.dictionary.shape[1])

    @property
    def zero(self) -> int | None:
        found = np.flatnonzero(~self.dictionary.any(axis=1))
        return int(found[0]) if found.size else None

    def runs(self) -> list[Run]:
        return cut(self.numbers, len(self.dictionary), self.word_bytes, self.zero)


def as_raw(raw: bytes, element_bytes: int) -> Coded:
    """Return a tensor's bytes as they are."""
    return Coded(raw, "raw", "raw", element_bytes, 0, float(len(raw)))


def encode(raw: bytes, element_bytes: int) -> Coded:
    """Code a tensor as small as the format allows within a reasonable time.

    Words of every size that the format has are tried where few distinct ones occur, each with the
    tensor cut into runs that have codes of their own. A tensor of 2 GiB or more stays raw.

    Args:
        raw: the tensor's bytes, row-major, little-endian.
        element_bytes: size of an element: 1, 2, 4 or 8.
    """
    as_is = as_raw(raw, element_bytes)
    if not HEADER.size < len(raw) < _MOST_BYTES:
        return as_is
    data = np.frombuffer(raw, np.uint8)
    best = _smallest(_options(data, element_bytes))
    payload = best.make() if best.size_bytes < len(raw) else raw
    if len(payload) >= len(raw):
        return as_is
    return Coded(
        payload=payload,
        codec="coded",
        coding="+".join(sorted(best.kinds)),
        word_bytes=best.word_bytes,
        sections=best.sections,
        entropy_bytes=best.entropy_bytes,
    )


def _smallest(options: Iterable[_Option]) -> _Coding:
    """Plan the options until what is left cannot be smaller."""
    best: _Coding | None = None
    for option in sorted(options, key=lambda option: option.least_bytes):
        if best and option.least_bytes >= best.size_bytes:
            break
        coding = option.plan()
        if not best or coding.size_bytes < best.size_bytes:
            best = coding
    assert best
    return best


def _options(data: Bytes, element_bytes: int) -> Iterator[_Option]:
    """All ways to code a tensor that are worth a look."""
    every_byte = _Words(data, _EVERY_BYTE)
    runs = every_byte.runs()
    yield _in_runs(data, every_byte, runs)
    words: _Words | None = every_byte
    if element_bytes > 1:
        yield _planes(data, element_bytes)
        words = _elements(data, element_bytes)
        if words:
            runs = words.runs()
            yield _in_runs(data, words, runs)
    largest = min(WORD_BYTES[HUFFMAN][-1], _MOST_ELEMENTS * element_bytes)
    while words and 2 * words.word_bytes <= largest:
        # What needs no cuts as it is will need none in pairs: one code must do.
        one_code = len(runs) == 1 and len(words.dictionary) <= MOST_SYMBOLS
        words = _pairs(data, words, MOST_SYMBOLS if one_code else MOST_WORDS)
        if words:
            runs = words.runs()
            yield _in_runs(data, words, runs)


def _elements(data: Bytes, element_bytes: int) -> _Words | None:
    """The elements as words, where few distinct ones occur."""
    dtype = f"<u{element_bytes}"
    indexed = index_words(data.view(dtype), min(MOST_WORDS, _affordable(data, element_bytes)))
    if indexed is None:
        return None
    numbers, distinct = indexed
    return _Words(numbers, distinct.astype(dtype).view(np.uint8).reshape(-1, element_bytes))


def _pairs(data: Bytes, words: _Words, most: int) -> _Words | None:
    """Words twice as long, where few distinct ones occur."""
    number_bytes = words.numbers.itemsize
    pairs = words.numbers[: words.numbers.size & ~1].view(f"<u{2 * number_bytes}")
    word_bytes = 2 * words.word_bytes
    if not pairs.size:
        return None
    indexed = index_words(pairs, min(most, _affordable(data, word_bytes)))
    if indexed is None:
        return None
    numbers, distinct = indexed
    first = distinct & np.uint64((1 << 8 * number_bytes) - 1)
    halves = np.stack([first, distinct >> np.uint64(8 * number_bytes)], axis=1)
    return _Words(numbers, words.dictionary[halves].reshape(-1, word_bytes))


def _affordable(data: Bytes, word_bytes: int) -> int:
    """Distinct words whose dictionaries alone are smaller than the tensor.

    The dictionaries of words twice as long are never smaller.
    """
    return data.size // word_bytes - 1


def _in_runs(data: Bytes, words: _Words, runs: list[Run]) -> _Option:
    """Words of one size, each run as its own section, and what is behind the last whole word."""
    zero, word_bytes = words.zero, words.word_bytes
    options: list[list[_Option]] = []
    for begin, end, counts in runs:
        run = words._replace(numbers=words.numbers[begin:end])
        raw = _raw(data[begin * word_bytes : end * word_bytes])
        options.append([raw, *_huffman(run, counts), *_sparse(run, counts, zero)])
    rest = data[words.numbers.size * word_bytes :]
    if rest.size:
        options.append([_raw(rest)])

    def plan() -> _Coding:
        parts = [_smallest(run) for run in options]
        return _Coding(
            kinds=frozenset[str]().union(*(part.kinds for part in parts)),
            word_bytes=word_bytes,
            sections=len(parts),
            size_bytes=sum(part.size_bytes for part in parts),
            entropy_bytes=sum(part.entropy_bytes for part in parts),
            make=lambda: b"".join(part.make() for part in parts),
        )

    return _Option(sum(min(option.least_bytes for option in run) for run in options), plan)


def _raw(data: Bytes) -> _Option:
    size_bytes = HEADER.size + data.size
    make = lambda: raw_section(data)  # noqa: E731
    coding = _Coding(frozenset({"raw"}), 1, 1, size_bytes, float(data.size), make)
    return _Option(size_bytes, lambda: coding)


def _huffman(words: _Words, counts: Counts) -> list[_Option]:
    """One code for all words, where they are few enough."""
    if np.count_nonzero(counts) > MOST_SYMBOLS:
        return []
    content_bytes = entropy_bits(counts) / 8

    def plan() -> _Coding:
        symbols = _symbols(words.dictionary, counts)
        return _Coding(
            kinds=frozenset({"huffman"}),
            word_bytes=words.word_bytes,
            sections=1,
            size_bytes=HEADER.size + symbols.size_bytes,
            entropy_bytes=content_bytes + symbols.dictionary_bytes,
            make=lambda: huffman_section(
                symbols.of(words.numbers), symbols.alphabet, words.word_bytes
            ),
        )

    return [_Option(HEADER.size + _least_alphabet_bytes(words, counts) + content_bytes, plan)]


def _sparse(words: _Words, counts: Counts, zero: int | None) -> list[_Option]:
    """A code for the words that are not zero and one for the gaps, where most words are zero."""
    if zero is None or 2 * counts[zero] < words.numbers.size or counts[zero] == counts.sum():
        return []
    counts = counts.copy()
    counts[zero] = 0
    if np.count_nonzero(counts) > MOST_SYMBOLS:
        return []
    places = np.flatnonzero(words.numbers != zero)
    gaps = gaps_between(places)
    gap_counts = np.bincount(gaps)
    content_bytes = (entropy_bits(gap_counts) + entropy_bits(counts)) / 8

    def plan() -> _Coding:
        gap_alphabet = Alphabet(good_lengths(gap_counts))
        gap_bytes = gap_alphabet.size_bytes + stream_bytes(gap_counts, gap_alphabet.lengths)
        symbols = _symbols(words.dictionary, counts)
        return _Coding(
            kinds=frozenset({"sparse"}),
            word_bytes=words.word_bytes,
            sections=1,
            size_bytes=HEADER.size + COUNTS.size + gap_bytes + symbols.size_bytes,
            entropy_bytes=content_bytes + symbols.dictionary_bytes,
            make=lambda: sparse_section(
                words.numbers.size,
                gaps,
                gap_alphabet,
                symbols.of(words.numbers[places]),
                symbols.alphabet,
                words.word_bytes,
            ),
        )

    return [_Option(HEADER.size + _least_alphabet_bytes(words, counts) + content_bytes, plan)]


def _planes(data: Bytes, element_bytes: int) -> _Option:
    """Each byte of the elements by itself: Huffman where that is smaller, or raw."""
    options: list[list[_Option]] = []
    for byte in range(element_bytes):
        plane = np.ascontiguousarray(data[byte::element_bytes])
        counts = np.bincount(plane, minlength=256)
        options.append([_raw(plane), *_huffman(_Words(plane, _EVERY_BYTE), counts)])

    def plan() -> _Coding:
        planes = [_smallest(plane) for plane in options]
        words = data.size // element_bytes
        return _Coding(
            kinds=frozenset({"planes"}),
            word_bytes=element_bytes,
            sections=1,
            size_bytes=HEADER.size + sum(plane.size_bytes for plane in planes),
            entropy_bytes=sum(plane.entropy_bytes for plane in planes),
            make=lambda: planes_section(element_bytes, words, [plane.make() for plane in planes]),
        )

    least = sum(min(option.least_bytes for option in plane) for plane in options)
    return _Option(HEADER.size + least, plan)


class _Symbols(NamedTuple):
    """Numbered words as symbols of an alphabet.

    Attributes:
        alphabet: their code and dictionary.
        by_number: symbol of each number, or None where they are the same.
        size_bytes: of alphabet and stream.
    """

    alphabet: Alphabet
    by_number: Bytes | None
    size_bytes: int

    @property
    def dictionary_bytes(self) -> int:
        return 0 if self.alphabet.dictionary is None else self.alphabet.dictionary.size

    def of(self, numbers: npt.NDArray[Any]) -> Bytes:
        return numbers if self.by_number is None else self.by_number.take(numbers)


def _symbols(dictionary: Bytes, counts: Counts) -> _Symbols:
    """The words that occur as symbols; or all bytes, where a dictionary would be larger."""
    used = np.flatnonzero(counts)
    lengths = good_lengths(counts[used])
    streams = stream_bytes(counts[used], lengths)
    compact = Alphabet(lengths, dictionary[used])
    compact_bytes = compact.size_bytes
    if dictionary is _EVERY_BYTE:
        every_byte = Alphabet(np.zeros(len(dictionary), np.uint8))
        every_byte.lengths[used] = lengths
        every_bytes = every_byte.size_bytes
        if every_bytes <= compact_bytes:
            return _Symbols(every_byte, None, every_bytes + streams)
    by_number = np.zeros(len(dictionary), np.uint8)
    by_number[used] = np.arange(used.size)
    return _Symbols(compact, by_number, compact_bytes + streams)


def _least_alphabet_bytes(words: _Words, counts: Counts) -> int:
    """What an alphabet hardly ever is below: 2 bits per length, and a dictionary but of bytes."""
    used = int(np.count_nonzero(counts))
    return 1 + used // 4 + (used * words.word_bytes if words.word_bytes > 1 else 0)
