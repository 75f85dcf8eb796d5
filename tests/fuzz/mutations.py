"""Breaks weights files at random, behind checksums that are right."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from tests.fuzz.reference import Tensor, signed, weights_file

Random = np.random.Generator
NUMBERS = (0, 1, 2, 3, 4, 7, 8, 11, 12, 13, 15, 16, 63, 64, 127, 128, 254, 255)
LARGE = (0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF)
MOST_CHANGES = 3


def broken_payload(tensors: Sequence[Tensor], random: Random) -> list[Tensor]:
    """Change one coded tensor, mostly its payload; sizes and checksums will fit again."""
    changed = list(tensors)
    index = int(random.choice([at for at, tensor in enumerate(tensors) if tensor.codec]))
    tensor = tensors[index]
    if random.random() < 0.1:
        first = max(0, tensor.shape[0] + int(random.choice([-1000, -64, -2, -1, 1, 2, 64, 1000])))
        changed[index] = tensor._replace(shape=(first, *tensor.shape[1:]))
        return changed
    payload = tensor.payload
    for _ in range(_changes(random)):
        payload = change(payload, random)
    if random.random() < 0.5:
        payload = one_section(payload)
    changed[index] = tensor._replace(payload=payload)
    return changed


def one_section(payload: bytes) -> bytes:
    """Make the first section as long as the payload, so that what is inside is looked at."""
    return payload[:8] + struct.pack("<I", max(0, len(payload) - 12)) + payload[12:]


def broken_header(tensors: Sequence[Tensor], random: Random) -> bytes:
    """Change the header or table of a weights file; its checksum will fit again."""
    data = weights_file(tensors)
    (header_bytes,) = struct.unpack_from("<Q", data, 16)
    header, payloads = data[:header_bytes], data[header_bytes:]
    for _ in range(_changes(random)):
        at = int(random.integers(8, len(header)))
        header = header[:at] + change(header[at:], random, same_size=random.random() < 0.9)
    return signed(header + payloads)


def _changes(random: Random) -> int:
    """Mostly one: where one thing is broken, all readers must name the same rule."""
    return 1 if random.random() < 0.7 else int(random.integers(2, MOST_CHANGES + 1))


def change(data: bytes, random: Random, *, same_size: bool = False) -> bytes:
    """Change one thing, mostly near the beginning, where the sizes and the code lengths are."""
    at = int(random.integers(len(data) + 1))
    if random.random() < 0.5:
        at = min(at, int(random.integers(40)))
    kind = random.integers(4 if same_size else 8)
    if kind == 0:
        return (
            data[:at]
            + bytes(byte ^ 1 << int(random.integers(8)) for byte in data[at : at + 1])
            + data[at + 1 :]
        )
    if kind == 1:
        return data[:at] + bytes([int(random.choice(NUMBERS))]) + data[at + 1 :]
    if kind == 2:
        at = at // 4 * 4
        number = int(random.choice(NUMBERS + LARGE))
        return data[:at] + struct.pack("<I", number) + data[at + 4 :]
    if kind == 3:
        at = at // 4 * 4
        old = int.from_bytes(data[at : at + 4], "little")
        number = (old + int(random.integers(-2, 3))) % 2**32
        return data[:at] + struct.pack("<I", number) + data[at + 4 :]
    count = int(random.integers(1, 9))
    if kind == 4:
        return data[:at] + data[at + count :]
    if kind == 5:
        return data[:at] + random.bytes(count) + data[at:]
    if kind == 6:
        return data[: max(1, at)]
    return data + bytes(count if random.random() < 0.5 else 1)
