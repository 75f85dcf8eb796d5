"""Finds a compiler of CUDA C++. It needs neither a GPU nor a driver.

The first of these that is there:

1. the nvcc that the environment variable EDGEPRESS_NVCC names, by its path or as PATH finds it;
2. NVRTC, NVIDIA's compiler as a library, of the Python package that `edgepress[cuda]` brings;
3. an nvcc on PATH, below CUDA_HOME, CUDA_PATH or /usr/local/cuda, or of a Python package.

NVRTC comes before an nvcc that happens to be installed: the package is pinned, so that bundles are
the same bytes everywhere; it needs no C++ compiler of the host; and it starts in 0.02 s where nvcc
takes 0.4 s. The pinned version is CUDA 12.6, that of JetPack 6. NVIDIA promises that a driver
loads machine code of its own major version and of earlier ones; that of CUDA 13 needs driver 580.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Literal

from edgepress.targets.base import CompileFailed

NVCC_VARIABLE = "EDGEPRESS_NVCC"
INSTALL = "pip install 'edgepress[cuda]'"
NVRTC_PACKAGES = ("nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc")
NVCC_PACKAGES = ("nvidia-cuda-nvcc", "nvidia-cuda-nvcc-cu12")

_FOLDER_VARIABLES = ("CUDA_HOME", "CUDA_PATH")
_USUAL_FOLDER = Path("/usr/local/cuda")
_NVRTC = re.compile(r"libnvrtc\.so\.\d+")
_NVCC = re.compile(r"nvcc")
_RELEASE = re.compile(r"\bV(\d+\.\d+\.\d+)")
_TIMEOUT_S = 60


@dataclass(frozen=True)
class CudaCompiler:
    """A compiler of CUDA C++.

    Attributes:
        kind: `nvrtc` or `nvcc`.
        path: of the library or the program.
        version: of the toolkit that it is part of, such as `12.6.85`.
    """

    kind: Literal["nvrtc", "nvcc"]
    path: Path
    version: str

    def __str__(self) -> str:
        return f"{self.kind} {self.version}"


def cuda_compiler() -> CudaCompiler:
    """Return the compiler that is used here.

    Raises:
        CompileFailed: there is none, or EDGEPRESS_NVCC names none.
    """
    if asked := os.environ.get(NVCC_VARIABLE):
        found = shutil.which(asked)
        version = found and _nvcc_version(Path(found))
        if not found or not version:
            raise CompileFailed(
                f"{NVCC_VARIABLE} is {asked!r}, which is no nvcc that works. Name one, or unset "
                f"it to use what {INSTALL} brings."
            )
        return CudaCompiler("nvcc", Path(found), version)
    for package in NVRTC_PACKAGES:
        if library := _packaged(package, _NVRTC):
            return CudaCompiler("nvrtc", library, metadata.version(package))
    for program in _nvccs():
        if version := _nvcc_version(program):
            return CudaCompiler("nvcc", program, version)
    raise CompileFailed(
        "targets with an NVIDIA GPU need a compiler of CUDA C++, and there is none here. "
        f"{INSTALL} brings one. Or set {NVCC_VARIABLE} to the nvcc of an installed CUDA toolkit."
    )


def cuda_compiler_version() -> str:
    """Return which compiler is used here, such as `nvrtc 12.6.85`, or that there is none."""
    try:
        return str(cuda_compiler())
    except CompileFailed:
        return "not found"


def _nvccs() -> list[Path]:
    """Every nvcc that there may be, best first."""
    on_path = shutil.which("nvcc")
    named = [Path(os.environ[name]) for name in _FOLDER_VARIABLES if os.environ.get(name)]
    places = [folder / "bin" / "nvcc" for folder in (*named, _USUAL_FOLDER)]
    packaged = [_packaged(package, _NVCC) for package in NVCC_PACKAGES]
    return [*([Path(on_path)] if on_path else []), *places, *filter(None, packaged)]


def _packaged(package: str, name: re.Pattern[str]) -> Path | None:
    """Return the file of this name in an installed Python package."""
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        return None
    paths = (Path(file.locate()) for file in files if name.fullmatch(file.name))
    return next(filter(Path.is_file, paths), None)


@cache
def _nvcc_version(program: Path) -> str:
    """Ask an nvcc for its version; empty where it does not work."""
    try:
        done = subprocess.run(
            [str(program), "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = _RELEASE.search(done.stdout)
    return found[1] if found and done.returncode == 0 else ""
