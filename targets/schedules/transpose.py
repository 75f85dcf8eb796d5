"""Swaps the two inner axes of `[batch, rows, columns]`: NCHW to NHWC and back.

Squares of n × n elements are turned in registers: n vectors are interleaved pairwise, the first
with the one half a square further down, log2(n) times, as a perfect shuffle of a deck of n² cards
by n brings every card to its place (Stone, "Parallel Processing with the Perfect Shuffle", IEEE
Transactions on Computers C-20(2), 1971). What is left over at both ends goes one by one, except
where one side is so short, as the colours of an image are, that all of it fits a few vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx

from edgepress.targets.isa.base import Isa
from edgepress.targets.schedules.emit import Buffer, Expr, Kernel, load

_PARALLEL_SIZE = 64 * 1024  # below this, handing over a part costs more than it saves
_SQUARE = 8  # elements; more would need more registers than most instruction sets have
_FEW = 4  # rows or columns that are interleaved at once


def transpose(name: str, batch: int, rows: int, columns: int, dtype: str, isa: Isa) -> Any:
    """Generate the kernel: arguments x `[batch, rows, columns]` and y `[batch, columns, rows]`."""
    kernel = Kernel(name)
    size = batch * rows * columns
    dtype = "uint8" if dtype == "bool" else dtype
    x = kernel.argument("x", dtype, size)
    y = kernel.argument("y", dtype, size)
    parallel = size >= _PARALLEL_SIZE
    lanes = isa.vector_bytes // np.dtype(dtype).itemsize
    if isa.lanes == 1:
        _one_by_one(kernel, x, y, (0, batch), (rows, columns), (0, rows), (0, columns))
    elif min(rows, columns) <= _FEW:
        _few(kernel, x, y, batch, rows, columns, lanes, parallel)
    else:
        _squares(kernel, x, y, batch, rows, columns, min(_SQUARE, lanes), parallel)
    return kernel.finish()


def _squares(
    kernel: Kernel,
    x: Buffer,
    y: Buffer,
    batch: int,
    rows: int,
    columns: int,
    side: int,
    parallel: bool,
) -> None:
    """Turn squares, one strip of columns after the other."""
    down, across = rows // side, columns // side

    def square(base: Expr, row: Expr, column: Expr) -> None:
        source = kernel.let("source", base + row * columns + column)
        target = kernel.let("target", base + column * rows + row)
        vectors = [kernel.let("row", load(x, source + i * columns, side)) for i in range(side)]
        stages = side.bit_length() - 1
        for _ in range(stages):
            vectors = [
                kernel.let(
                    "half", _interleaved(vectors[i // 2], vectors[i // 2 + side // 2], i % 2, side)
                )
                for i in range(side)
            ]
        for i, vector in enumerate(vectors):
            kernel.store(y, target + i * rows, vector, side)

    if down and across:
        with kernel.loop("strip", batch * across, parallel=parallel) as strip:
            base = kernel.let("base", (strip // across) * (rows * columns))
            with kernel.loop("square", down) as index:
                square(base, index * side, (strip % across) * side)
    whole_rows, whole_columns = down * side, across * side
    edges = [
        ((whole_rows, rows), (0, columns)),
        ((0, whole_rows), (whole_columns, columns)),
    ]
    for row_range, column_range in edges:
        _one_by_one(kernel, x, y, (0, batch), (rows, columns), row_range, column_range)


def _interleaved(first: Expr, second: Expr, half: int, lanes: int) -> Expr:
    """Take lanes of two vectors in turn: those of the lower or of the upper halves."""
    start = half * (lanes // 2)
    places = [start + lane // 2 + (lane % 2) * lanes for lane in range(lanes)]
    return tirx.Shuffle([first, second], [tirx.const(place, "int32") for place in places])


def _few(
    kernel: Kernel,
    x: Buffer,
    y: Buffer,
    batch: int,
    rows: int,
    columns: int,
    lanes: int,
    parallel: bool,
) -> None:
    """Interleave a few long rows, or take a few columns apart."""
    few, many = min(rows, columns), max(rows, columns)
    whole = many // lanes
    if whole:
        with kernel.loop("block", batch * whole, parallel=parallel) as index:
            base = kernel.let("base", (index // whole) * (rows * columns))
            at = kernel.let("at", (index % whole) * lanes)
            apart = [base + i * many + at for i in range(few)]
            together = base + at * few
            if rows <= columns:
                parts = [kernel.let("part", load(x, place, lanes)) for place in apart]
                for i in range(few):
                    places = [i * lanes + lane for lane in range(lanes)]
                    order = [(place % few) * lanes + place // few for place in places]
                    kernel.store(y, together + i * lanes, _chosen(parts, order), lanes)
            else:
                parts = [
                    kernel.let("part", load(x, together + i * lanes, lanes)) for i in range(few)
                ]
                for i, place in enumerate(apart):
                    order = [lane * few + i for lane in range(lanes)]
                    kernel.store(y, place, _chosen(parts, order), lanes)
    row_range = (0, rows) if rows <= columns else (whole * lanes, rows)
    column_range = (whole * lanes, columns) if rows <= columns else (0, columns)
    _one_by_one(kernel, x, y, (0, batch), (rows, columns), row_range, column_range)


def _chosen(parts: list[Expr], places: list[int]) -> Expr:
    return tirx.Shuffle(parts, [tirx.const(place, "int32") for place in places])


def _one_by_one(
    kernel: Kernel,
    x: Buffer,
    y: Buffer,
    images: tuple[int, int],
    size: tuple[int, int],
    row_range: tuple[int, int],
    column_range: tuple[int, int],
) -> None:
    """Move the elements of a rectangle."""
    rows, columns = size
    counts = [stop - start for start, stop in (images, row_range, column_range)]
    if 0 in counts:
        return
    with (
        kernel.loop("image", counts[0]) as image,
        kernel.loop("j", counts[2]) as j,
        kernel.loop("i", counts[1]) as i,
    ):
        base = image * (rows * columns)
        row, column = i + row_range[0], j + column_range[0]
        kernel.store(y, base + column * rows + row, load(x, base + row * columns + column))
