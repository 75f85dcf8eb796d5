"""The weights file, `weights.epw`. Its bytes are specified in `docs/format.md`.

`runtime/weights.c` reads the same format on the board and refuses the same files with the same
words.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgepress.targets.base import TargetError
from edgepress.targets.program import DTYPES, Array
from edgepress.targets.sections import read_sections
from edgepress.targets.weight_coding import Coded, as_raw, encode
from edgepress.targets.weight_rules import BrokenRule, Rule

__all__ = ["Rule", "WeightsError", "header_checksum", "read_weights", "write_weights"]

MAGIC = b"\x89EPW\r\n\x1a\n"
VERSION = 1
ALIGNMENT_BYTES = 64
MAX_RANK = 8
CODECS = ("raw", "coded")

_HEADER = struct.Struct("<8sIIQQII")  # magic, version, tensors, header, file, checksum, reserved
_ENTRY = struct.Struct(
    "<HBBIQQQII"
)  # name, dtype, rank, codec, offset, encoded, raw, crc, reserved
_CHECKSUM_AT = 32
HEADER_BYTES = _HEADER.size  # without the table


class WeightsError(TargetError):
    """A weights file breaks a rule of the format.

    Attributes:
        rule: the rule that it breaks.
    """

    def __init__(self, path: Path, rule: Rule, detail: str = "") -> None:
        self.rule = rule
        where = f" ({detail})" if detail else ""
        super().__init__(
            f"{path}: {rule.value}{where}. Build the bundle again, or copy it again as a whole."
        )


class _Entry(NamedTuple):
    """One row of the tensor table."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    codec: int
    offset: int
    encoded_bytes: int
    raw_bytes: int
    checksum: int

    @property
    def payload(self) -> tuple[int, ...]:
        """What two entries have in common that share one payload."""
        return self[3:]


def write_weights(
    path: Path, constants: Mapping[str, Array], *, coded: bool = False
) -> list[dict[str, Any]]:
    """Write constants in the order of their names; equal bytes are stored once.

    Args:
        path: file to write, replaced where it exists.
        constants: name to array of a dtype of `DTYPES` and at most `MAX_RANK` axes.
        coded: whether to code each constant as small as the format allows, or to store all raw.

    Returns:
        Per constant, in the file's order: name, dtype, shape, codec, coding, word_bytes, sections,
        raw_bytes, encoded_bytes, entropy_bytes, offset and sha256 (of the raw bytes). `Coded` says
        what these mean. Constants that share a payload have the same offset.

    Raises:
        ValueError: a name is empty or too long, or an array has another dtype or too many axes.
        OSError: the file cannot be written.
    """
    names = sorted(constants, key=lambda name: name.encode())
    raws = [_raw_bytes(name, constants[name]) for name in names]
    header_bytes = _HEADER.size + sum(
        entry_bytes(len(name.encode()), constants[name].ndim) for name in names
    )
    payloads: dict[bytes, tuple[Coded, int]] = {}
    end = header_bytes
    for name, raw in zip(names, raws, strict=True):
        if raw not in payloads:
            dtype = constants[name].dtype
            payload = encode(raw, dtype.itemsize) if coded else as_raw(raw, dtype.itemsize)
            offset = _start(end, CODECS.index(payload.codec))
            payloads[raw] = (payload, offset)
            end = offset + len(payload.payload)

    table = b"".join(
        _pack_entry(name, constants[name], *payloads[raw], len(raw))
        for name, raw in zip(names, raws, strict=True)
    )
    header = _HEADER.pack(MAGIC, VERSION, len(names), header_bytes, end, 0, 0) + table
    checksum = struct.pack("<I", zlib.crc32(header))
    with path.open("wb") as file:
        file.write(header[:_CHECKSUM_AT] + checksum + header[_CHECKSUM_AT + 4 :])
        for payload, offset in payloads.values():
            file.write(bytes(offset - file.tell()))
            file.write(payload.payload)
    return [
        {
            "name": name,
            "dtype": str(constants[name].dtype),
            "shape": list(constants[name].shape),
            "codec": payload.codec,
            "coding": payload.coding,
            "word_bytes": payload.word_bytes,
            "sections": payload.sections,
            "raw_bytes": len(raw),
            "encoded_bytes": len(payload.payload),
            "entropy_bytes": round(payload.entropy_bytes, 1),
            "offset": offset,
            "sha256": hashlib.sha256(raw).hexdigest(),
        }
        for name, raw in zip(names, raws, strict=True)
        for payload, offset in [payloads[raw]]
    ]


