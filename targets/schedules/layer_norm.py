"""Layer normalisation of rows, with what stands before and behind it in a transformer.

A few rows at a time stay in the first-level cache from the addition of a residual to the
quantization for a product:

1. the sum with the residual is stored, and summed up;
2. the mean is subtracted, and the squares are summed up (two passes: a difference of large sums
   would lose digits where the mean is larger than the deviation);
3. a row is normalised, scaled and shifted, and stored; where a product of dynamically quantized
   rows reads it, its range is found on the way;
4. for such a product, it is quantized.

Root-mean-square normalisation subtracts no mean: the squares are summed up in the first pass.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from edgepress.targets.isa.base import Isa
from edgepress.targets.schedules.emit import Buffer, Expr, Kernel, load, repeat, splat
from edgepress.targets.schedules.rows import RowQuantiser, Totals, along, row_blocks


@dataclass(frozen=True)
class LayerNormShape:
    """A normalisation.

    Attributes:
        rows, width: its size.
        epsilon: added to the variance.
        centred: whether the mean is subtracted first; without, it is a root-mean-square one.
        scaled, shifted: whether there is a factor and an addend per column.
        residual: whether a second tensor is added to x first.
        sum_read: whether the sum with the residual is an output too.
        padded: width of quantized rows; 0 where none are wanted.
        factors: whether factors per column multiply rows before they are quantized.
    """

    rows: int
    width: int
    epsilon: float
    centred: bool = True
    scaled: bool = True
    shifted: bool = True
    residual: bool = False
    sum_read: bool = False
    padded: int = 0
    factors: bool = False


def layer_norm(name: str, shape: LayerNormShape, isa: Isa) -> Any:
    """Generate the kernel.

    Arguments of the kernel, those that there are: x `[rows, width]`, residual, scale `[width]`,
    shift `[width]`, factors `[width]`, y, sum, all float32; then q, step and zero point as
    `dynamic.quantise_rows` has them.
    """
    kernel, size, width = Kernel(name), shape.rows * shape.width, shape.width

    def argument(wanted: bool, name: str, size: int, dtype: str = "float32") -> Buffer | None:
        return kernel.argument(name, dtype, size) if wanted else None

    x, residual = kernel.argument("x", "float32", size), argument(shape.residual, "residual", size)
    scale, shift = argument(shape.scaled, "scale", width), argument(shape.shifted, "shift", width)
    factors = argument(shape.factors, "factors", width)
    y = kernel.argument("y", "float32", size)
    total = argument(shape.sum_read, "sum", size)
    steps = [
        kernel.argument(what, dtype, length)
        for what, dtype, length in (
            ("q", isa.staged, shape.rows * shape.padded),
            ("step", "float32", shape.rows),
            ("zero_point", "int32", shape.rows),
        )
        if shape.padded
    ]
    read = total if total is not None else y if residual is not None else x
    for first, rows in row_blocks(kernel, shape.rows, width, isa):
        base = kernel.let("base", first * width)
        means, inverses = _moments(kernel, shape, isa, (x, residual, read), base, rows)
        quantiser = RowQuantiser(kernel, width, shape.padded, rows, isa) if shape.padded else None
        for at, lanes, part in along(kernel, width, isa.lanes, rows):
            per_column = [
                None if buffer is None else kernel.let("column", load(buffer, at, lanes))
                for buffer in (scale, shift, factors)
            ]
            for row in range(rows):
                index = base + row * width + at
                value = load(read, index, lanes)
                if shape.centred:
                    value = value - repeat(means[row], lanes)
                value = value * repeat(inverses[row], lanes)
                value = kernel.let("value", _scaled(value, per_column[0], per_column[1]))
                kernel.store(y, index, value, lanes)
                if quantiser is not None:
                    value = kernel.let("value", _scaled(value, per_column[2]))
                    quantiser.take(row, value, lanes, part)
        if quantiser is not None:

            def values(row: int, at: Expr, lanes: int, base: Expr = base) -> Expr:
                factor = None if factors is None else load(factors, at, lanes)
                return _scaled(load(y, base + row * width + at, lanes), factor)

            quantiser.finish(values, first, *steps)
    return kernel.finish()


def _scaled(value: Expr, factor: Expr | None, addend: Expr | None = None) -> Expr:
    product = value if factor is None else value * factor
    return product if addend is None else product + addend


def _moments(
    kernel: Kernel,
    shape: LayerNormShape,
    isa: Isa,
    buffers: tuple[Buffer, Buffer | None, Buffer],
    base: Expr,
    rows: int,
) -> tuple[list[Expr], list[Expr]]:
    """Return the mean of each row, and the inverse of its deviation.

    Of the buffers the first two are added into the third, where there are two. Without `centred`
    the means are those of the squares.
    """
    x, residual, total = buffers
    width, share = shape.width, splat(1 / shape.width, "float32", 1)

    def totals() -> Totals:
        return Totals(kernel, width, isa.lanes, rows, operator.add)

    sums = totals()
    for at, lanes, part in along(kernel, width, isa.lanes, rows):
        for row in range(rows):
            index = base + row * width + at
            value = load(x, index, lanes)
            if residual is not None:
                value = value + load(residual, index, lanes)
            value = kernel.let("value", value)
            if residual is not None:
                kernel.store(total, index, value, lanes)
            sums.take(row, value if shape.centred else value * value, lanes, part)
    means = [kernel.let("mean", value * share) for value in sums.totals()]
    variances = means
    if shape.centred:
        squares = totals()
        for at, lanes, part in along(kernel, width, isa.lanes, rows):
            for row in range(rows):
                value = load(total, base + row * width + at, lanes) - repeat(means[row], lanes)
                value = kernel.let("value", value)
                squares.take(row, value * value, lanes, part)
        variances = [kernel.let("variance", value * share) for value in squares.totals()]
    roots = [tirx.sqrt(value + splat(shape.epsilon, "float32", 1)) for value in variances]
    return means, [kernel.let("inverse", splat(1.0, "float32", 1) / root) for root in roots]
