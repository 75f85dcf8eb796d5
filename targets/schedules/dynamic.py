"""Matrix products of rows that are quantized while the model runs (docs/integer.md, "Rows").

Two kernels: one finds scale and zero point of every row and quantizes it, in the form that the
instruction set multiplies; the other is the tiled product of `conv`, whose accumulators start at
what the zero point takes away and leave as float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgepress.targets.isa.base import Isa
from edgepress.targets.schedules.conv import ConvShape, Tile, TileWriter, widths_of
from edgepress.targets.schedules.elementary import fence
from edgepress.targets.schedules.emit import (
    Buffer,
    Expr,
    Kernel,
    cast,
    load,
    repeat,
    splat,
)
from edgepress.targets.schedules.epilogue import Clip, finish
from edgepress.targets.schedules.outputs import store_lanes
from edgepress.targets.schedules.rows import RowQuantiser, along, row_blocks


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
    for first, block in row_blocks(kernel, rows, width, isa):
        base = kernel.let("base", first * width)

        def values(row: int, at: Expr, lanes: int, base: Expr = base) -> Expr:
            found = load(x, base + row * width + at, lanes)
            return found if factors is None else found * load(factors, at, lanes)

        quantiser = RowQuantiser(kernel, width, padded, block, isa)
        for at, lanes, part in along(kernel, width, isa.lanes, block):
            for row in range(block):
                value = kernel.let("value", values(row, at, lanes))
                quantiser.take(row, value, lanes, part)
        quantiser.finish(values, first, q, step, zero_point)
    return kernel.finish()


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
        kernel = self.kernel
        for column, lanes in enumerate(widths_of(held)):
            first = channel + column * self.isa.lanes
            sums = kernel.let("sums", load(self.sums, first, lanes))
            for row, accumulators in enumerate(held):
                point = load(self.zero_point, self.first_row + row)
                shift = splat(0, "int32", lanes) - repeat(point, lanes) * sums
                kernel.store(accumulators[column], 0, shift, lanes)

    def end(self, held: list[list[Buffer]], channel: Expr, y_base: Expr, last_lanes: int) -> None:
        """Scale by row, then by column, add the bias, clamp."""
        kernel, whole, widths = self.kernel, self.isa.lanes, widths_of(held)
        for column, lanes in enumerate(widths):
            valid = last_lanes if column == len(widths) - 1 else lanes
            scale, bias = (
                kernel.let("column", load(values, channel + column * whole, lanes))
                for values in (self.scales, self.bias)
            )
            for row, accumulators in enumerate(held):
                step = repeat(load(self.row_step, self.first_row + row), lanes)
                real = cast(load(accumulators[column], 0, lanes), "float32", lanes) * step * scale
                # the fence keeps product and sum apart: fused, they would round once
                value = kernel.let("value", finish(fence(real) + bias, None, self.epilogue, lanes))
                index = y_base + row * self.shape.out_channels + column * whole
                store_lanes(kernel, self.outputs.y, index, value, 0, valid, lanes)
