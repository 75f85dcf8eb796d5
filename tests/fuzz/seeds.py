"""Small weights files of every kind of section, word and dtype, from which fuzzing starts."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from edgepress.targets.program import DTYPES, Array
from edgepress.targets.weights import write_weights
from tests.fuzz import reference
from tests.fuzz.reference import BLOCK, LONGEST, Tensor

Random = np.random.Generator

# Before a section that saves nothing: a file's payloads must save bytes.
SMALL = reference.huffman([b"\5"] * 4000, [1], [b"\5"])


def payloads(random: Random) -> dict[str, tuple[bytes, int]]:
    """Coded payloads by what they hold, each with the bytes of its tensor."""
    found: dict[str, bytes] = {}
    for word_bytes in reference.WORD_BYTES[reference.HUFFMAN]:
        found[f"huffman-{word_bytes}"] = _huffman(random, 200, word_bytes, 9)
        found[f"sparse-{word_bytes}"] = _sparse(random, 700, word_bytes, 5, 0.02)
    for word_bytes in reference.WORD_BYTES[reference.PLANES]:
        kinds = ([reference.raw(random.bytes(400))] * word_bytes)[1:]
        found[f"planes-{word_bytes}"] = reference.planes(
            word_bytes, [*kinds, _huffman(random, 400, 1, 6)]
        )
    found["huffman-1-whole"] = _huffman(random, 3000, 1, 256)
    found["huffman-1-most"] = _huffman(random, 3000, 1, 255)
    for longest in (LONGEST, LONGEST - 1):
        found[f"huffman-1-{longest}-bits"] = SMALL + _longest(random, 1500, longest)
    found["huffman-1-long"] = _huffman(random, 3 * BLOCK + 6, 1, 2)
    found["huffman-4-block"] = _huffman(random, BLOCK + 1, 4, 3)
    found["huffman-1-single"] = reference.huffman([b"\5"] * 90, [0, 1, 0], [b"\1", b"\5", b"\7"])
    found["huffman-1-deep"] = reference.huffman(
        [bytes([symbol]) for symbol in random.geometric(0.5, 700) % 13],
        [*range(1, LONGEST), LONGEST, LONGEST],
        [bytes([symbol]) for symbol in range(LONGEST + 1)],
    )
    found["sparse-1-dense"] = _sparse(random, 100, 1, 3, 0.9)
    found["sparse-2-one"] = reference.sparse(
        [bytes(2)] * 30 + [b"ab"], [0] * 30 + [1], [1], [b"ab"]
    )
    found["sparse-1-long"] = _sparse(random, 6 * BLOCK, 1, 4, 0.2)
    found["sections"] = (
        reference.raw(random.bytes(20))
        + _huffman(random, 30, 2, 4)
        + _sparse(random, 90, 4, 2, 0.1)
    )
    return {name: (payload, _raw_bytes(payload)) for name, payload in found.items()}


def refused() -> dict[str, tuple[bytes, int, str]]:
    """Payloads with one thing wrong that chance seldom finds: bytes of the tensor, and the rule."""
    half = reference.raw(bytes(50))
    values = [bytes(1)] * 300 + [b"\7"] + [bytes(1)] * 99

    def gaps(nonzeros: int, count: int, symbols: list[int], drawn: int) -> bytes:
        lengths = [0] * 256
        for symbol in set(symbols):
            lengths[symbol] = 1
        body = struct.pack("<II", nonzeros, count) + reference.alphabet(lengths, None)
        body += reference.alphabet([1, 1], [b"\7", b"\3"]) + reference.stream(symbols, lengths)
        body += reference.stream([0] * drawn, [1, 1])
        return reference.section(reference.SPARSE, 1, 900, body)

    nested = reference.sparse(values, [0] * 45 + [1] + [0] * 209 + [1], [1], [b"\7"])

    def coded(alphabet: bytes, words: int = 90) -> tuple[bytes, int]:
        return reference.section(reference.HUFFMAN, 1, words, alphabet), words

    def alphabet(*lengths: int) -> bytes:
        return reference.alphabet(lengths, [bytes([symbol]) for symbol in range(len(lengths))])

    stream = struct.pack("<4H", 1, 1, 1, 1) + bytes(4)
    found = {
        "no-words": (half + reference.section(reference.RAW, 1, 0, b"") + half, 100, "WORDS"),
        "no-words-huffman": (
            half + reference.section(reference.HUFFMAN, 1, 0, bytes([0, 1, 7])) + half,
            100,
            "WORDS",
        ),
        "missing": (half, 100, "WORDS"),
        "cut-header": (half + bytes(11), 100, "SECTION_SIZE"),
        "too-much": (half + half, 50, "SECTION_SIZE"),
        "wide-raw": (reference.section(reference.RAW, 2, 50, bytes(50)), 100, "SECTION"),
        "short-raw": (reference.section(reference.RAW, 1, 50, bytes(49)), 50, "SECTION_SIZE"),
        "long-raw": (reference.section(reference.RAW, 1, 50, bytes(51)), 50, "SECTION_SIZE"),
        "nested-sparse": (reference.planes(2, [nested, nested]), 800, "SECTION"),
        "nested-planes": (
            reference.section(reference.PLANES, 2, 50, reference.planes(2, [half, half]) * 2),
            100,
            "SECTION",
        ),
        "uneven-planes": (reference.planes(2, [half, reference.raw(bytes(49))]), 100, "SECTION"),
        "single-of-two-bits": (*coded(alphabet(2, 0)), "CODE"),
        "no-code": (*coded(alphabet(0, 0)), "CODE"),
        "thirteen-bits": (*coded(alphabet(*range(1, 14), 13) + stream, 4), "CODE"),
        "too-many-codes": (*coded(alphabet(1, 1, 1) + stream, 4), "CODE"),
        "too-few-codes": (*coded(alphabet(1, 2) + stream, 4), "CODE"),
        "length-below-zero": (*coded(bytes([1, 0b011, 1, 5]) + stream, 4), "CODE"),
        "bits-behind-lengths": (*coded(bytes([1, 0b10000001, 1, 5]) + stream, 4), "CODE"),
        "cut-lengths": (*coded(bytes([255]) + bytes(31)), "SECTION_SIZE"),
        "cut-length": (*coded(bytes([2, 0b10111111])), "SECTION_SIZE"),
        "cut-dictionary": (*coded(alphabet(0, 1, 0)[:-1]), "SECTION_SIZE"),
        "no-nonzeros": (gaps(0, 3, [255] * 3, 0), 900, "GAPS"),
        "fewer-gaps": (gaps(3, 3, [0, 0, 255], 3), 900, "GAPS"),
        "more-gaps": (gaps(2, 3, [0, 0, 0], 2), 900, "GAPS"),
        "gap-over-the-end": (gaps(1, 4, [255, 255, 255, 135], 1), 900, "GAPS"),
        "long-gap-over-the-end": (gaps(1, 5, [0, 255, 255, 255, 255], 1), 900, "GAPS"),
    }
    return {
        name: (SMALL + payload, 4000 + raw_bytes, rule)
        for name, (payload, raw_bytes, rule) in found.items()
    }


def broken() -> Iterator[tuple[str, Tensor, str]]:
    """Tensors with the payloads of `refused`, and the rule that each breaks."""
    for name, (payload, raw_bytes, rule) in refused().items():
        yield name, Tensor(name, "uint8", (raw_bytes,), 1, payload), rule


def _raw_bytes(payload: bytes) -> int:
    total, at = 0, 0
    while at < len(payload):
        word_bytes, words, body_bytes = (
            payload[at + 1],
            int.from_bytes(payload[at + 4 : at + 8], "little"),
            int.from_bytes(payload[at + 8 : at + 12], "little"),
        )
        total += words * word_bytes
        at += 12 + body_bytes
    return total


def _huffman(random: Random, words: int, word_bytes: int, symbols: int) -> bytes:
    dictionary = _dictionary(random, word_bytes, symbols)
    lengths = _lengths(random, symbols)
    likely = 2.0 ** -np.array(lengths) if symbols > 1 else None
    drawn = [dictionary[symbol] for symbol in random.choice(symbols, words, p=likely)]
    return reference.huffman(drawn, lengths, dictionary)


def _longest(random: Random, words: int, longest: int) -> bytes:
    """A section whose words nearly all have the longest codes that there are."""
    short = [*range(1, longest - 7)]
    halved = len(short)  # each takes the place of two of the longest, so that there are 256
    lengths = short + [longest - 1] * halved + [longest] * (256 - len(short) - halved)
    dictionary = [bytes([symbol]) for symbol in range(256)]
    drawn = [dictionary[symbol] for symbol in random.integers(2 * len(short), 256, words)]
    return reference.huffman(drawn, lengths, dictionary)


def _sparse(random: Random, words: int, word_bytes: int, symbols: int, density: float) -> bytes:
    dictionary = _dictionary(random, word_bytes, symbols)
    drawn = [bytes(word_bytes)] * words
    for place in np.flatnonzero(random.random(words) < density):
        drawn[place] = dictionary[int(random.integers(symbols))]
    drawn[-1] = dictionary[0]
    gaps = sorted(set(reference.split_zeros(drawn)[0]))
    gap_lengths = [0] * (gaps[-1] + 1)
    for gap, length in zip(gaps, _lengths(random, len(gaps)), strict=True):
        gap_lengths[gap] = length
    return reference.sparse(drawn, gap_lengths, _lengths(random, symbols), dictionary)


def _dictionary(random: Random, word_bytes: int, symbols: int) -> list[bytes]:
    """Different words other than zero; all 256 bytes in order where that many are asked for."""
    if word_bytes == 1:
        first = 0 if symbols == 256 else 1
        chosen = first + np.sort(random.permutation(256 - first)[:symbols])
        return [bytes([word]) for word in chosen]
    return [bytes([symbol]) + random.bytes(word_bytes - 2) + b"\1" for symbol in range(symbols)]


def _lengths(random: Random, symbols: int) -> list[int]:
    """Code lengths of some complete code: leaves of a tree split at random."""
    lengths = [0 if symbols > 1 else 1]
    while len(lengths) < symbols:
        at = int(random.choice([k for k, length in enumerate(lengths) if length < LONGEST]))
        lengths[at] += 1
        lengths.insert(at, lengths[at])
    return lengths


def files(random: Random) -> Iterator[tuple[str, list[Tensor]]]:
    """Weights files as lists of tensors: every payload alone, then with others, then raw ones."""
    coded = payloads(random)
    for name, (payload, raw_bytes) in coded.items():
        if len(payload) < raw_bytes:
            yield name, [Tensor(name, "uint8", (raw_bytes,), 1, payload)]
    tensors = [
        Tensor(f"{dtype}-{name}", dtype, (raw_bytes // np.dtype(dtype).itemsize,), 1, payload)
        for dtype, (name, (payload, raw_bytes)) in zip(
            ["float32", "int16", "int64", "bool", "int32", "int8", "uint8"],
            [
                ("planes", coded["planes-4"]),
                ("pairs", coded["sparse-2"]),
                ("wide", coded["sparse-8"]),
                ("mask", coded["sparse-1"]),
                ("words", coded["sparse-16"]),
                ("single", coded["huffman-1-single"]),
                ("plain", coded["huffman-1-deep"]),
            ],
            strict=True,
        )
        if len(payload) < raw_bytes
    ]
    raw = [Tensor("raw", "int8", (2, 3), 0, random.bytes(6)), Tensor("void", "int16", (0,), 0, b"")]
    yield "mixed", sorted(tensors + raw, key=lambda tensor: tensor.name)
    yield "raw", raw


def encoded(random: Random) -> Iterator[tuple[str, bytes]]:
    """Weights files as the encoder writes them: every dtype, dense, sparse, shared and noisy."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.epw"
        for name, arrays in _arrays(random):
            write_weights(path, arrays, coded=True)
            yield name, path.read_bytes()


def _arrays(random: Random) -> Iterator[tuple[str, dict[str, Array]]]:
    for dtype in DTYPES:
        high = 2 if dtype == "bool" else 5
        few = random.integers(0, high, (40, 20))
        sparse = few * (random.random((40, 20)) < 0.1)
        arrays = {"few": few.astype(dtype), "söme": sparse.astype(dtype)}
        yield f"encoded-{dtype}", {**arrays, "shared": arrays["few"].copy()}
    normal = random.normal(size=(30, 30))
    yield "encoded-normal", {"w": normal.astype(np.float32), "b": np.zeros(500, np.float32)}
    yield "encoded-int8", {"w": np.clip(normal * 20, -127, 127).astype(np.int8)}
    codebook = random.normal(size=(4, 4)).astype(np.float32)
    yield "encoded-vectors", {"w": codebook[random.integers(0, 4, 200)]}


def corpus(random: Random) -> Sequence[tuple[str, bytes]]:
    """All weights files, by name."""
    built = [(name, reference.weights_file(tensors)) for name, tensors in files(random)]
    wrong = [(name, reference.weights_file([tensor])) for name, tensor, _ in broken()]
    return [*built, *wrong, *encoded(random)]
