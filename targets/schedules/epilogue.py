"""The last step of every kernel: accumulators become outputs.

Integer outputs follow one of the two rules of docs/integer.md. With multipliers::

    y = zero_point + round_half_even(clamp(float32(accumulator) * multiplier, low, high))

in float32, with `low = y_min - zero_point` and `high = y_max - zero_point`. Clamping comes before
rounding, so that adding 1.5 * 2**23 rounds to an integer exactly and no fused multiply-add can
change a bit: every instruction is a correctly rounded IEEE 754 operation on every target.

With shifts, in integers alone::

    y = zero_point + clamp(round_half_even(accumulator / 2**n), low, high)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx

from edgepress.targets.schedules.emit import Expr, cast, splat, vector

_ROUNDING = 12582912.0  # 1.5 * 2**23: the sum's last mantissa bit is worth 1
_ROUNDING_BITS = 0x4B400000
_BEYOND = 2**17  # more than any output less its zero point


@dataclass(frozen=True)
class Requantise:
    """An 8-bit or 16-bit output: dtype, zero point and the clamp that a fused activation leaves."""

    dtype: str
    zero_point: int
    low: int
    high: int


@dataclass(frozen=True)
class Shift(Requantise):
    """An output by shifts instead of float32 multipliers.

    Attributes:
        left: whether some shifts are negative. Without, kernels do less.
    """

    left: bool = False


@dataclass(frozen=True)
class Clip:
    """A float32 output, clamped to `[low, high]` by a fused ReLU or Clip (infinite: not at all)."""

    low: float = -np.inf
    high: float = np.inf
    dtype: str = "float32"


Epilogue = Requantise | Clip


def factor_dtype(epilogue: Requantise) -> str:
    """Return the dtype of what scales accumulators: shifts or multipliers."""
    return "int32" if isinstance(epilogue, Shift) else "float32"


def requantise(scaled: Expr, epilogue: Requantise, lanes: int) -> Expr:
    """Turn float32 lanes, already multiplied, into output lanes by the rule above."""
    clamped = tirx.Max(
        tirx.Min(scaled, splat(float(epilogue.high - epilogue.zero_point), "float32", lanes)),
        splat(float(epilogue.low - epilogue.zero_point), "float32", lanes),
    )
    rounded = tirx.reinterpret(vector("int32", lanes), clamped + splat(_ROUNDING, "float32", lanes))
    integer = rounded - splat(_ROUNDING_BITS - epilogue.zero_point, "int32", lanes)
    return cast(integer, epilogue.dtype, lanes)


def nearest(value: Expr, lanes: int) -> Expr:
    """Round float32 lanes of magnitude below 2**22 half to even; int32 lanes.

    The value must not be a product: fused with the addition here, it would round only once.
    """
    sums = tirx.reinterpret(vector("int32", lanes), value + splat(_ROUNDING, "float32", lanes))
    return sums - splat(_ROUNDING_BITS, "int32", lanes)


def clamped_output(rounded: Expr, epilogue: Requantise, lanes: int, dtype: str = "int32") -> Expr:
    """Clamp integer lanes that are rounded already, add the zero point and narrow them."""
    clamped = tirx.Max(
        tirx.Min(rounded, splat(epilogue.high - epilogue.zero_point, dtype, lanes)),
        splat(epilogue.low - epilogue.zero_point, dtype, lanes),
    )
    narrow = clamped if dtype == "int32" else cast(clamped, "int32", lanes)
    return cast(narrow + splat(epilogue.zero_point, "int32", lanes), epilogue.dtype, lanes)


def divided(value: Expr, places: int, lanes: int, dtype: str = "int32") -> Expr:
    """Return `round_half_even(value / 2**places)` for a constant, exactly, without overflow.

    Where `places` is negative, a result beyond any output may be another one.
    """
    bits = 32 if dtype == "int32" else 64
    if places == 0:
        return value
    if places < 0:
        return _doubled(value, splat(-places, dtype, lanes), lanes, dtype)
    if places >= bits:
        return splat(0, dtype, lanes)
    quotient = value >> splat(places, dtype, lanes)
    rest = value & splat(2**places - 1, dtype, lanes)
    odd = quotient & splat(1, dtype, lanes)
    return quotient - negative(splat(2 ** (places - 1), dtype, lanes) - odd - rest, lanes, dtype)


def negative(value: Expr, lanes: int, dtype: str = "int32") -> Expr:
    """Return -1 where the value is negative, else 0. TVM cannot reason about vectors of bool."""
    return value >> splat(31 if dtype == "int32" else 63, dtype, lanes)


def shifted(value: Expr, places: Expr, left: bool, lanes: int) -> Expr:
    """Return the same for one shift per lane, all of them in [-17, 31], on int32."""
    zero, one = splat(0, "int32", lanes), splat(1, "int32", lanes)
    right = tirx.Max(places, zero) if left else places
    quotient = value >> right
    # All ones below the point. Half of it, rounded down, is one less than a tie.
    mask = cast(
        (splat(1, "uint32", lanes) << cast(right, "uint32", lanes)) - splat(1, "uint32", lanes),
        "int32",
        lanes,
    )
    limit = (mask >> one) + one - (quotient & one)
    rounded = quotient - negative(limit - (value & mask), lanes)
    if not left:
        return rounded
    return _doubled(rounded, tirx.Max(zero - places, zero), lanes, "int32")


def _doubled(value: Expr, places: Expr, lanes: int, dtype: str) -> Expr:
    """Shift left, at most 17 places, without overflow: what lies beyond any output stays there."""
    bound = splat(_BEYOND, dtype, lanes) >> places
    limited = tirx.Max(tirx.Min(value, bound), splat(0, dtype, lanes) - bound)
    return limited << places


def finish(accumulator: Expr, multiplier: Expr | None, epilogue: Epilogue, lanes: int) -> Expr:
    """Turn accumulator lanes into output lanes.

    Args:
        accumulator: int32 with a factor, or float32 without.
        multiplier: float32 lanes, or int32 lanes of shifts for `Shift`.
        epilogue: what to do.
        lanes: how many.
    """
    if isinstance(epilogue, Shift):
        rounded = shifted(accumulator, multiplier, epilogue.left, lanes)
        return clamped_output(rounded, epilogue, lanes)
    if isinstance(epilogue, Requantise):
        return requantise(cast(accumulator, "float32", lanes) * multiplier, epilogue, lanes)
    if epilogue.low != -np.inf:
        accumulator = tirx.Max(accumulator, splat(float(epilogue.low), "float32", lanes))
    if epilogue.high != np.inf:
        accumulator = tirx.Min(accumulator, splat(float(epilogue.high), "float32", lanes))
    return accumulator
