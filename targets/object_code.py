"""Whether an executable holds the machine code of an object file.

The linker copies an object's code as it is and fills in addresses, at the places that the object
lists as relocations. So both are compared everywhere else. Layout: System V gABI, chapter 4,
"Relocation".
"""

from __future__ import annotations

import struct
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from edgepress.targets.elf import sections

_Bytes: TypeAlias = npt.NDArray[np.uint8]
_Mask: TypeAlias = npt.NDArray[np.bool_]
_NOTHING_ON_DISK, _REL, _RELA = 8, 9, 4
_EXECUTABLE = 4  # the flag of a section that holds instructions
_AROUND_BYTES = (4, 8)  # before and after a relocation: linkers relax the instruction it is in
_LEAST_ANCHOR_BYTES = 16


def holds(executable: bytes, object_code: bytes) -> bool:
    """Tell whether the code of an object's `.text` lies in an executable, addresses aside.

    Raises:
        ValueError: the object is no ELF file of little-endian byte order, or has no code.
    """
    text, fixed = _text(object_code)
    start, length = _longest_run(fixed)
    if length < _LEAST_ANCHOR_BYTES:
        raise ValueError("the object has too little code without addresses to be looked for")
    anchor = text[start : start + length].tobytes()
    haystack = np.frombuffer(executable, np.uint8)
    at = executable.find(anchor)
    while at >= 0:
        first = at - start
        window = haystack[first : first + len(text)] if first >= 0 else haystack[:0]
        if len(window) == len(text) and bool(np.all((window == text) | ~fixed)):
            return True
        at = executable.find(anchor, at + 1)
    return False


def _text(data: bytes) -> tuple[_Bytes, _Mask]:
    """Return the bytes of the largest section of code, and which of them no linker changes."""
    found, wide = sections(data)
    codes = [s for s in found if s.flags & _EXECUTABLE and s.kind != _NOTHING_ON_DISK]
    if not codes:
        raise ValueError("the object has no code")
    code = max(codes, key=lambda section: section.size)
    text = np.frombuffer(data, np.uint8, code.size, code.offset)
    fixed = np.ones(code.size, np.bool_)
    for section in found:
        if section.kind not in (_REL, _RELA) or found[section.info] is not code:
            continue
        entry = {(True, _RELA): 24, (True, _REL): 16, (False, _RELA): 12, (False, _REL): 8}[
            wide, section.kind
        ]
        for at in range(section.offset, section.offset + section.size, entry):
            (place,) = struct.unpack_from("<Q" if wide else "<I", data, at)
            before, after = _AROUND_BYTES
            fixed[max(place - before, 0) : place + after] = False
    return text, fixed


def _longest_run(fixed: _Mask) -> tuple[int, int]:
    """Return start and length of the longest run of bytes that no linker changes."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], fixed.astype(np.int8), [0]])))
    starts, ends = edges[::2], edges[1::2]
    if not len(starts):
        return 0, 0
    longest = int(np.argmax(ends - starts))
    return int(starts[longest]), int(ends[longest] - starts[longest])
