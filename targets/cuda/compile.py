"""Kernels in CUDA C++ → machine code → one ELF object for the bundle's host."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources

from edgepress.targets.base import CompileFailed, Target
from edgepress.targets.cuda.images import images_object
from edgepress.targets.cuda.kernel import CudaKernel
from edgepress.targets.cuda.launch_bounds import with_fewer_blocks
from edgepress.targets.cuda.nvcc import compile_with_nvcc
from edgepress.targets.cuda.nvrtc import compile_with_nvrtc
from edgepress.targets.cuda.resources import Resources, parse_resources
from edgepress.targets.cuda.toolkit import CudaCompiler, cuda_compiler
from edgepress.targets.program import Program

LANGUAGE = "-std=c++17"
"""No option changes arithmetic. Products and sums may be fused, as is the default: where that would
change an integer, kernels use functions that are never fused."""

_LAMBDAS_ON_DEVICE = (
    "-default-device"  # NVRTC takes generic ones for code of the host, nvcc does not
)
_KERNELS_PER_UNIT = 8  # headers are read once per unit, and the GPU loads each on its own
_UNITS_KEPT = 512
_SHARES_OF_BLOCKS = (0.75, 0.5, 0.0)  # of those that are resident while a kernel spills


@dataclass(frozen=True)
class Unit:
    """Kernels that are compiled together.

    Attributes:
        names: of the kernels.
        source: CUDA C++.
    """

    names: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Image:
    """Machine code of one unit.

    Attributes:
        cubin: an ELF file that the CUDA driver loads.
        resources: what each kernel takes.
    """

    cubin: bytes
    resources: Mapping[str, Resources]


def compile_cuda(program: Program, target: Target) -> bytes:
    """Compile every kernel of a program, all cores at work.

    The bytes depend on nothing but the program, the target and the two compilers.

    Returns:
        An ELF relocatable object for the host of the target; `images_object` says what is in it.

    Raises:
        CompileFailed: a compiler is missing or refused a kernel; carries its log.
    """
    compiler = cuda_compiler()
    cubins = [image.cubin for image in _images(program, target, compiler)]
    return images_object(cubins, target, str(compiler))


def kernel_resources(program: Program, target: Target) -> dict[str, Resources]:
    """Return what each kernel takes of a multiprocessor, in the order of `Program.kernels`.

    Raises:
        CompileFailed: as `compile_cuda`.
    """
    images = _images(program, target, cuda_compiler())
    found = {name: taken for image in images for name, taken in image.resources.items()}
    return {name: found[name] for name in program.kernels}


def units_of(kernels: Iterable[CudaKernel]) -> list[Unit]:
    """Group kernels, those with the same headers together.

    >>> one = CudaKernel("one", 'extern "C" __global__ void one() {}', (), (1, 1, 1), (32, 1, 1))
    >>> print(units_of([one])[0].source)
    namespace of_one {
    #line 1 "one"
    extern "C" __global__ void one() {}
    }
    <BLANKLINE>
    """
    alike: dict[tuple[str, ...], list[CudaKernel]] = {}
    for kernel in kernels:
        alike.setdefault(kernel.headers, []).append(kernel)
    return [
        _unit(headers, members[first : first + _KERNELS_PER_UNIT])
        for headers, members in alike.items()
        for first in range(0, len(members), _KERNELS_PER_UNIT)
    ]


def _unit(headers: tuple[str, ...], kernels: list[CudaKernel]) -> Unit:
    """Write a unit; each kernel in a namespace, so that what stands before it may have any name."""
    parts = [f'#include "{header}"\n' for header in headers]
    for kernel in kernels:
        source = kernel.source.rstrip("\n")
        parts.append(f'namespace of_{kernel.name} {{\n#line 1 "{kernel.name}"\n{source}\n}}\n')
    return Unit(tuple(kernel.name for kernel in kernels), "".join(parts))


def _images(program: Program, target: Target, compiler: CudaCompiler) -> list[Image]:
    units = units_of(program.kernels.values())
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        return list(threads.map(lambda unit: _compile(unit, target.gpu_arch, compiler), units))


@lru_cache(_UNITS_KEPT)
def _compile(unit: Unit, architecture: str, compiler: CudaCompiler) -> Image:
    """Compile a unit; again, with more registers for a kernel, while it spills."""
    image = first = _compile_text(unit, architecture, compiler)
    shares, source = dict[str, float](), unit.source
    for share in _SHARES_OF_BLOCKS:
        shares |= {name: share for name, taken in image.resources.items() if taken.spills}
        before, source = source, with_fewer_blocks(unit.source, first.resources, shares)
        if source == before:
            break
        image = _compile_text(Unit(unit.names, source), architecture, compiler)
    return image


def _compile_text(unit: Unit, architecture: str, compiler: CudaCompiler) -> Image:
    options = [LANGUAGE, f"-arch={architecture}"]
    try:
        if compiler.kind == "nvrtc":
            options += ["--ptxas-options=-v", _LAMBDAS_ON_DEVICE]
            cubin, log = compile_with_nvrtc(compiler.path, unit.source, _headers(), options)
        else:
            options += ["-Xptxas", "-v"]
            cubin, log = compile_with_nvcc(compiler.path, unit.source, _headers(), options)
    except CompileFailed as error:
        named = [name for name in unit.names if _blamed(name, error.log)] or unit.names
        raise CompileFailed(
            f"{compiler} refused {', '.join(named)} for {architecture}.", str(error)
        ) from error
    taken = parse_resources(log)
    return Image(cubin, {name: taken[name] for name in unit.names})


def _blamed(name: str, log: str) -> bool:
    """Tell whether errors are in a kernel, in a template that it uses, or in its machine code."""
    places = rf"\b{name}\(\d+\): (?:\w+ )?error|line \d+ of {name}\b|error .*'{name}'"
    return re.search(places, log) is not None


@cache
def _headers() -> dict[str, str]:
    """Every file that kernels may include."""
    folder = resources.files("edgepress.targets.cuda.kernels")
    files = sorted(folder.iterdir(), key=lambda file: file.name)
    return {f.name: f.read_text(encoding="utf-8") for f in files if f.name.endswith(".cuh")}
