"""decode.c by itself: the same bytes and the same verdicts as the Python, on every architecture."""

import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgepress.targets.base import Target
from edgepress.targets.export import copy_runtime
from edgepress.targets.huffman import BLOCK, Bytes, code_lengths
from edgepress.targets.sections import (
    Alphabet,
    gaps_between,
    huffman_section,
    planes_section,
    raw_section,
    read_sections,
    sparse_section,
)
from edgepress.targets.weight_coding import encode
from edgepress.targets.weight_rules import BrokenRule, Rule
from tests.targets.test_runtime_c import SANITIZERS, WARNINGS
from tests.targets.test_sections import BROKEN_SECTIONS, GOLDEN, bytes_of
from tests.targets.tiny import ARMV7, HOST, PI4, need, run

Case = tuple[bytes, int]  # a payload, and the size of its tensor in bytes

# Every payload and tensor has memory of just its size, so that the sanitizer sees what is outside.
# Decoding runs on a thread with little stack.
DECODE = r"""
#define _POSIX_C_SOURCE 200809L
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "decode.h"

static uint64_t sizes[2];
static uint8_t *payload, *tensor;

static void *decode_on_thread(void *broken)
{
    *(const char **)broken = decode(payload, sizes[0], tensor, sizes[1]);
    return NULL;
}

int main(void)
{
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    size_t stack_bytes = STACK_BYTES < PTHREAD_STACK_MIN ? PTHREAD_STACK_MIN : STACK_BYTES;
    if (pthread_attr_setstacksize(&attributes, stack_bytes) != 0)
        return 1;
    while (fread(sizes, sizeof sizes, 1, stdin) == 1) {
        pthread_t thread;
        const char *broken = NULL;
        payload = malloc(sizes[0]);
        tensor = malloc(sizes[1]);
        if (sizes[0] > 0 && fread(payload, sizes[0], 1, stdin) != 1)
            return 2;
        if (pthread_create(&thread, &attributes, decode_on_thread, &broken) != 0)
            return 3;
        pthread_join(thread, NULL);
        uint32_t length = broken != NULL ? (uint32_t)strlen(broken) : 0;
        fwrite(&length, sizeof length, 1, stdout);
        fwrite(broken != NULL ? (const void *)broken : tensor, 1,
               broken != NULL ? length : sizes[1], stdout);
        free(payload);
        free(tensor);
    }
    return 0;
}
"""


def build(folder: Path, target: Target, *flags: str) -> list[str]:
    """The command that runs the program above, made for a target."""
    need(target.compiler, target.compiler_package)
    copy_runtime(folder)
    (folder / "main.c").write_text(DECODE)
    command = [target.compiler, *WARNINGS, *flags, "main.c", "decode.c", "-o", "main"]
    run(command, folder)
    if not target.emulator:
        return [str(folder / "main")]
    need(target.emulator, "qemu-user")
    return [target.emulator, "-L", target.sysroot, str(folder / "main")]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build(tmp_path_factory.mktemp("decode"), HOST, "-DSTACK_BYTES=1048576", *SANITIZERS)


def answers(command: Sequence[str], cases: Sequence[Case]) -> list[bytes | Rule]:
    """What the C makes of the payloads: the tensor's bytes, or the rule that is broken."""
    stdin = b"".join(struct.pack("<QQ", len(data), size) + data for data, size in cases)
    result = subprocess.run(command, input=stdin, capture_output=True, timeout=120, check=False)
    assert (result.returncode, result.stderr.decode()) == (0, "")
    found: list[bytes | Rule] = []
    at = 0
    for _, size in cases:
        (length,) = struct.unpack_from("<I", result.stdout, at)
        text = result.stdout[at + 4 : at + 4 + (length or size)]
        found.append(Rule(text.decode()) if length else text)
        at += 4 + len(text)
    assert at == len(result.stdout)
    return found


def python_answer(payload: bytes, size: int) -> bytes | Rule:
    try:
        return read_sections(payload, size)
    except BrokenRule as error:
        return error.rule


def symbols_of(random: np.random.Generator, count: int, distinct: int, skew: float) -> Bytes:
    """Symbols of which the first ones are the more frequent the greater the skew is."""
    weights = np.exp(-skew * np.arange(distinct))
    return random.choice(distinct, count, p=weights / weights.sum()).astype(np.uint8)


def alphabet_of(
    random: np.random.Generator, symbols: Bytes, distinct: int, bits: int, word_bytes: int
) -> Alphabet:
    """The code of these symbols, and random words for them; none where bytes need none."""
    lengths = code_lengths(np.bincount(symbols, minlength=distinct), bits)
    if word_bytes == 1 and distinct == 256:
        return Alphabet(lengths)
    words = random.integers(0, 256, (distinct, word_bytes), np.uint8)
    words[:, 0] |= 1  # no zeros, which sparse sections do not have
    return Alphabet(lengths, words)