def read_weights(path: Path) -> dict[str, Array]:
    """Read, check and decode every byte of a weights file.

    Raises:
        WeightsError: the file breaks a rule of `docs/format.md`; `.rule` says which.
        OSError: the file cannot be read.
    """
    data = path.read_bytes()
    entries = _read_table(path, data)
    constants: dict[str, Array] = {}
    for entry in entries:
        payload = data[entry.offset : entry.offset + entry.encoded_bytes]
        if zlib.crc32(payload) != entry.checksum:
            raise WeightsError(path, Rule.CHECKSUM, entry.name)
        if CODECS[entry.codec] == "coded":
            try:
                payload = read_sections(payload, entry.raw_bytes)
            except BrokenRule as error:
                detail = f"{entry.name}: {error.detail}" if error.detail else entry.name
                raise WeightsError(path, error.rule, detail) from error
        constants[entry.name] = np.frombuffer(payload, _little_endian(entry.dtype)).reshape(
            entry.shape
        )
    return constants


def header_checksum(path: Path) -> int:
    """Return the header's checksum, which tells weights files apart; the file must be valid."""
    with path.open("rb") as file:
        return int(_HEADER.unpack(file.read(_HEADER.size))[5])


def _raw_bytes(name: str, array: Array) -> bytes:
    if not 0 < len(name.encode()) < 1 << 16:
        raise ValueError(f"a constant's name must have 1 to 65535 bytes, not {len(name.encode())}")
    if str(array.dtype) not in DTYPES:
        raise ValueError(f"constant {name!r}: {array.dtype} is not one of {', '.join(DTYPES)}")
    if array.ndim > MAX_RANK:
        raise ValueError(f"constant {name!r} has {array.ndim} axes, more than {MAX_RANK}")
    return array.astype(_little_endian(str(array.dtype)), copy=False).tobytes()


def _little_endian(dtype: str) -> np.dtype[Any]:
    return np.dtype(dtype).newbyteorder("<")


