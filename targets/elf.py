"""Sections of an ELF file, little-endian, of 32 or 64 bits: what every target has.

Layout: System V gABI, chapter 4, "Sections".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """A line of the table of sections.

    Attributes:
        kind: `SHT_…`.
        flags: `SHF_…`.
        offset: in the file.
        size: in bytes.
        link: number of a section that belongs to it, such as the one with its strings.
        info: of relocations: the number of the section that they are for.
    """

    kind: int
    flags: int
    offset: int
    size: int
    link: int
    info: int


def sections(data: bytes) -> tuple[list[Section], bool]:
    """Return the sections of an ELF file, and whether it is one of 64 bits.

    Raises:
        ValueError: it is no such file, or cut short.
    """
    if data[:4] != b"\x7fELF" or data[4:5] not in (b"\1", b"\2") or data[5:6] != b"\1":
        raise ValueError("the object is no little-endian ELF file")
    wide = data[4] == 2
    place, at = ("<Q", 40) if wide else ("<I", 32)
    form = "<IIQQQQIIQQ" if wide else "<10I"
    try:
        (table,) = struct.unpack_from(place, data, at)
        size, count = struct.unpack_from("<HH", data, at + (18 if wide else 14))
        rows = [struct.unpack_from(form, data, table + n * size) for n in range(count)]
    except (struct.error, OverflowError) as error:
        raise ValueError(f"the ELF file is cut short: {error}") from None
    return [
        Section(kind, flags, offset, length, link, info)
        for _, kind, flags, _, offset, length, link, info, _, _ in rows
    ], wide
