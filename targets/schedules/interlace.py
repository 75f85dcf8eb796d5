"""Puts the phases of a transposed convolution together: every pixel to its place.

NHWC. Of an output `[batch, height, width, channels]`, phase (i, j) holds the pixels of rows i, i +
stride, … and columns j, j + stride, …. Where phases of one row were computed side by side, as
channels of one pixel, the columns need no interlacing and whole rows are copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgepress.targets.isa.base import Isa
from edgepress.targets.schedules.emit import Buffer, Expr, Kernel, chunks, load

_PARALLEL_BYTES = 64 * 1024  # below this, handing over a part costs more than it saves


@dataclass(frozen=True)
class InterlaceShape:
    """Geometry of the copy.

    Attributes:
        batch, height, width, channels: of the output.
        strides: phases along height and width.
        joined: neighbouring columns that a pixel of the phases holds as channels; the stride along
            width is 1 where it is more than 1.
    """

    batch: int
    height: int
    width: int
    channels: int
    strides: tuple[int, int]
    joined: int = 1

    def rows(self, phase: int) -> int:
        """Rows of a phase."""
        return -(-(self.height - phase) // self.strides[0])

    def columns(self, phase: int) -> int:
        """Output columns that a row of a phase holds; joined ones may go beyond the output."""
        columns = -(-(self.width - phase) // self.strides[1])
        return -(-columns // self.joined) * self.joined


def interlace(name: str, shape: InterlaceShape, dtype: str, isa: Isa) -> Any:
    """Generate the kernel: arguments are the phases, row by row, and y, all of `dtype`."""
    kernel = Kernel(name)
    down, across = shape.strides
    phases = [
        [
            kernel.argument(
                f"phase_{i}_{j}",
                dtype,
                shape.batch * shape.rows(i) * shape.columns(j) * shape.channels,
            )
            for j in range(across)
        ]
        for i in range(down)
    ]
    size = shape.batch * shape.height * shape.width * shape.channels
    y = kernel.argument("y", dtype, size)
    lanes = max(1, isa.vector_bytes // np.dtype(dtype).itemsize)
    parallel = size * np.dtype(dtype).itemsize >= _PARALLEL_BYTES

    def copy(target: Expr, x: Buffer, source: Expr, length: int) -> None:
        for first, width, count in chunks(length, lanes):
            with kernel.loop("i", count) as i:
                at = first + i * width
                kernel.store(y, target + at, load(x, source + at, width), width)

    def pixels(row: int, start: Expr, sources: list[Expr], column: Expr, count: int) -> None:
        """Copy the pixels of `count` phases that lie side by side."""
        for j in range(count):
            to = kernel.let("to", start + (column * across + j) * shape.channels)
            source = kernel.let("source", sources[j] + column * shape.channels)
            copy(to, phases[row][j], source, shape.channels)

    for i in range(down):
        lines = shape.batch * shape.rows(i)
        with kernel.loop("line", lines, parallel=parallel) as line:
            image, row = line // shape.rows(i), line % shape.rows(i)
            at = (image * shape.height + row * down + i) * (shape.width * shape.channels)
            start = kernel.let("start", at)
            sources = [
                kernel.let("row", line * (shape.columns(j) * shape.channels)) for j in range(across)
            ]
            if across == 1:
                copy(start, phases[i][0], sources[0], shape.width * shape.channels)
                continue
            whole, rest = divmod(shape.width, across)
            with kernel.loop("column", whole) as column:
                pixels(i, start, sources, column, across)
            pixels(i, start, sources, whole, rest)
    return kernel.finish()
