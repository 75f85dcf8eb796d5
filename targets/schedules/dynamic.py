"""Matrix products of rows that are quantized while the model runs (docs/integer.md, "Rows").

Two kernels: one finds scale and zero point of every row and quantizes it, in the form that the
instruction set multiplies; the other is the tiled product of `conv`, whose accumulators start at
what the zero point takes away and leave as float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from edgepress.targets.isa.base import Isa
from edgepress.targets.lowering.dynamic_reference import SMALLEST_STEP, STEPS
from edgepress.targets.schedules.conv import ConvShape, Tile, TileWriter
from edgepress.targets.schedules.elementary import fence
from edgepress.targets.schedules.emit import (
    Buffer,
    Expr,
    Kernel,
    cast,
    chunks,
    lanes_of,
    load,
    repeat,
    splat,
    vector,
)
from edgepress.targets.schedules.epilogue import Clip, finish, nearest

_PARALLEL_SIZE = 64 * 1024  # below this, waking a second thread costs more than it saves
_CHOICES = (tirx.Max, tirx.Min, tirx.Max)  # of the largest, the smallest, the magnitude's bits
_NOT_SIGN, _INFINITY_BITS = 0x7FFFFFFF, 0x7F800000


def quantise_rows(name: str, rows: int, width: int, padded: int, isa: Isa, scaled: bool) -> Any:
    """Generate the quantization of every row of x `[rows, width]` float32.

    Arguments of the kernel: x, where `scaled` the factors `[width]` float32 that multiply it first,
    q `[rows, padded]` in the staged dtype of the instruction set, zeros behind `width`, step
    `[rows]` float32, zero point `[rows]` int32.
    """
    kernel = Kernel(name)
    x = kernel.argument("x", "float32", rows * width)
    factors = kernel.argument("factors", "float32", width) if scaled else None
    q = kernel.argument("q", isa.staged, rows * padded)
    step = kernel.argument("step", "float32", rows)
    zero_point = kernel.argument("zero_point", "int32", rows)
    lowest = -128 if isa.storage == "int8" else 0
    with kernel.loop("row", rows, parallel=rows * width >= _PARALLEL_SIZE) as row:
        base = kernel.let("base", row * width)

        def values(at: Expr, lanes: int, base: Expr = base) -> Expr:
            found = load(x, base + at, lanes)
            return found if factors is None else found * load(factors, at, lanes)

        high, low, bits = _range(kernel, values, width, isa.lanes)
        exact = kernel.let("exact", (high - low) / splat(STEPS, "float32", 1))
        size = kernel.let("size", tirx.Max(exact, splat(SMALLEST_STEP, "float32", 1)))
        inverse = kernel.let("inverse", splat(1.0, "float32", 1) / size)
        below = (splat(0.0, "float32", 1) - low) * inverse
        bounded = tirx.Max(tirx.Min(below, splat(STEPS, "float32", 1)), splat(0.0, "float32", 1))
        point = kernel.let("point", nearest(bounded, 1))
        # what NaN or infinity has reached is NaN in all of the row
        finite = bits < splat(_INFINITY_BITS, "int32", 1)
        kernel.store(step, row, tirx.Select(finite, size, splat(math.nan, "float32", 1)))
        kernel.store(zero_point, row, point + lowest)
        least = kernel.let("least", cast(splat(0, "int32", 1) - point, "float32", 1))
        most = kernel.let("most", cast(splat(STEPS, "int32", 1) - point, "float32", 1))
        target = kernel.let("target", row * padded)
        for first, lanes, count in chunks(width, isa.lanes):
            with kernel.loop("i", count) as i:
                at = first + i * lanes
                real = values(at, lanes) * repeat(inverse, lanes)
                clamped = tirx.Max(tirx.Min(real, repeat(most, lanes)), repeat(least, lanes))
                steps = nearest(clamped, lanes) + repeat(point + lowest, lanes)
                kernel.store(q, target + at, cast(steps, isa.staged, lanes), lanes)
        for first, lanes, count in chunks(padded - width, isa.lanes):
            with kernel.loop("i", count) as i:
                at = target + (width + first + i * lanes)
                kernel.store(q, at, splat(0, isa.staged, lanes), lanes)
    return kernel.finish()


def _range(
    kernel: Kernel, values: Callable[[Expr, int], Expr], width: int, widest: int
) -> tuple[Expr, Expr, Expr]:
    """Return the largest value or 0, the smallest value or 0, and the largest magnitude's bits."""
    found: list[list[Expr]] = [[], [], []]
    for first, lanes, count in chunks(width, widest):
        held = [
            kernel.registers(name, dtype, lanes)
            for name, dtype in (("high", "float32"), ("low", "float32"), ("bits", "int32"))
        ]
        for buffer, dtype in zip(held, ("float32", "float32", "int32"), strict=True):
            kernel.store(buffer, 0, splat(0, dtype, lanes), lanes)
        high, low, bits = held
        with kernel.loop("i", count) as i:
            value = kernel.let("value", values(first + i * lanes, lanes))
            magnitude = tirx.reinterpret(vector("int32", lanes), value) & splat(
                _NOT_SIGN, "int32", lanes
            )
            kernel.store(high, 0, tirx.Max(load(high, 0, lanes), value), lanes)
            kernel.store(low, 0, tirx.Min(load(low, 0, lanes), value), lanes)
            kernel.store(bits, 0, tirx.Max(load(bits, 0, lanes), magnitude), lanes)
        for parts, buffer, choose in zip(found, held, _CHOICES, strict=True):
            parts.append(_folded(kernel, load(buffer, 0, lanes), lanes, choose))
    results = []
    for parts, choose in zip(found, _CHOICES, strict=True):
        total = parts[0]
        for part in parts[1:]:
            total = choose(total, part)
        results.append(kernel.let("total", total))
    return results[0], results[1], results[2]


