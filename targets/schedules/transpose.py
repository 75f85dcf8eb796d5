"""Swaps the two inner axes of `[batch, rows, columns]`: NCHW to NHWC and back."""

from __future__ import annotations

from typing import Any

from edgepress.targets.schedules.emit import Expr, Kernel, load

_PARALLEL_SIZE = 256 * 1024  # below this, waking a second thread costs more than it saves
_BLOCK = 16


def transpose(name: str, batch: int, rows: int, columns: int, dtype: str) -> Any:
    """Generate the kernel: arguments x `[batch, rows, columns]` and y `[batch, columns, rows]`.

    It works in square blocks, so that the lines of neither side leave the first-level cache.
    """
    kernel = Kernel(name)
    size = batch * rows * columns
    x = kernel.argument("x", dtype, size)
    y = kernel.argument("y", dtype, size)

    def block(image: Expr, row: Expr, column: Expr, height: int, width: int) -> None:
        base = image * (rows * columns)
        with kernel.loop("j", width) as j, kernel.loop("i", height) as i:
            value = load(x, base + (row + i) * columns + column + j)
            kernel.store(y, base + (column + j) * rows + row + i, value)

    def strip(image: Expr, column: Expr, width: int) -> None:
        full, rest = divmod(rows, _BLOCK)
        if full:
            with kernel.loop("row", full) as row:
                block(image, row * _BLOCK, column, _BLOCK, width)
        if rest:
            block(image, full * _BLOCK, column, rest, width)

    full, rest = divmod(columns, _BLOCK)
    with kernel.loop("image", batch) as image:
        if full:
            with kernel.loop("strip", full, parallel=size >= _PARALLEL_SIZE) as index:
                strip(image, index * _BLOCK, _BLOCK)
        if rest:
            strip(image, full * _BLOCK, rest)
    return kernel.finish()