def _start(end: int, codec: int) -> int:
    """Where a payload begins after one that ends at `end`; raw ones are mapped, so aligned."""
    return end if codec else -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def entry_bytes(name_bytes: int, rank: int) -> int:
    """Return the size of a tensor's row in the table, from that of its name and its axes."""
    return _ENTRY.size + 8 * rank + -(-name_bytes // 8) * 8


def _pack_entry(name: str, array: Array, coded: Coded, offset: int, raw_bytes: int) -> bytes:
    encoded_name = name.encode()
    fixed = _ENTRY.pack(
        len(encoded_name),
        DTYPES.index(str(array.dtype)),
        array.ndim,
        CODECS.index(coded.codec),
        offset,
        len(coded.payload),
        raw_bytes,
        zlib.crc32(coded.payload),
        0,
    )
    shape = struct.pack(f"<{array.ndim}Q", *array.shape)
    return fixed + shape + encoded_name + bytes(-len(encoded_name) % 8)


def _read_table(path: Path, data: bytes) -> list[_Entry]:
    """Check everything but the payloads' checksums, in the order in which `weights.c` does."""
    if data[: len(MAGIC)] != MAGIC[: len(data)] or not data:
        raise WeightsError(path, Rule.MAGIC)
    if len(data) < _HEADER.size:
        raise WeightsError(path, Rule.TRUNCATED, f"{len(data)} bytes")
    _, version, count, header_bytes, file_bytes, checksum, reserved = _HEADER.unpack_from(data)
    if version != VERSION:
        raise WeightsError(path, Rule.VERSION, f"version {version}, not {VERSION}")
    if len(data) != file_bytes:
        rule = Rule.TRUNCATED if len(data) < file_bytes else Rule.TRAILING
        raise WeightsError(path, rule, f"{len(data)} bytes instead of {file_bytes}")
    if not _HEADER.size <= header_bytes <= len(data):
        raise WeightsError(path, Rule.HEADER_SIZE, f"{header_bytes} bytes")
    header = data[:_CHECKSUM_AT] + bytes(4) + data[_CHECKSUM_AT + 4 : header_bytes]
    if zlib.crc32(header) != checksum:
        raise WeightsError(path, Rule.HEADER_CHECKSUM)
    if reserved:
        raise WeightsError(path, Rule.RESERVED, "header")
    if count > (header_bytes - _HEADER.size) // _ENTRY.size:
        raise WeightsError(path, Rule.HEADER_SIZE, f"too small for {count} tensors")

    entries: list[_Entry] = []
    previous_name = b""
    payloads: set[tuple[int, ...]] = set()
    at, end = _HEADER.size, header_bytes
    for index in range(count):
        entry, name, size = _unpack_entry(path, data[at:header_bytes], f"tensor {index}")
        if name <= previous_name:
            raise WeightsError(path, Rule.NAME, f"tensor {index}")
        previous_name = name
        at += size
        if entry.payload not in payloads:
            if (
                entry.offset != _start(end, entry.codec)
                or entry.encoded_bytes > len(data) - entry.offset
            ):
                raise WeightsError(path, Rule.OFFSET, entry.name)
            if any(data[end : entry.offset]):
                raise WeightsError(path, Rule.RESERVED, f"padding before {entry.name}")
            payloads.add(entry.payload)
            end = entry.offset + entry.encoded_bytes
        entries.append(entry)
    if at != header_bytes:
        raise WeightsError(path, Rule.HEADER_SIZE, f"{at} bytes used of {header_bytes}")
    if end != file_bytes:
        raise WeightsError(path, Rule.TRAILING, f"{end} bytes used of {file_bytes}")
    return entries


def _unpack_entry(path: Path, data: bytes, where: str) -> tuple[_Entry, bytes, int]:
    """One entry from the rest of the table: entry, the name's bytes, the entry's size."""
    if len(data) < _ENTRY.size:
        raise WeightsError(path, Rule.HEADER_SIZE, where)
    name_bytes, dtype, rank, codec, offset, encoded, raw, checksum, reserved = _ENTRY.unpack_from(
        data
    )
    size = entry_bytes(name_bytes, rank)
    if rank > MAX_RANK:
        raise WeightsError(path, Rule.SHAPE, where)
    if len(data) < size:
        raise WeightsError(path, Rule.HEADER_SIZE, where)
    shape = struct.unpack_from(f"<{rank}Q", data, _ENTRY.size)
    name_at = _ENTRY.size + 8 * rank
    name = data[name_at : name_at + name_bytes]
    if reserved or any(data[name_at + name_bytes : size]):
        raise WeightsError(path, Rule.RESERVED, where)
    if dtype >= len(DTYPES):
        raise WeightsError(path, Rule.DTYPE, f"{where}: {dtype}")
    elements_bytes = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if max(shape, default=0) >= 1 << 63 or elements_bytes >= 1 << 63:
        raise WeightsError(path, Rule.SHAPE, where)
    if raw != elements_bytes:
        raise WeightsError(path, Rule.RAW_SIZE, where)
    if codec >= len(CODECS):
        raise WeightsError(path, Rule.CODEC, f"{where}: {codec}")
    if not 0 < encoded < raw if codec else encoded != raw:
        raise WeightsError(path, Rule.ENCODED_SIZE, where)
    try:
        text = name.decode()
    except UnicodeDecodeError:
        raise WeightsError(path, Rule.NAME, where) from None
    return _Entry(text, DTYPES[dtype], shape, codec, offset, encoded, raw, checksum), name, size
