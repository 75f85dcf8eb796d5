"""Softmax of floats, in two passes over each row and one to scale it, while it is in cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import tirx

from edgepress.targets.isa.base import Isa
from edgepress.targets.schedules.elementary import LOG2_E, exp2_below_zero
from edgepress.targets.schedules.emit import (
    Buffer,
    Expr,
    Kernel,
    chunks,
    folded,
    load,
    repeat,
    splat,
)
from edgepress.targets.schedules.softmax import SoftmaxShape

_PARALLEL_SIZE = 16 * 1024  # below this, handing over a part costs more than it saves
_TOGETHER = 4  # rows whose chains of dependent instructions run side by side

Choose = Callable[[Expr, Expr], Expr]


def softmax_float(name: str, shape: SoftmaxShape, isa: Isa) -> Any:
    """Generate `y = exp(x - max) / sum` along the middle axis: arguments x and y, float32."""
    kernel = Kernel(name)
    size = shape.outer * shape.length * shape.inner
    x = kernel.argument("x", "float32", size)
    y = kernel.argument("y", "float32", size)
    threaded = size >= _PARALLEL_SIZE
    if shape.inner > 1:
        _columns(kernel, shape, isa, x, y, threaded)
        return kernel.finish()
    full, rest = divmod(shape.outer, _TOGETHER)
    if full:
        with kernel.loop("group", full, parallel=threaded) as group:
            _rows(kernel, shape.length, isa, x, y, group * _TOGETHER, _TOGETHER)
    if rest:
        _rows(kernel, shape.length, isa, x, y, full * _TOGETHER, rest)
    return kernel.finish()


def _rows(
    kernel: Kernel, length: int, isa: Isa, x: Buffer, y: Buffer, first: Expr, count: int
) -> None:
    """Emit contiguous rows side by side, vectors along them."""
    bases = [kernel.let("base", (first + row) * length) for row in range(count)]

    def reduced(
        start: float, choose: Choose, value: Callable[[int, Expr, int], Expr]
    ) -> list[Expr]:
        """Reduce `value(row, index, lanes)` over every row."""
        totals: list[Expr | None] = [None] * count
        for begin, lanes, steps in chunks(length, isa.lanes):
            held = [kernel.registers("held", "float32", lanes) for _ in range(count)]
            for buffer in held:
                kernel.store(buffer, 0, splat(start, "float32", lanes), lanes)
            with kernel.loop("i", steps) as i:
                at = kernel.let("at", begin + i * lanes)
                for row, buffer in enumerate(held):
                    total = choose(load(buffer, 0, lanes), value(row, at, lanes))
                    kernel.store(buffer, 0, total, lanes)
            for row, buffer in enumerate(held):
                part = folded(kernel, load(buffer, 0, lanes), lanes, choose)
                known = totals[row]
                totals[row] = part if known is None else kernel.let("total", choose(known, part))
        return [total for total in totals if total is not None]

    tops = reduced(-math.inf, tirx.Max, lambda row, at, lanes: load(x, bases[row] + at, lanes))

    def share(row: int, at: Expr, lanes: int) -> Expr:
        value = _share(kernel, load(x, bases[row] + at, lanes), repeat(tops[row], lanes), lanes)
        kernel.store(y, bases[row] + at, value, lanes)
        return value

    sums = reduced(0.0, lambda a, b: a + b, share)
    inverses = [kernel.let("inverse", splat(1.0, "float32", 1) / total) for total in sums]
    for begin, lanes, steps in chunks(length, isa.lanes):
        with kernel.loop("i", steps) as i:
            at = kernel.let("at", begin + i * lanes)
            for base, inverse in zip(bases, inverses, strict=True):
                scaled = load(y, base + at, lanes) * repeat(inverse, lanes)
                kernel.store(y, base + at, scaled, lanes)


def _share(kernel: Kernel, x: Expr, top: Expr, lanes: int) -> Expr:
    """Return exp(x - top)."""
    below = kernel.let("below", (x - top) * splat(LOG2_E, "float32", lanes))
    return kernel.let("share", exp2_below_zero(below, kernel.let))


def _columns(
    kernel: Kernel, shape: SoftmaxShape, isa: Isa, x: Buffer, y: Buffer, threaded: bool
) -> None:
    """Emit an axis whose neighbours are `inner` elements apart, vectors across it."""
    with kernel.loop("outer", shape.outer, parallel=threaded) as outer:
        for begin, lanes, blocks in chunks(shape.inner, isa.lanes):
            with kernel.loop("block", blocks) as block:
                start = outer * (shape.length * shape.inner) + block * lanes + begin
                _column(kernel, shape, x, y, kernel.let("start", start), lanes)


def _column(
    kernel: Kernel, shape: SoftmaxShape, x: Buffer, y: Buffer, start: Expr, lanes: int
) -> None:
    """Emit `lanes` neighbouring rows."""
    largest = kernel.registers("largest", "float32", lanes)
    total = kernel.registers("total", "float32", lanes)
    kernel.store(largest, 0, splat(-math.inf, "float32", lanes), lanes)
    kernel.store(total, 0, splat(0.0, "float32", lanes), lanes)
    with kernel.loop("i", shape.length) as i:
        value = load(x, start + i * shape.inner, lanes)
        kernel.store(largest, 0, tirx.Max(load(largest, 0, lanes), value), lanes)
    top = kernel.let("top", load(largest, 0, lanes))
    with kernel.loop("i", shape.length) as i:
        at = kernel.let("at", start + i * shape.inner)
        share = _share(kernel, load(x, at, lanes), top, lanes)
        kernel.store(y, at, share, lanes)
        kernel.store(total, 0, load(total, 0, lanes) + share, lanes)
    inverse = kernel.let("inverse", splat(1.0, "float32", lanes) / load(total, 0, lanes))
    with kernel.loop("i", shape.length) as i:
        at = kernel.let("at", start + i * shape.inner)
        kernel.store(y, at, load(y, at, lanes) * inverse, lanes)
