"""Functions of 16-bit values: tables that are interpolated in integers (docs/integer.md)."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from edgepress.targets.isa.base import Isa
from edgepress.targets.schedules.elementwise import for_each
from edgepress.targets.schedules.emit import Expr, Kernel, load

_LEAST = -(2**15)


def interpolate(name: str, size: int, isa: Isa, bits: int, fraction: int, dtype: str) -> Any:
    """Generate the kernel: x int16, table int16 `[2**(16 - bits) + 1]`, y of `dtype`.

    Args:
        name: of the function.
        size: elements of x.
        isa: for how many elements to take at once.
        bits: steps of x between two entries, as a power of two.
        fraction: bits of an entry that y does not have.
        dtype: of y.
    """
    kernel = Kernel(name)
    x = kernel.argument("x", "int16", size)
    table = kernel.argument("table", "int16", 2 ** (16 - bits) + 1)
    y = kernel.argument("y", dtype, size)
    places = bits + fraction
    half = 2**places >> 1

    def element(at: Expr) -> None:
        steps = kernel.let("steps", tirx.Cast("int32", load(x, at)) - _LEAST)
        index = kernel.let("index", steps >> bits)
        base = kernel.let("base", tirx.Cast("int32", load(table, index)))
        slope = tirx.Cast("int32", load(table, index + 1)) - base
        value = base * 2**bits + slope * (steps & (2**bits - 1)) + half
        kernel.store(y, at, tirx.Cast(dtype, value >> places))

    def body(index: Expr, _within: Expr, lanes: int) -> None:
        with kernel.loop("lane", lanes) as lane:
            element(index + lane)

    for_each(kernel, size, size, isa.lanes, body)
    return kernel.finish()
