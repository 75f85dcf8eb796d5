"""Which glibc executables need, compared with what readelf prints and with real executables."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.targets.base import Target
from edgepress.targets.glibc_needs import linked_glibc, needed_glibc, parse_version
from tests.targets.tiny import ARMV7, HOST, PI4, export_tiny, need, run


def printed_by_readelf(executable: Path) -> tuple[int, ...]:
    """Highest version of glibc that readelf names among those needed."""
    need("readelf", "binutils")
    command = ["readelf", "--version-info", "--wide", str(executable)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, _, needs = text.partition("Version needs section")
    found = re.findall(r"Name: GLIBC_([0-9.]+)", needs)
    return max(tuple(map(int, version.split("."))) for version in found)


@pytest.mark.parametrize("target", [HOST, PI4, ARMV7], ids=lambda target: target.name)
def test_of_bundles(target: Target, tmp_path: Path) -> None:
    need(target.compiler, target.compiler_package)
    folder = export_tiny(target, tmp_path / "bundle").folder
    for name in ("model", "libmodel.so"):
        assert needed_glibc(folder / name) == printed_by_readelf(folder / name)
    assert linked_glibc(target) == needed_glibc(folder / "model")


def test_of_a_program_of_this_machine() -> None:
    executable = Path(sys.executable).resolve()
    assert needed_glibc(executable) == printed_by_readelf(executable)


def test_a_static_program_needs_none(tmp_path: Path) -> None:
    (tmp_path / "main.c").write_text("int main(void) { return 0; }\n")
    run(["gcc", "-static", "main.c", "-o", "main"], tmp_path)
    assert needed_glibc(tmp_path / "main") is None


def test_relative_relocations_need_the_glibc_that_knows_them(tmp_path: Path) -> None:
    names = b"\0GLIBC_2.17\0GLIBC_ABI_DT_RELR\0GCC_9.9\0GLIBC_PRIVATE\0"
    assert needed_glibc(elf(tmp_path / "a", names, [1, 12, 30, 38])) == (2, 36)
    assert needed_glibc(elf(tmp_path / "b", names, [1, 30, 38])) == (2, 17)


def elf(path: Path, strings: bytes, names: list[int], *, step: int = 16) -> Path:
    """Write an ELF file that needs versions, each an offset into strings, of one library."""
    needs = struct.pack("<HHIII", 1, len(names), 1, 16, 0)
    for name in names:
        needs += struct.pack("<IHHII", 0, 0, 2, name, 0 if name is names[-1] else step)
    at = 64 + len(needs)
    table = at + len(strings)
    header = b"\x7fELF\2\1\1" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 2, 183, 1, 0, 0, table, 0,
                                                       64, 0, 0, 64, 2, 0)  # fmt: skip
    rows = struct.pack("<IIQQQQIIQQ", 0, 0x6FFFFFFE, 0, 0, 64, len(needs), 1, 1, 4, 0)
    rows += struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, at, len(strings), 0, 0, 1, 0)
    path.write_bytes(header + needs + strings + rows)
    return path


@pytest.mark.parametrize("data", [b"", b"#!/bin/sh\n", b"\x7fELF", b"\x7fELF\2\2" + bytes(100)])
def test_what_is_no_executable_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(data)
    with pytest.raises(ValueError, match="ELF"):
        needed_glibc(tmp_path / "model")


LIBRARY, ENTRY, ROW = 64, 80, 64 + 48 + 24  # where things lie in what `elf` writes for two names


@pytest.mark.parametrize(
    ("at", "form", "value"),
    [
        (ROW + 24, "<Q", 10**6),  # the versions lie behind the end of the file
        (ROW + 24, "<Q", 2**63),
        (ROW + 40, "<I", 9),  # their strings are in a section that there is not
        (LIBRARY + 8, "<I", 10**6),
        (ENTRY + 12, "<I", 10**6),
    ],
)
def test_a_broken_table_is_refused(at: int, form: str, value: int, tmp_path: Path) -> None:
    path = elf(tmp_path / "model", b"\0GLIBC_2.17\0GLIBC_2.4\0".ljust(24, b"\0"), [1, 12])
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, at, value)
    path.write_bytes(data)
    assert struct.unpack_from("<II", data, ROW) == (0, 0x6FFFFFFE)
    with pytest.raises(ValueError, match="broken ELF"):
        needed_glibc(path)


def test_a_table_of_sections_far_away_is_refused(tmp_path: Path) -> None:
    path = elf(tmp_path / "model", b"\0", [0])
    data = bytearray(path.read_bytes())
    struct.pack_into("<Q", data, 40, 2**63)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="the ELF file is cut short"):
        needed_glibc(path)


def test_chains_that_say_that_they_are_endless_end(tmp_path: Path) -> None:
    path = elf(tmp_path / "model", b"\0GLIBC_2.17\0", [1])
    data = bytearray(path.read_bytes())
    struct.pack_into("<H", data, LIBRARY + 2, 0xFFFF)
    struct.pack_into("<I", data, len(data) - 2 * 64 + 44, 0xFFFFFFFF)
    path.write_bytes(data)
    assert needed_glibc(path) == (2, 17)


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_broken_executables_end_in_an_answer_or_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = elf(tmp_path_factory.getbasetemp() / "broken", b"\0GLIBC_2.17\0GLIBC_2.4\0", [1, 12])
    broken = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(broken[: data.draw(st.integers(0, len(broken)))])
    with contextlib.suppress(ValueError):
        needed_glibc(path)


def test_a_compiler_that_is_missing_or_fails_tells_nothing() -> None:
    assert linked_glibc(dataclasses.replace(HOST, compiler="absent-gcc")) is None
    assert linked_glibc(dataclasses.replace(HOST, compiler_flags=("-no-such-flag",))) is None


def test_a_compiler_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = linked_glibc(HOST)
    monkeypatch.setattr("subprocess.run", lambda *_a, **_k: pytest.fail("again"))
    assert linked_glibc(HOST) == first


@pytest.mark.parametrize("text", ["", "2.", "2.x", "PRIVATE", "2.34\n", "٢", "2.34.1.1.1"])
def test_what_is_no_version(text: str) -> None:
    assert parse_version(text) is None
