"""Which glibc an executable needs: on a board whose glibc is older it does not start.

An executable lists, per library, the versions of the symbols that it was linked with, such as
`GLIBC_2.34`.
Layout: Linux Standard Base, core, "Symbol Versioning"; `.gnu.version_r`.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import TypeAlias

from edgepress.targets.base import Target
from edgepress.targets.elf import sections

Version: TypeAlias = tuple[int, ...]
"""Of glibc: `(2, 34)`."""

_VERSIONS_NEEDED = 0x6FFFFFFE  # the kind of the section `.gnu.version_r`
_LINK_S = 60
# A feature that has a name instead of a number, and the version that it came with.
_OTHERS: dict[str, Version] = {"GLIBC_ABI_DT_RELR": (2, 36)}
# What every bundle calls whose versions changed since glibc 2.17. The C23 functions that glibc 2.38
# renamed come with _GNU_SOURCE.
_PROGRAM = r"""
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
static void *nothing(void *data) { return data; }
int main(int argc, char **argv)
{
    pthread_t thread;
    struct stat facts;
    int number = 0;
    if (pthread_create(&thread, NULL, nothing, NULL) != 0 || fstat(0, &facts) != 0)
        return 1;
    if (argc > 1 && sscanf(argv[1], "%d", &number) != 1)
        return (int)strtol(argv[1], NULL, 10);
    return pthread_join(thread, NULL);
}
"""


def needed_glibc(executable: Path) -> Version | None:
    """Return the oldest glibc that an executable or library runs with; None where it uses none.

    Raises:
        ValueError: it is no little-endian ELF file, or a broken one.
        OSError: it cannot be read.
    """
    data = executable.read_bytes()
    found, _ = sections(data)
    needed: list[Version] = []
    try:
        for section in found:
            if section.kind == _VERSIONS_NEEDED:
                needed += _versions(data, section.offset, section.info, found[section.link].offset)
    except (struct.error, IndexError, OverflowError):
        raise ValueError(f"{executable} is a broken ELF file") from None
    return max(needed, default=None)


def linked_glibc(target: Target) -> Version | None:
    """Return the oldest glibc that bundles of a target run with, when this machine builds them.

    A bundle may need a later one still, for a function of the mathematical library that its
    kernels call; `needed_glibc` tells. None where the target's compiler is not there or fails.
    """
    return _linked(target.compiler, target.compiler_flags)


def version_text(version: Version) -> str:
    """Write a version as users know it.

    >>> version_text((2, 34))
    '2.34'
    """
    return ".".join(map(str, version))


def parse_version(text: str) -> Version | None:
    """Read a version; None where the text is none.

    >>> parse_version("2.36")
    (2, 36)
    """
    if not re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,4}){0,3}", text):
        return None
    return tuple(int(part) for part in text.split("."))


@cache
def _linked(compiler: str, flags: tuple[str, ...]) -> Version | None:
    if shutil.which(compiler) is None:
        return None
    with tempfile.TemporaryDirectory(prefix="edgepress-") as temporary:
        folder = Path(temporary)
        (folder / "main.c").write_text(_PROGRAM, encoding="utf-8")
        command = [compiler, *flags, "-pthread", "main.c", "-o", "main"]
        try:
            subprocess.run(command, cwd=folder, capture_output=True, timeout=_LINK_S, check=True)
            return needed_glibc(folder / "main")
        except (OSError, ValueError, subprocess.SubprocessError):
            return None


def _versions(data: bytes, at: int, libraries: int, strings: int) -> list[Version]:
    """Versions of glibc in a `.gnu.version_r` that begins at an offset and has so many libraries.

    Entries of libraries and of their versions are chains: each has the distance to the next.
    """
    found = []
    for _ in range(libraries):
        _, count, _, first, following = struct.unpack_from("<HHIII", data, at)
        entry = at + first
        for _ in range(count):
            _, _, _, name, step = struct.unpack_from("<IHHII", data, entry)
            begin = strings + name
            text = data[begin : data.find(b"\0", begin)].decode("ascii", "replace")
            prefix, _, number = text.partition("_")
            version = _OTHERS.get(text) or parse_version(number)
            if prefix == "GLIBC" and version is not None:
                found.append(version)
            if step == 0:
                break
            entry += step
        if following == 0:
            break
        at += following
    return found
