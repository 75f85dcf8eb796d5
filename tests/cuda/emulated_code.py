"""Compiles kernels for the emulator: CUDA C++ by g++, with the headers of `emulator/`."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import edgepress.targets.cuda.kernels
from edgepress.targets.cuda.kernel import CudaKernel
from tests.targets.tiny import need

COMPILER = "g++"
EMULATOR = Path(__file__).parent / "emulator"
KERNELS = Path(edgepress.targets.cuda.kernels.__path__[0])
SCHEDULER_NAME = "libemulator.so"
_PARTS = ("scheduler", "warp", "stacks", "copies", "workers", "checks")
# Integers depend on every bit of a float: nothing may be fused. CUDA C++ may alias as it likes.
_FLAGS = ("-std=gnu++17", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-march=native")
_CHECKS = ("-g1", "-fsanitize=thread,alignment,bounds", "--param=tsan-instrument-func-entry-exit=0")
_KERNELS_PER_FILE = 8


def compile_emulated(kernels: Sequence[CudaKernel], folder: Path, *, checked: bool = False) -> Path:
    """Compile kernels into a shared library; returns its path in `folder`.

    Where it is checked, `emulator/checks.cpp` sees every load and store.

    It has `const char *run_NAME(void **arguments, const unsigned grid[3], const unsigned block[3],
    unsigned shared_bytes)` for each, which returns null or what went wrong, and `const unsigned
    parameters_NAME`. It needs `libemulator.so`, which is put beside it: each such library has a
    scheduler of its own, which it finds by its path.

    Raises:
        RuntimeError: with the compiler's messages.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scheduler = Path(shutil.copy(compiled_scheduler(), folder))
    return _compile_all(kernels, folder, scheduler, checked=checked)


def _compile_all(
    kernels: Sequence[CudaKernel], folder: Path, scheduler: Path, *, checked: bool
) -> Path:
    text = [emulated_source(kernels[at : at + _KERNELS_PER_FILE]) for at in _starts(kernels)]
    folder.mkdir(parents=True, exist_ok=True)
    copy_headers(folder / "include")
    sources = []
    for number, source in enumerate(text):
        sources.append(folder / f"kernels_{number}.cpp")
        sources[-1].write_text(source, encoding="utf-8")
    library = folder / "libkernels.so"
    flags = ["-O2", "-w", "-fvisibility=hidden", "-fno-gnu-unique"]
    flags += [f"-I{folder / 'include'}", "-include", "emulator.h"]
    flags += _CHECKS if checked else ()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(functools.partial(_compile, flags=flags), sources))
    link = (*map(str, objects), str(scheduler.resolve()), "-Wl,-z,defs")
    _run((COMPILER, "-shared", "-o", str(library), *link))
    return library


def emulated_source(kernels: Sequence[CudaKernel]) -> str:
    """Return the C++ of some kernels; each has a namespace of its own for its helpers."""
    headers = dict.fromkeys(header for kernel in kernels for header in kernel.headers)
    lines = [f'#include "{header}"' for header in headers]
    for kernel in kernels:
        lines += [f"namespace space_{kernel.name} {{", f'#line 1 "{kernel.name}.cu"', kernel.source]
        lines += ["}", f"EMULATED_KERNEL(space_{kernel.name}, {kernel.name})"]
    return "\n".join(lines) + "\n"


def copy_headers(folder: Path) -> None:
    """Put the headers of kernels into a folder, the emulator's instead of those that it replaces.

    A header that includes another finds it in its own folder, whatever the include path says.
    """
    folder.mkdir(exist_ok=True)
    for header in (*KERNELS.glob("*.cuh"), *EMULATOR.glob("*.cuh"), EMULATOR / "emulator.h"):
        shutil.copy(header, folder)


def library_of(kernels: Sequence[CudaKernel], *, checked: bool = False) -> Path:
    """Compile kernels, the same text once per process; all share one scheduler."""
    key = f"{checked} {emulated_source(kernels)}"
    if key not in _LIBRARIES:
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        folder = _folder() / digest
        _LIBRARIES[key] = _compile_all(kernels, folder, compiled_scheduler(), checked=checked)
    return _LIBRARIES[key]


def source_line(library: Path, address: str) -> str:
    """Return file:line of an address in a checked library."""
    command = ("addr2line", "-e", str(library), address)
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return Path(found.partition(" ")[0].strip()).name or address


@functools.cache
def _folder() -> Path:
    """Return a folder of this process, which is deleted at its end."""
    folder = tempfile.TemporaryDirectory(prefix="emulated-", ignore_cleanup_errors=True)
    _KEPT.append(folder)
    return Path(folder.name)


_LIBRARIES: dict[str, Path] = {}
_KEPT: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def compiled_scheduler() -> Path:
    """Compile what all emulated kernels share, once per process; skip the test without g++."""
    need(COMPILER, COMPILER)
    folder = _folder() / "scheduler"
    folder.mkdir()
    sources = []
    for name in _PARTS:
        sources.append(folder / f"{name}.cpp")
        shutil.copy(EMULATOR / f"{name}.cpp", folder)
    for header in EMULATOR.glob("*.h"):
        shutil.copy(header, folder)
    flags = ("-O3", "-Wall", "-Wextra", "-Werror")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(functools.partial(_compile, flags=flags), sources))
    library = folder / SCHEDULER_NAME
    link = (*map(str, objects), "-pthread", "-Wl,-z,defs")
    _run((COMPILER, "-shared", "-o", str(library), *link))
    return library


def _starts(kernels: Sequence[CudaKernel]) -> range:
    return range(0, len(kernels), _KERNELS_PER_FILE)


def _compile(source: Path, flags: Sequence[str]) -> Path:
    target = source.with_suffix(".o")
    _run((COMPILER, *_FLAGS, *flags, "-c", str(source), "-o", str(target)))
    return target


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
