"""SHA256SUMS beside the executable: `model --selftest` refuses what is not as it was deployed."""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.targets.base import Target
from edgepress.targets.export import copy_runtime
from tests.targets.test_runtime_c import SANITIZERS, build
from tests.targets.tiny import ARMV7, HOST, PI4, export_tiny, need, run

PREFIXES = """
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "sha256.h"
/* Print the digest of every prefix of stdin. The same comes out however it is cut in three. */
int main(void)
{
    static uint8_t bytes[400];
    size_t count = fread(bytes, 1, sizeof bytes, stdin);
    for (size_t length = 0; length <= count; length++) {
        uint8_t digest[SHA256_BYTES], again[SHA256_BYTES];
        struct sha256 hash;
        sha256_begin(&hash);
        sha256_update(&hash, bytes, length);
        sha256_end(&hash, digest);
        for (size_t first = 0; first <= length; first += 1 + first / 8)
            for (size_t second = first; second <= length; second += 13) {
                sha256_begin(&hash);
                sha256_update(&hash, bytes, first);
                sha256_update(&hash, bytes + first, second - first);
                sha256_update(&hash, bytes + second, length - second);
                sha256_end(&hash, again);
                assert(memcmp(digest, again, sizeof digest) == 0);
            }
        for (int i = 0; i < SHA256_BYTES; i++)
            printf("%02x", digest[i]);
        puts("");
    }
    return 0;
}
"""
LONG = """
#include <stdio.h>
#include "sha256.h"
/* Print the digest of stdin. */
int main(void)
{
    static uint8_t bytes[100003], digest[SHA256_BYTES];
    struct sha256 hash;
    sha256_begin(&hash);
    for (size_t got; (got = fread(bytes, 1, sizeof bytes, stdin)) > 0;)
        sha256_update(&hash, bytes, got);
    sha256_end(&hash, digest);
    for (int i = 0; i < SHA256_BYTES; i++)
        printf("%02x", digest[i]);
    return 0;
}
"""
# FIPS 180-2, appendix B, and the NIST's "million a"
EXAMPLES = {
    b"abc": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq": (
        "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"
    ),
    b"a" * 1_000_000: "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0",
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sha256")
    copy_runtime(folder)
    return folder


def test_every_length_up_to_six_blocks_however_it_comes(sources: Path) -> None:
    program = build(sources, "prefixes", PREFIXES, "sha256.c", flags=SANITIZERS)
    data = np.random.default_rng(0).bytes(400)
    result = subprocess.run([program], input=data, capture_output=True, check=True)
    wanted = [hashlib.sha256(data[:length]).hexdigest() for length in range(401)]
    assert result.stdout.decode().splitlines() == wanted


def test_the_examples_of_the_standard(sources: Path) -> None:
    program = build(sources, "long", LONG, "sha256.c", flags=SANITIZERS)
    for data, wanted in EXAMPLES.items():
        result = subprocess.run([program], input=data, capture_output=True, check=True)
        assert result.stdout.decode() == wanted


def test_lengths_that_32_bits_do_not_hold(sources: Path) -> None:
    """Of 512 MiB the number of bits; zeros, so that neither side needs them all at once."""
    program = build(sources, "large", LONG, "sha256.c", flags=["-O2"])
    megabyte, wanted = bytes(1 << 20), hashlib.sha256()
    with subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(513):
            process.stdin.write(megabyte)
            wanted.update(megabyte)
        process.stdin.close()
        assert process.stdout.read().decode() == wanted.hexdigest()