def section_of(random: np.random.Generator, kind: str, words: int, word_bytes: int) -> bytes:
    """A section of any content."""
    distinct = int(random.choice([1, 2, 3, 17, 255, 256]))
    skew = float(random.choice([0, 0.02, 0.1, 1]))
    bits = int(random.choice([8, 11, 12]))
    if kind == "raw":
        return raw_section(random.integers(0, 256, words * word_bytes, np.uint8))
    if kind == "planes":
        kinds = random.choice(["raw", "huffman"], word_bytes)
        planes = [section_of(random, plane, words, 1) for plane in kinds]
        return planes_section(word_bytes, words, planes)
    if kind == "huffman":
        symbols = symbols_of(random, words, distinct, skew)
        alphabet = alphabet_of(random, symbols, distinct, bits, word_bytes)
        return huffman_section(symbols, alphabet, word_bytes)
    density = float(random.choice([0.001, 0.03, 0.5, 1]))
    places = np.flatnonzero(random.random(words) < density)
    places = places if places.size else np.array([words - 1])
    gaps = gaps_between(places)
    symbols = symbols_of(random, places.size, distinct, skew)
    alphabet = alphabet_of(random, symbols, distinct, bits, word_bytes)
    gap_alphabet = Alphabet(code_lengths(np.bincount(gaps), bits))
    return sparse_section(words, gaps, gap_alphabet, symbols, alphabet, word_bytes)


COUNTS = [1, 2, 3, 4, 5, 19, 20, 21, 79, 81, 479, 480, 481, 961, 5000]
COUNTS += [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3]


def case_of(seed: int, kinds: Sequence[str], counts: Sequence[int] = COUNTS) -> Case:
    """A payload with a section of each of these kinds."""
    random = np.random.default_rng(seed)
    payload, size = b"", 0
    for kind in kinds:
        words = int(random.choice(counts))
        sizes = [2, 4, 8] if kind == "planes" else [1, 1, 2, 4, 8, 16, 32, 64]
        word_bytes = int(random.choice(sizes)) if kind != "raw" else 1
        payload += section_of(random, kind, words, word_bytes)
        size += words * word_bytes
    return payload, size


KINDS = st.sampled_from(["raw", "huffman", "sparse", "planes"])
CASES = st.builds(case_of, st.integers(0, 1 << 32), st.lists(KINDS, min_size=1, max_size=3))


@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cases=st.lists(CASES, min_size=5, max_size=30))
def test_tensors_are_those_of_python(sanitized: list[str], cases: list[Case]) -> None:
    found = answers(sanitized, cases)
    assert found == [read_sections(*case) for case in cases]


@pytest.mark.parametrize("target", [HOST, PI4, ARMV7], ids=lambda target: target.name)
def test_all_architectures_and_a_small_stack(tmp_path: Path, target: Target) -> None:
    """64 KB of stack have room for the 24 KB that decode needs, and for what libc keeps there."""
    command = build(tmp_path, target, "-DSTACK_BYTES=65536")
    random = np.random.default_rng(5)
    kinds = ["raw", "huffman", "sparse", "planes"]
    cases = [case_of(seed, [kinds[seed % 4]]) for seed in range(120)]
    cases += [case_of(seed, list(random.choice(kinds, 3))) for seed in range(20)]
    cases += [(payload, size) for _, _, payload, size in BROKEN_SECTIONS]
    assert answers(command, cases) == [python_answer(*case) for case in cases]


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int8", "int16", "int32", "int64", "float32"])
def test_what_the_encoder_chooses(sanitized: list[str], dtype: str) -> None:
    random = np.random.default_rng(0)
    normal = random.normal(0, 20, 30_000)
    tensors = [normal, np.round(normal / 20), normal * (random.random(30_000) < 0.1)]
    tensors += [np.full(1000, 7), np.tile(random.normal(0, 20, (64, 4)), (100, 1)).ravel()]
    raws = [tensor.astype(dtype).tobytes() for tensor in tensors]
    coded = [encode(raw, np.dtype(dtype).itemsize) for raw in raws]
    cases = [
        (coding.payload, len(raw))
        for coding, raw in zip(coded, raws, strict=True)
        if coding.codec == "coded"
    ]
    assert len(cases) >= 3
    assert answers(sanitized, cases) == [
        raw for coding, raw in zip(coded, raws, strict=True) if coding.codec == "coded"
    ]


@pytest.mark.parametrize("longest", [8, 11, 12])
def test_long_codes_in_a_row(sanitized: list[str], longest: int) -> None:
    """Symbols that the code is not made for: no buffer may hold too few bits for the next ones."""
    lengths = np.array([*range(1, longest), longest, longest], np.uint8)
    words = np.arange(lengths.size, dtype=np.uint8)[:, None]
    random = np.random.default_rng(0)
    rare = random.integers(lengths.size - 3, lengths.size, 20_000).astype(np.uint8)
    mixed = random.integers(0, lengths.size, 20_000).astype(np.uint8)
    tensors = [rare, mixed, np.full(20_000, lengths.size - 1, np.uint8)]
    cases = [(huffman_section(s, Alphabet(lengths, words), 1), s.size) for s in tensors]
    assert answers(sanitized, cases) == [symbols.tobytes() for symbols in tensors]


