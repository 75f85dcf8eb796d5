"""Resizes images: every output pixel is a weighted sum of a few input pixels, all channels alike.

NHWC. Which pixels, and with what weights, depends on the shapes alone, row by row and column by
column; tables hold it. A pixel's places and weights are loaded once, then whole vectors of channels
are added up. With one place a pixel nothing is calculated, and any dtype is copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgepress.targets.isa.base import Isa
from edgepress.targets.schedules.emit import Expr, Kernel, chunks, load, repeat

_PARALLEL_READS = 100_000  # below this, handing over a part costs more than it saves


@dataclass(frozen=True)
class ResizeShape:
    """Geometry of the kernel.

    Attributes:
        batch, height, width, channels: of the input.
        out_height, out_width: of the output.
        taps: rows and columns that make an output.
    """

    batch: int
    height: int
    width: int
    channels: int
    out_height: int
    out_width: int
    taps: tuple[int, int]


def resize(name: str, shape: ResizeShape, dtype: str, isa: Isa) -> Any:
    """Generate the kernel.

    Arguments of the kernel: x, rows `[out_height, taps]` and columns `[out_width, taps]` int32,
    which are offsets in elements, where there is more than one tap the weights of both, float32 of
    the same shapes, y. x and y have `dtype`, float32 unless there is one tap.
    """
    kernel = Kernel(name)
    down, across = shape.taps
    weighted = down * across > 1
    x = kernel.argument("x", dtype, shape.batch * shape.height * shape.width * shape.channels)
    rows = kernel.argument("rows", "int32", shape.out_height * down)
    columns = kernel.argument("columns", "int32", shape.out_width * across)
    row_weights = column_weights = None
    if weighted:
        row_weights = kernel.argument("row_weights", "float32", shape.out_height * down)
        column_weights = kernel.argument("column_weights", "float32", shape.out_width * across)
    lines = shape.batch * shape.out_height
    y = kernel.argument("y", dtype, lines * shape.out_width * shape.channels)
    lanes = max(1, isa.vector_bytes // np.dtype(dtype).itemsize)
    reads = lines * shape.out_width * shape.channels * down * across
    with kernel.loop("line", lines, parallel=reads >= _PARALLEL_READS) as line:
        image, row = line // shape.out_height, line % shape.out_height
        base = image * (shape.height * shape.width * shape.channels)
        starts = [kernel.let("start", base + load(rows, row * down + i)) for i in range(down)]
        with kernel.loop("column", shape.out_width) as column:
            places = [
                [
                    kernel.let("place", start + load(columns, column * across + j))
                    for j in range(across)
                ]
                for start in starts
            ]
            weights: list[list[Expr]] = []
            if weighted:
                vertical = [load(row_weights, row * down + i) for i in range(down)]
                horizontal = [load(column_weights, column * across + j) for j in range(across)]
                weights = [[kernel.let("weight", v * h) for h in horizontal] for v in vertical]
            pixel = kernel.let("pixel", (line * shape.out_width + column) * shape.channels)
            for first, width, count in chunks(shape.channels, lanes):
                with kernel.loop("block", count) as block:
                    at = first + block * width
                    total = None
                    for i, j in np.ndindex(down, across):
                        value = load(x, places[i][j] + at, width)
                        if weighted:
                            value = value * repeat(weights[i][j], width)
                        total = value if total is None else kernel.let("total", total + value)
                    kernel.store(y, pixel + at, total, width)
    return kernel.finish()
