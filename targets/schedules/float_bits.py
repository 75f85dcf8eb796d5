"""Quantize and Dequantize at scales that are powers of two, on the bits of float32 values.

They answer exactly what the float formulas do, without a float instruction: the kernels see float32
memory as int32. IEEE 754: one sign bit, 8 of the exponent, 23 of the fraction.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from edgepress.targets.isa.base import Isa
from edgepress.targets.schedules.elementwise import for_each
from edgepress.targets.schedules.emit import Expr, Kernel, cast, load, splat
from edgepress.targets.schedules.epilogue import Requantise, clamped_output, negative

_FRACTION_BITS = 23
_IMPLIED = 2**_FRACTION_BITS
_BIAS = 127 + _FRACTION_BITS  # a value is its fraction with the implied bit, times 2**(e - bias)


def quantise(name: str, size: int, isa: Isa, exponent: int, epilogue: Requantise) -> Any:
    """Generate `y = zero_point + clamp(round_half_even(x / 2**exponent))`; NaN is the highest.

    Arguments of the kernel: x float32, which it reads as int32, and y. `exponent` is at least -100.
    """
    kernel = Kernel(name)
    x = kernel.argument("x", "int32", size)
    y = kernel.argument("y", epilogue.dtype, size)

    def body(index: Expr, _within: Expr, lanes: int) -> None:
        def all_lanes(value: int) -> Expr:
            return splat(value, "int32", lanes)

        one = all_lanes(1)
        bits = kernel.let("bits", load(x, index, lanes))
        magnitude = kernel.let("magnitude", bits & all_lanes(2**31 - 1))
        power = kernel.let("power", magnitude >> all_lanes(_FRACTION_BITS))
        below = kernel.let("below", magnitude & all_lanes(_IMPLIED - 1))
        # None or one leave more than any output holds, so that infinity and NaN saturate; 25 leave
        # nothing.
        places = tirx.Max(all_lanes(_BIAS + exponent) - power, all_lanes(1))
        finite = kernel.let("finite", negative(power - all_lanes(255), lanes))
        places = kernel.let("places", tirx.Min(places, all_lanes(25)) & finite)
        fraction = kernel.let("fraction", below | all_lanes(_IMPLIED))
        quotient = kernel.let("quotient", fraction >> places)
        mask = kernel.let("mask", (one << places) - one)
        limit = (mask >> one) + one - (quotient & one) - (fraction & mask)
        rounded = kernel.let("rounded", quotient - negative(limit, lanes))
        whole = all_lanes(-1) - negative(all_lanes(0) - below, lanes)  # no bit below the implied
        number = finite | whole
        sign = kernel.let("sign", (bits >> all_lanes(31)) & number)
        kernel.store(y, index, clamped_output((rounded ^ sign) - sign, epilogue, lanes), lanes)

    for_each(kernel, size, size, isa.lanes, body)
    return kernel.finish()


def dequantise(name: str, size: int, isa: Isa, exponent: int, dtype: str, zero_point: int) -> Any:
    """Generate `y = (x - zero_point) * 2**exponent`: x, and y float32, written as int32.

    `exponent` is at least -100.
    """
    kernel = Kernel(name)
    x = kernel.argument("x", dtype, size)
    y = kernel.argument("y", "int32", size)

    def body(index: Expr, _within: Expr, lanes: int) -> None:
        def all_lanes(value: int) -> Expr:
            return splat(value, "int32", lanes)

        centred = cast(load(x, index, lanes), "int32", lanes) - all_lanes(zero_point)
        centred = kernel.let("centred", centred)
        sign = kernel.let("sign", centred >> all_lanes(31))
        fraction: Expr = kernel.let("fraction", (centred ^ sign) - sign)
        something = kernel.let("something", negative(all_lanes(0) - fraction, lanes))
        power: Expr = all_lanes(_BIAS + exponent)
        for places in (16, 8, 4, 2, 1):  # until the highest bit is the implied one
            small = negative(fraction - all_lanes(2 ** (24 - places)), lanes)
            moved = kernel.let("moved", small & all_lanes(places))
            fraction = kernel.let("fraction", fraction << moved)
            power = kernel.let("power", power - moved)
        below = fraction - all_lanes(_IMPLIED)
        # From 111 on, some values are infinite. From 106 on, LLVM would join constants to one that
        # it can only make by negating a float.
        if exponent > 100:
            below = below & negative(power - all_lanes(255), lanes)
            power = tirx.Min(power, all_lanes(255))
        value = (power << all_lanes(_FRACTION_BITS)) + below
        kernel.store(y, index, (value & something) | (sign << all_lanes(31)), lanes)

    for_each(kernel, size, size, isa.lanes, body)
    return kernel.finish()
