"""Softmax in integers: a table of exponentials, a sum, one division of 32 bits per element.

The rule that it implements to the bit, and why nothing overflows, is in docs/integer.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from edgepress.targets.schedules.emit import Buffer, Expr, Kernel, load
from edgepress.targets.schedules.epilogue import Requantise

EXPONENTIAL_BITS = 29
LARGEST_DIVISOR = 2**31 - 1
_PARALLEL_SIZE = 8 * 1024  # elements; each costs a division


@dataclass(frozen=True)
class SoftmaxShape:
    """A tensor `[outer, length, inner]` whose middle axis sums to 1."""

    outer: int
    length: int
    inner: int = 1


def softmax(
    name: str, shape: SoftmaxShape, dtype: str, factor: int, shift: int, epilogue: Requantise
) -> Any:
    """Generate `y = zero_point + e(max - x) / d` per row: arguments x, table int32, and y.

    `d` is the sum of the row's `e` times `factor / 2**shift`. The table has 256 entries for 8-bit
    x, and for int16 256 of the upper byte and 256 of the lower one, whose product `e` is.

    Args:
        name: of the function.
        shape: of x and y.
        dtype: of x, `uint8`, `int8` or `int16`.
        factor: below 2**16.
        shift: above 0.
        epilogue: of y.
    """
    kernel = Kernel(name)
    size, rows = shape.outer * shape.length * shape.inner, shape.outer * shape.inner
    x = kernel.argument("x", dtype, size)
    table = kernel.argument("table", "int32", 512 if dtype == "int16" else 256)
    y = kernel.argument("y", epilogue.dtype, size)
    with kernel.loop("row", rows, parallel=size >= _PARALLEL_SIZE) as row:
        start = row * shape.length
        if shape.inner > 1:
            outer, inner = tirx.floordiv(row, shape.inner), tirx.floormod(row, shape.inner)
            start = outer * (shape.length * shape.inner) + inner
        start = kernel.let("start", start)

        def at(i: Expr) -> Expr:
            return start + i * shape.inner

        largest = kernel.registers("largest", dtype, 1)
        kernel.store(largest, 0, load(x, at(0)))
        with kernel.loop("i", shape.length) as i:
            kernel.store(largest, 0, tirx.Max(load(largest, 0), load(x, at(i))))
        top = kernel.let("top", tirx.Cast("int32", load(largest, 0)))

        def exponential(i: Expr) -> Expr:
            below = top - tirx.Cast("int32", load(x, at(i)))
            return _product(table, below) if dtype == "int16" else load(table, below)

        total = kernel.registers("total", "int64", 1)
        kernel.store(total, 0, tirx.const(0, "int64"))
        with kernel.loop("i", shape.length) as i:
            kernel.store(total, 0, load(total, 0) + tirx.Cast("int64", exponential(i)))
        divisor = kernel.let("divisor", _scaled(load(total, 0), factor, shift))
        half = kernel.let("half", tirx.shift_right(divisor, tirx.const(1, "int32")))
        with kernel.loop("i", shape.length) as i:
            steps = tirx.truncdiv(exponential(i) + half, divisor) + epilogue.zero_point
            clamped = tirx.Max(tirx.Min(steps, epilogue.high), epilogue.low)
            kernel.store(y, at(i), tirx.Cast(epilogue.dtype, clamped))
    return kernel.finish()


def _product(table: Buffer, below: Expr) -> Expr:
    """Multiply the exponentials of the two bytes of a distance; both are in units of 2**-29."""
    upper = load(table, tirx.shift_right(below, tirx.const(8, "int32")))
    lower = load(table, tirx.bitwise_and(below, tirx.const(255, "int32")) + 256)
    product = tirx.Cast("int64", upper) * tirx.Cast("int64", lower)
    rounded = product + tirx.const(1 << (EXPONENTIAL_BITS - 1), "int64")
    return tirx.Cast("int32", tirx.shift_right(rounded, tirx.const(EXPONENTIAL_BITS, "int64")))


def _scaled(total: Expr, factor: int, shift: int) -> Expr:
    """Return the int32 nearest to `total * factor / 2**shift`, at most LARGEST_DIVISOR."""
    product = total * tirx.const(factor, "int64") + tirx.const(1 << (shift - 1), "int64")
    shifted = tirx.shift_right(product, tirx.const(shift, "int64"))
    return tirx.Cast("int32", tirx.Min(shifted, tirx.const(LARGEST_DIVISOR, "int64")))