def seal(folder: Path) -> Path:
    """List all files of a folder, as deployment does."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    lines = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    lines.sort(key=lambda line: line[66:])
    (folder / "SHA256SUMS").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("host") / "bundle"
    return seal(export_tiny(HOST, folder).folder)


@pytest.fixture
def deployed(sealed: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(sealed, tmp_path / "bundle"))


def selftest(folder: Path, executable: str = "model") -> tuple[int, str]:
    """Exit code and message; what is refused prints no result."""
    command = [str(folder / executable), "--selftest"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.stdout == "") == (result.returncode == 2)
    return result.returncode, result.stderr


def test_it_says_how_many_files_were_checked(deployed: Path) -> None:
    document = json.loads(run([str(deployed / "model"), "--selftest"]))
    assert (document["passed"], document["files"], document["samples"]) == (True, 8, 2)
    (deployed / "SHA256SUMS").unlink()
    document = json.loads(run([str(deployed / "model"), "--selftest"]))
    assert (document["passed"], document["files"], document["samples"]) == (True, 0, 2)


def test_the_tool_of_every_board_reads_the_same_list(sealed: Path) -> None:
    run(["sha256sum", "-c", "--strict", "--quiet", "SHA256SUMS"], sealed)


def change(path: Path, at: int = 0, by: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= by
    path.write_bytes(data)


def to_link(path: Path) -> None:
    shutil.move(path, path.with_name("moved"))
    path.symlink_to("moved")


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


BROKEN_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed": (change, "has other bytes than SHA256SUMS says"),
    "empty": (lambda path: path.write_bytes(b""), "has other bytes than SHA256SUMS says"),
    "missing": (Path.unlink, "which SHA256SUMS lists: No such file or directory"),
    "link": (to_link, "which SHA256SUMS lists: not a plain file"),
    "folder": (to_folder, "which SHA256SUMS lists: not a plain file"),
    "pipe": (to_pipe, "which SHA256SUMS lists: not a plain file"),
}


@pytest.mark.parametrize("damage", BROKEN_FILES)
@pytest.mark.parametrize("name", ["weights.epw", "golden/1.out", "libmodel.so"])
def test_a_file_that_is_not_as_deployed(deployed: Path, name: str, damage: str) -> None:
    apply, words = BROKEN_FILES[damage]
    apply(deployed / name)
    code, said = selftest(deployed)
    assert code == 2
    assert said.startswith(f"model: {deployed / name}")
    assert said.count("\n") == 1
    assert words in said
    assert said.endswith("Deploy the bundle again.\n")


HEX = "0123456789abcdef" * 4


def lines(change: Callable[[list[str]], object]) -> Callable[[str], str]:
    def apply(text: str) -> str:
        changed = text.splitlines(keepends=True)
        change(changed)
        return "".join(changed)

    return apply


NOT_A_LINE = "line 1 is no SHA-256 with a plain relative path"
BROKEN_LISTS: dict[str, tuple[Callable[[str], str], str]] = {
    "empty": (lambda _: "", "does not list model"),
    "model is not listed": (
        lines(lambda all_: all_.remove(next(x for x in all_ if x.endswith("  model\n")))),
        "does not list model",
    ),
    "weights are not listed": (lines(lambda all_: all_.pop()), "does not list weights.epw"),
    "cut at the end": (lambda text: text[:-1], "line 8 is no SHA-256"),
    "absolute path": (lambda text: f"{HEX}  /etc/passwd\n{text}", NOT_A_LINE),
    "outside": (lambda text: f"{HEX}  ../model\n{text}", NOT_A_LINE),
    "outside in the middle": (lambda text: f"{HEX}  golden/../../model\n{text}", NOT_A_LINE),
    "a parent at the end": (lambda text: f"{HEX}  golden/..\n{text}", NOT_A_LINE),
    "the folder itself": (lambda text: f"{HEX}  .\n{text}", NOT_A_LINE),
    "twice a slash": (lambda text: f"{HEX}  golden//0.in\n{text}", NOT_A_LINE),
    "a slash at the end": (lambda text: f"{HEX}  golden/\n{text}", NOT_A_LINE),
    "no path": (lambda text: f"{HEX}  \n{text}", NOT_A_LINE),
    "a space": (lambda text: f"{HEX}  a b\n{text}", NOT_A_LINE),
    "a control character": (lambda text: f"{HEX}  a\x1b[2J\n{text}", NOT_A_LINE),
    "escaped": (lambda text: f"\\{HEX}  a\\nb\n{text}", NOT_A_LINE),
    "line breaks of another system": (lambda text: text.replace("\n", "\r\n"), NOT_A_LINE),
    "an empty line": (lambda text: f"\n{text}", NOT_A_LINE),
    "a comment": (lambda text: f"# files\n{text}", NOT_A_LINE),
    "one space": (lambda text: text.replace("  ", " ", 1), NOT_A_LINE),
    "binary mode": (lambda text: text.replace("  ", " *", 1), NOT_A_LINE),
    "capitals": (lambda text: text[:64].upper() + text[64:], NOT_A_LINE),
    "too few digits": (lambda text: text[1:], NOT_A_LINE),
    "too many digits": (lambda text: f"0{text}", NOT_A_LINE),
    "a zero byte": (lambda text: f"{text[:70]}\0{text[70:]}", NOT_A_LINE),
    "too long a path": (lambda text: f"{HEX}  {'a' * 256}\n{text}", NOT_A_LINE),
    "a long path": (lambda text: f"{HEX}  {'a' * 255}\n{text}", "which SHA256SUMS lists: No such"),
    "in another order": (lines(lambda all_: all_.reverse()), "is not in order"),
    "a file twice": (lines(lambda all_: all_.insert(0, all_[0])), "is not in order"),
    "another file's hash": (lambda text: HEX + text[64:], "has other bytes than SHA256SUMS says"),
}


@pytest.mark.parametrize("damage", BROKEN_LISTS)
def test_a_list_that_is_not_as_written(deployed: Path, damage: str) -> None:
    apply, words = BROKEN_LISTS[damage]
    path = deployed / "SHA256SUMS"
    path.write_bytes(apply(path.read_text()).encode())
    code, said = selftest(deployed)
    assert (code, words in said) == (2, True), said
    assert said.endswith("Deploy the bundle again.\n")
    assert "\x1b" not in said


def test_a_list_that_cannot_be_read(deployed: Path) -> None:
    to_folder(deployed / "SHA256SUMS")
    assert selftest(deployed) == (
        2,
        f"model: {deployed}/SHA256SUMS: Is a directory. Deploy the bundle again.\n",
    )


def test_other_commands_do_not_need_the_list(deployed: Path) -> None:
    change(deployed / "SHA256SUMS")
    assert json.loads(run([str(deployed / "model"), "--info"]))["supported"]


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_no_changed_byte_is_let_through(sealed: Path, data: st.DataObject) -> None:
    """The program that checks is a copy under another name: `model` may be the damaged file."""
    checker = sealed / "checker"
    if not checker.exists():
        shutil.copy2(sealed / "model", checker)
    names = sorted(path.relative_to(sealed).as_posix() for path in sealed.rglob("*.*"))
    names += ["SHA256SUMS", "SHA256SUMS", "model"]
    path = sealed / data.draw(st.sampled_from(names))
    before = path.read_bytes()
    at, by = data.draw(st.integers(0, len(before) - 1)), data.draw(st.integers(1, 255))
    try:
        change(path, at, by)
        code, said = selftest(sealed, "checker")
    finally:
        path.write_bytes(before)
    assert code == 2
    assert said.endswith("Deploy the bundle again.\n")
    assert selftest(sealed, "checker")[0] == 0


@pytest.mark.parametrize("target", [PI4, ARMV7], ids=lambda target: target.name)
def test_boards_check_alike(target: Target, tmp_path: Path) -> None:
    need(target.emulator, "qemu-user")
    folder = seal(export_tiny(target, tmp_path / "bundle").folder)
    command = [target.emulator, "-cpu", target.emulator_cpu, "-L", target.sysroot]
    command += [str(folder / "model"), "--selftest"]
    assert json.loads(run(command))["files"] == 8
    change(folder / "libmodel.so", at=20_000)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert f"{folder}/libmodel.so has other bytes than SHA256SUMS says" in result.stderr
