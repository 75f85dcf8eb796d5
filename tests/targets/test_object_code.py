"""Whether an executable holds an object's code: linked, changed, another one, on every target."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from edgepress.targets.object_code import holds
from tests.targets.tiny import need

SOURCE = """
extern int outside(int);
int table[4] = {1, 2, 3, 4};
int kernel(const int *x, int n)
{
    int total = 0;
    for (int i = 0; i < n; i++) total += x[i] * table[i & 3] + outside(x[i]);
    for (int i = 0; i < n; i++) total ^= x[i] * STEP;
    return total;
}
"""
REST = """
int kernel(const int *, int);
int outside(int x) { return x + 1; }
int main(void) { int x[2] = {1, 2}; return kernel(x, 2); }
"""
COMPILERS = ["gcc", "aarch64-linux-gnu-gcc", "arm-linux-gnueabihf-gcc"]


def compiled(compiler: str, folder: Path, step: int = 7) -> tuple[bytes, bytes]:
    """An object with relocations, and an executable that it is linked into."""
    need(compiler, f"gcc-{compiler.removesuffix('-gcc')}" if "-" in compiler else "gcc")
    (folder / "kernel.c").write_text(SOURCE)
    (folder / "rest.c").write_text(REST)
    options = ["-O2", "-fPIC", f"-DSTEP={step}"]
    for arguments in (
        [*options, "-c", "kernel.c"],
        ["-O2", "-pie", "-s", "rest.c", "kernel.o", "-o", "model"],
    ):
        subprocess.run([compiler, *arguments], cwd=folder, check=True)
    return (folder / "model").read_bytes(), (folder / "kernel.o").read_bytes()


@pytest.mark.parametrize("compiler", COMPILERS)
def test_linked_code_is_found(compiler: str, tmp_path: Path) -> None:
    assert holds(*compiled(compiler, tmp_path))


@pytest.mark.parametrize("compiler", COMPILERS)
def test_other_code_is_not(compiler: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    executable, _ = compiled(compiler, tmp_path / "a", step=7)
    _, other = compiled(compiler, tmp_path / "b", step=1001)
    assert not holds(executable, other)


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    executable, code = compiled("gcc", tmp_path)
    ret = code.index(0xC3, 64)  # `ret`, the first in the code
    assert not holds(executable, code[:ret] + bytes([0xCB]) + code[ret + 1 :])


@pytest.mark.parametrize("data", [b"", b"hello", b"\x7fELF\2\2" + bytes(100)])
def test_what_is_no_object_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="ELF"):
        holds(b"anything", data)


def test_an_object_without_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.c").write_text("int x = 1;")
    subprocess.run(["gcc", "-c", "data.c"], cwd=tmp_path, check=True)
    with pytest.raises(ValueError, match="code"):
        holds(b"anything", (tmp_path / "data.o").read_bytes())
