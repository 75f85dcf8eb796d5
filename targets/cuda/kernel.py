"""One kernel in CUDA C++, and how it is launched."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

MOST_THREADS = 1024
C_TYPES = {
    "bool": "bool",
    "uint8": "uint8_t",
    "int8": "int8_t",
    "int16": "int16_t",
    "int32": "int32_t",
    "int64": "int64_t",
    "float16": "half",
    "float32": "float",
}
"""What CUDA C++ calls the dtypes of a program."""


@dataclass(frozen=True)
class CudaKernel:
    """One kernel in CUDA C++, and how it is launched.

    Attributes:
        name: of the function.
        source: one `extern "C" __global__ void NAME(…)`, and what must stand before it. All
            parameters are pointers, in the order of a call's arguments; each tensor starts at a
            multiple of 256 bytes. Sizes and constants are part of the text.
        headers: files of `targets/cuda/kernels/` to include, in order.
        grid: blocks along x, y and z.
        block: threads along x, y and z.
        shared_bytes: dynamic shared memory of a block.
        counters: how many uint32 the function wants behind its last argument: zero before, and
            left zero.
        overlaps: whether it calls `wait_for_previous` before it touches what another kernel reads
            or writes, so that it may start before the one before it has ended.
    """

    name: str
    source: str
    headers: tuple[str, ...]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int = 0
    counters: int = 0
    overlaps: bool = False

    def __post_init__(self) -> None:
        threads = self.block[0] * self.block[1] * self.block[2]
        if not 1 <= threads <= MOST_THREADS or min(*self.grid, *self.block) < 1:
            raise ValueError(f"{self.name}: no launch of {self.grid} blocks of {self.block}")

    def renamed(self, name: str) -> CudaKernel:
        """Return the same kernel under another name; what its text defines besides is renamed too.

        Such names begin with the kernel's.
        """
        return replace(self, name=name, source=re.sub(rf"\b{self.name}", name, self.source))


def float_literal(value: float) -> str:
    """Write the float32 nearest to a finite number exactly.

    >>> float_literal(0.5), float_literal(-3)
    ('0x1.0000000000000p-1f', '-0x1.8000000000000p+1f')
    """
    return f"{float(np.float32(value)).hex()}f"


def constants_source(name: str, constants: Mapping[str, int]) -> str:
    """Write a struct of constants; those beyond int are words of bits."""
    lines = [
        f"    static const int {key} = {value};"
        if value < 2**31
        else f"    static const uint32_t {key} = 0x{value:08X}u;"
        for key, value in constants.items()
    ]
    return "\n".join([f"struct {name} {{", *lines, "};", ""])