def test_sparse_words_that_do_not_come_in_fours(sanitized: list[str]) -> None:
    """Long gaps have no words, so words are asked for in any number, beginning with any part."""
    random = np.random.default_rng(0)
    words = np.where(random.random(400_000) < 0.006, random.integers(1, 100, 400_000), 0)
    words = words.astype(np.uint8)
    places = np.flatnonzero(words)
    gaps = gaps_between(places)
    assert (gaps == 255).sum() > 500
    gap_alphabet = Alphabet(code_lengths(np.bincount(gaps)))
    lengths = code_lengths(np.bincount(words[places], minlength=100))
    alphabet = Alphabet(lengths, np.arange(100, dtype=np.uint8)[:, None])
    payload = sparse_section(words.size, gaps, gap_alphabet, words[places], alphabet, 1)
    assert answers(sanitized, [(payload, words.size)]) == [words.tobytes()]


def test_rules_at_their_limits(sanitized: list[str]) -> None:
    too_long = huffman_section(
        bytes_of([0, 1]), Alphabet(bytes_of([1, 1]), bytes_of([7, 8])[:, None]), 1
    )
    # Lengths 1, 1 and 13: one more than 0 is 10, the same 0, and 13 is 111 with 1011.
    too_long = too_long[:12] + b"\2\x79\3" + too_long[14:16] + b"\0" + too_long[16:]
    one = Alphabet(bytes_of([1]), bytes_of([9])[:, None])
    gap_alphabet = Alphabet(bytes_of([1, 0, 0, 1]))
    to_the_end = sparse_section(5, bytes_of([0, 3]), gap_alphabet, bytes_of([0, 0]), one, 1)
    beyond = to_the_end[:4] + b"\4" + to_the_end[5:]
    cases = [(too_long, 2), (to_the_end, 5), (beyond, 4)]
    assert answers(sanitized, cases) == [Rule.CODE, bytes([9, 0, 0, 0, 9]), Rule.GAPS]
    assert [python_answer(*case) for case in cases] == answers(sanitized, cases)


def test_ten_million_elements(tmp_path: Path) -> None:
    command = build(tmp_path, HOST, "-DSTACK_BYTES=65536")
    symbols = symbols_of(np.random.default_rng(0), 10_000_000, 100, 0.05)
    alphabet = Alphabet(code_lengths(np.bincount(symbols)), np.arange(100, dtype=np.uint8)[:, None])
    payload = huffman_section(symbols, alphabet, 1)
    assert answers(command, [(payload, symbols.size)]) == [symbols.tobytes()]


def test_every_broken_rule_is_named(sanitized: list[str]) -> None:
    cases = [(payload, size) for _, _, payload, size in BROKEN_SECTIONS]
    assert answers(sanitized, cases) == [rule for _, rule, _, _ in BROKEN_SECTIONS]


def test_cut_payloads(sanitized: list[str]) -> None:
    small = [(payload, len(tensor)) for payload, tensor in GOLDEN.values()]
    small += [case_of(seed, [kind], [5, 90]) for seed in range(9) for kind in ("huffman", "sparse")]
    cases = [
        (payload[:cut], size)
        for payload, size in small
        for cut in range(0, len(payload), 1 + len(payload) // 200)
    ]
    found = answers(sanitized, cases)
    assert found == [python_answer(*case) for case in cases]
    assert all(isinstance(answer, Rule) for answer in found)


def test_changed_payloads(sanitized: list[str]) -> None:
    """The same rule as in Python, or the same wrong bytes, whatever is changed.

    Python looks at all gaps before it adds them up, C at a few at a time.
    """
    random = np.random.default_rng(0)
    cases = []
    for seed in range(1600):
        kinds = ["huffman", "sparse", "planes", "huffman"]
        payload, size = case_of(seed % 100, [kinds[seed % 4]], [3, 90, 600])
        changed = bytearray(payload)
        # Half of the changes hit what comes before the streams.
        end = min(len(changed), 60) if seed % 2 else len(changed)
        for at in random.integers(0, end, random.integers(1, 4)):
            changed[at] ^= 1 << int(random.integers(8))
        cases.append((bytes(changed), size + int(random.choice([0, 0, 0, 1, -1]))))
    found = answers(sanitized, cases)
    wanted = [python_answer(*case) for case in cases]
    for mine, other in zip(found, wanted, strict=True):
        assert mine == other or {mine, other} == {Rule.GAPS, Rule.STREAM}
    rules = {answer for answer in found if isinstance(answer, Rule)}
    assert rules == {rule for _, rule, _, _ in BROKEN_SECTIONS}


def test_it_allocates_nothing_and_is_small(tmp_path: Path) -> None:
    copy_runtime(tmp_path)
    run(["gcc", *WARNINGS, "-Wframe-larger-than=20480", "-c", "decode.c"], tmp_path)
    undefined = run(["nm", "--undefined-only", "--format=posix", "decode.o"], tmp_path)
    assert {line.split()[0] for line in undefined.splitlines()} <= {"memcpy", "memset"}
    lines = (tmp_path / "decode.c").read_text() + (tmp_path / "decode.h").read_text()
    assert len(lines.splitlines()) <= 500