def _folded(kernel: Kernel, value: Expr, lanes: int, choose: Callable[..., Expr]) -> Expr:
    """Reduce the lanes of a vector to one value."""
    while lanes > 1:
        value, lanes = kernel.let("whole", value), lanes // 2
        halves = (lanes_of(value, first, lanes, 2 * lanes) for first in (0, lanes))
        value = choose(*halves)
    return kernel.let("folded", value)


@dataclass(frozen=True)
class Product:
    """A product `[rows, inputs] x [inputs, outputs]`; `inputs` is padded as `quantise_rows` does.

    Attributes:
        rows, inputs, outputs: its size.
        clip: the clamp that a fused ReLU or Clip leaves.
    """

    rows: int
    inputs: int
    outputs: int
    clip: Clip

    @property
    def shape(self) -> ConvShape:
        """The same as a convolution over one long row."""
        return ConvShape(1, 1, self.rows, self.inputs, 1, self.rows, self.outputs)


def product(name: str, size: Product, isa: Isa, tile: Tile) -> Any:
    """Generate the product.

    Arguments of the kernel: q, weights (packed), step, zero point, column sums int32, column scales
    float32 and bias float32 (all three packed), y `[rows, outputs]` float32.
    """
    kernel = Kernel(name)
    _RowWriter(kernel, size.shape.flattened(), isa, size.clip, tile, "int8").tiles(tile)
    return kernel.finish()


class _RowWriter(TileWriter):
    """Tiles whose rows have a step and a zero point of their own."""

    def declare(self, channels: int) -> None:
        rows = self.shape.width
        self.row_step = self.kernel.argument("step", "float32", rows)
        self.zero_point = self.kernel.argument("zero_point", "int32", rows)
        self.sums = self.kernel.argument("sums", "int32", channels)
        self.scales = self.kernel.argument("scales", "float32", channels)
        self.bias = self.kernel.argument("bias", "float32", channels)
        self.first_row: Expr = 0

    def tile(self, line: Expr, first: Expr, rows: int, parallel: bool) -> None:
        self.first_row = first
        super().tile(line, first, rows, parallel)

    def begin(self, held: list[list[Buffer]], channel: Expr) -> None:
        """Start at what the zero points take away."""
        kernel, lanes = self.kernel, self.isa.lanes
        for column in range(len(held[0])):
            sums = kernel.let("sums", load(self.sums, channel + column * lanes, lanes))
            for row, accumulators in enumerate(held):
                point = load(self.zero_point, self.first_row + row)
                shift = splat(0, "int32", lanes) - repeat(point, lanes) * sums
                kernel.store(accumulators[column], 0, shift, lanes)

    def end(self, held: list[list[Buffer]], channel: Expr, y_base: Expr, last_lanes: int) -> None:
        """Scale by row, then by column, add the bias, clamp."""
        kernel, lanes, columns = self.kernel, self.isa.lanes, len(held[0])
        for column in range(columns):
            valid = last_lanes if column == columns - 1 else lanes
            scale, bias = (
                kernel.let("column", load(values, channel + column * lanes, lanes))
                for values in (self.scales, self.bias)
            )
            for row, accumulators in enumerate(held):
                step = repeat(load(self.row_step, self.first_row + row), lanes)
                real = cast(load(accumulators[column], 0, lanes), "float32", lanes) * step * scale
                # the fence keeps product and sum apart: fused, they would round once
                value = kernel.let("value", finish(fence(real) + bias, None, self.epilogue, lanes))
                self.store(y_base + row * self.shape.out_channels + column * lanes, value, valid)
