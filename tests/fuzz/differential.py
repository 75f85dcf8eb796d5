"""Gives broken weights files to the Python, the C and the reference, which must agree on them."""

from __future__ import annotations

import os
import struct
import subprocess
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edgepress.targets.weights import Rule, WeightsError, read_weights
from tests.fuzz import reference, seeds
from tests.fuzz.mutations import broken_header, broken_payload
from tests.fuzz.reference import Tensor, weights_file

LARGEST_PAYLOAD_BYTES = 1000  # the reference takes a symbol at a time
# A decoder may read gaps and values in step, so that of these two either may come first.
SAME = {Rule.GAPS.name: Rule.STREAM.name}
# C takes memory for all tensors before it decodes them. A forged size may be too much for it, where
# Python sees first that the payload does not fill the tensor.
NO_MEMORY = "no memory"


class Case(NamedTuple):
    """A weights file, what Python says of it, and the reference where it can."""

    path: Path
    by_python: str
    by_reference: str | None


def write_cases(folder: Path, random: np.random.Generator, count: int) -> list[Case]:
    """Write whole files and `count` broken ones into a folder, and let Python read them.

    Raises:
        Exception: anything but a `WeightsError` that comes out of `read_weights` is a finding.
    """
    found = []
    for index, (data, by_reference) in enumerate(_files(random, count)):
        path = folder / f"{index}.epw"
        path.write_bytes(data)
        try:
            found.append(Case(path, python_verdict(path), by_reference))
        except Exception as error:
            error.add_note(f"read_weights failed on {path}")
            raise
    return found


def _files(random: np.random.Generator, count: int) -> Iterator[tuple[bytes, str | None]]:
    """Whole and broken files, with the reference's verdict where only a payload is broken."""
    files = [
        tensors
        for _, tensors in seeds.files(random)
        if all(len(tensor.payload) <= LARGEST_PAYLOAD_BYTES for tensor in tensors)
    ]
    for tensors in files:
        yield weights_file(tensors), reference_verdict(tensors)
    for _, tensor, rule in seeds.broken():
        if reference_verdict([tensor]) != rule:
            raise AssertionError(f"the reference does not say {rule} of {tensor.name}")
        yield weights_file([tensor]), rule
    for _, data in seeds.encoded(random):
        yield data, None
    for _ in range(count):
        tensors = files[random.integers(len(files))]
        if random.random() < 0.05:
            flipped = bytearray(weights_file(tensors))
            flipped[random.integers(len(flipped))] ^= 1 << int(random.integers(8))
            yield bytes(flipped), None
        elif random.random() < 0.3 or not any(tensor.codec for tensor in tensors):
            yield broken_header(tensors, random), None
        else:
            changed = broken_payload(tensors, random)
            yield weights_file(changed), reference_verdict(changed)


def coded_payloads(data: bytes) -> dict[str, bytes]:
    """The coded payloads of a valid file, by their tensors' names."""
    payloads = {}
    at = 40
    for _ in range(int.from_bytes(data[12:16], "little")):
        name_bytes, _, rank, codec, offset, size, _, _, _ = struct.unpack_from(
            "<HBBIQQQII", data, at
        )
        name_at = at + 40 + 8 * rank
        if codec == 1:
            payloads[data[name_at : name_at + name_bytes].decode()] = data[offset : offset + size]
        at = name_at + -(-name_bytes // 8) * 8
    return payloads


def reference_verdict(tensors: Sequence[Tensor]) -> str:
    """`python_verdict` of a file of these tensors, by the specification's own words."""
    for tensor in tensors:
        if tensor.codec == 1 and not 0 < len(tensor.payload) < tensor.raw_bytes:
            return Rule.ENCODED_SIZE.name
    sums = ""
    for tensor in tensors:
        raw = tensor.payload
        if tensor.codec == 1:
            try:
                raw = reference.decode(tensor.payload, tensor.raw_bytes)
            except reference.Refused as refused:
                return str(refused)
        sums += f"{zlib.crc32(raw):08x} "
    return sums + "accepted"


def python_verdict(path: Path) -> str:
    """The CRC-32 of every tensor, or the name of the rule that the file breaks."""
    try:
        weights = read_weights(path)
    except WeightsError as error:
        return error.rule.name
    except MemoryError:
        return NO_MEMORY
    return "".join(f"{zlib.crc32(array.tobytes()):08x} " for array in weights.values()) + "accepted"


def c_verdicts(command: Sequence[str], paths: Sequence[Path]) -> list[str]:
    """The same from `verdicts.c`, which `command` runs."""
    done = subprocess.run(
        command,
        input="\n".join(map(str, paths)),
        env={**os.environ, "ASAN_OPTIONS": "allocator_may_return_null=1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stderr}")
    rules = {rule.value: rule.name for rule in Rule}
    said = []
    for path, line in zip(paths, done.stdout.splitlines(), strict=True):
        words = line.removeprefix(f"{path}: ").partition(". Copy")[0]
        said.append(NO_MEMORY if words.startswith(NO_MEMORY) else rules.get(words, line))
    return said


def compare(command: Sequence[str], cases: Sequence[Case]) -> Counter[str]:
    """Count the verdicts on some files.

    Raises:
        AssertionError: two readers differ, or the C program ends otherwise than it should.
    """
    found: Counter[str] = Counter()
    said = c_verdicts(command, [case.path for case in cases])
    for case, by_c in zip(cases, said, strict=True):
        verdicts = {
            SAME.get(verdict, verdict)
            for verdict in (case.by_python, by_c, case.by_reference)
            if verdict and verdict != NO_MEMORY
        }
        one_accepts = NO_MEMORY in (case.by_python, by_c) and any(
            verdict.endswith("accepted") for verdict in verdicts
        )
        if len(verdicts) > 1 or one_accepts:
            raise AssertionError(
                f"{case.path}: Python says {case.by_python}, C {by_c}, "
                f"the reference {case.by_reference}"
            )
        found[case.by_python.rpartition(" ")[2]] += 1
    return found
