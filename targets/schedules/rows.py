"""What kernels do with rows of floats: walk along a few at a time, reduce them, quantize them.

Several rows at a time hide how long it takes to reduce one, and load what is per column once. How
rows are quantized is defined in docs/integer.md, "Rows".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from tvm import tirx

from edgepress.targets.isa.base import Isa
from edgepress.targets.lowering.dynamic_reference import SMALLEST_STEP, STEPS
from edgepress.targets.schedules.elementary import fence
from edgepress.targets.schedules.emit import (
    Buffer,
    Expr,
    Kernel,
    cast,
    chunks,
    folded,
    load,
    repeat,
    splat,
    vector,
)
from edgepress.targets.schedules.epilogue import nearest

_PARALLEL_SIZE = 16 * 1024  # values: below this, handing over a part costs more than it saves
_REGISTERS_PER_ROW = 8  # most are the parts of three results
_CHAINS = 4  # sums side by side, as an addition takes four cycles
_NOT_SIGN, _INFINITY_BITS = 0x7FFFFFFF, 0x7F800000

Combine = Callable[[Expr, Expr], Expr]
Values = Callable[[int, Expr, int], Expr]  # row of a block, index in it, lanes → float32 lanes


def row_blocks(kernel: Kernel, rows: int, width: int, isa: Isa) -> Iterator[tuple[Expr, int]]:
    """Emit a loop over rows, on several cores where it pays: yields `(first row, how many)`."""
    most = max(isa.vector_registers // _REGISTERS_PER_ROW, 1)
    whole, rest = divmod(rows, most)
    if whole:
        with kernel.loop("block", whole, parallel=rows * width >= _PARALLEL_SIZE) as block:
            yield block * most, most
    if rest:
        yield whole * most, rest


def along(kernel: Kernel, width: int, widest: int, rows: int) -> Iterator[tuple[Expr, int, int]]:
    """Emit loops along rows: yields `(index, lanes, part)` for every vector of a loop's body.

    A body has as many vectors as give, with several rows, enough independent sums.
    """
    most = -(-_CHAINS // rows)
    for first, lanes, count in chunks(width, widest):
        turns, rest = divmod(count, most)
        for start, extent, parts in ((0, turns, most), (turns * most, 1, rest)):
            if extent and parts:
                with kernel.loop("i", extent) as i:
                    at = kernel.let("at", i * (most * lanes) + (first + start * lanes))
                    for part in range(parts):
                        yield at + part * lanes, lanes, part


class Totals:
    """Partial results of a reduction of some rows, in registers that start at 0."""

    def __init__(
        self,
        kernel: Kernel,
        width: int,
        widest: int,
        rows: int,
        combine: Combine,
        dtype: str = "float32",
    ) -> None:
        self._kernel, self._combine = kernel, combine
        self._parts: list[dict[tuple[int, int], Buffer]] = [{} for _ in range(rows)]
        for _, lanes, count in chunks(width, widest):
            for parts in self._parts:
                for part in range(min(count, -(-_CHAINS // rows))):
                    parts[lanes, part] = kernel.registers("part", dtype, lanes)
                    kernel.store(parts[lanes, part], 0, splat(0, dtype, lanes), lanes)

    def take(self, row: int, value: Expr, lanes: int, part: int) -> None:
        """Combine a vector with a partial result of its row."""
        buffer = self._parts[row][lanes, part]
        self._kernel.store(buffer, 0, self._combine(load(buffer, 0, lanes), value), lanes)

    def totals(self) -> list[Expr]:
        """Combine the parts of every row to one value."""
        return [self._total(parts) for parts in self._parts]

    def _total(self, parts: dict[tuple[int, int], Buffer]) -> Expr:
        wide: dict[int, Expr] = {}
        for (lanes, _), buffer in parts.items():
            value = load(buffer, 0, lanes)
            wide[lanes] = self._combine(wide[lanes], value) if lanes in wide else value
        total = None
        for lanes, value in wide.items():
            single = folded(self._kernel, value, lanes, self._combine)
            total = single if total is None else self._combine(total, single)
        return self._kernel.let("total", total)


class RowQuantiser:
    """Finds the range of some rows, then quantizes them."""

    def __init__(self, kernel: Kernel, width: int, padded: int, rows: int, isa: Isa) -> None:
        self.kernel, self.width, self.padded, self.isa = kernel, width, padded, isa
        self.rows = rows

        def totals(combine: Combine, dtype: str) -> Totals:
            return Totals(kernel, width, isa.lanes, rows, combine, dtype)

        self._high, self._low = totals(tirx.Max, "float32"), totals(tirx.Min, "float32")
        self._bits = totals(tirx.Max, "int32")  # of the largest magnitude

    def take(self, row: int, value: Expr, lanes: int, part: int) -> None:
        """Count lanes of a row in."""
        bits = tirx.reinterpret(vector("int32", lanes), value)
        self._high.take(row, value, lanes, part)
        self._low.take(row, value, lanes, part)
        self._bits.take(row, bits & splat(_NOT_SIGN, "int32", lanes), lanes, part)

    def finish(
        self, values: Values, first: Expr, q: Buffer, step: Buffer, zero_point: Buffer
    ) -> None:
        """Store what the rows become: steps, zeros behind their width, a step, a zero point.

        Args:
            values: the same values again.
            first: number of the first row.
            q: `[rows, padded]` in the staged dtype of the instruction set.
            step: `[rows]` float32.
            zero_point: `[rows]` int32.
        """
        kernel, isa, rows = self.kernel, self.isa, range(self.rows)
        lowest = -128 if isa.storage == "int8" else 0
        scales = [
            _scale(kernel, *ends)
            for ends in zip(
                self._high.totals(), self._low.totals(), self._bits.totals(), strict=True
            )
        ]
        for row, (size, _, point) in zip(rows, scales, strict=True):
            kernel.store(step, first + row, size)
            kernel.store(zero_point, first + row, point + lowest)
        target = kernel.let("target", first * self.padded)
        for at, lanes, _ in along(kernel, self.width, isa.lanes, self.rows):
            for row, (_, inverse, point) in zip(rows, scales, strict=True):
                # the fence keeps product and rounding apart
                real = fence(values(row, at, lanes) * repeat(inverse, lanes))
                steps = nearest(real, lanes) + repeat(point + lowest, lanes)
                # whole bounds may come after the rounding, where narrowing saturates
                clamped = tirx.Max(
                    tirx.Min(steps, splat(lowest + STEPS, "int32", lanes)),
                    splat(lowest, "int32", lanes),
                )
                index = target + row * self.padded + at
                kernel.store(q, index, cast(clamped, isa.staged, lanes), lanes)
        for at, lanes, _ in along(kernel, self.padded - self.width, isa.lanes, self.rows):
            for row in rows:
                index = target + (row * self.padded + self.width) + at
                kernel.store(q, index, splat(0, isa.staged, lanes), lanes)


def _scale(kernel: Kernel, high: Expr, low: Expr, bits: Expr) -> tuple[Expr, Expr, Expr]:
    """Return the step of a row, the inverse to multiply with, and the zero point from 0 on."""
    exact = kernel.let("exact", (high - low) / splat(STEPS, "float32", 1))
    size = kernel.let("size", tirx.Max(exact, splat(SMALLEST_STEP, "float32", 1)))
    inverse = kernel.let("inverse", splat(1.0, "float32", 1) / size)
    below = (splat(0.0, "float32", 1) - low) * inverse
    bounded = tirx.Max(tirx.Min(below, splat(STEPS, "float32", 1)), splat(0.0, "float32", 1))
    point = kernel.let("point", nearest(bounded, 1))
    # what NaN or infinity has reached is NaN in all of the row
    finite = bits < splat(_INFINITY_BITS, "int32", 1)
    shown = kernel.let("shown", tirx.Select(finite, size, splat(math.nan, "float32", 1)))
    return shown, inverse, point
