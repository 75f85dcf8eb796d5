"""The last step of every kernel: accumulators become outputs.

Integer outputs follow one of the two rules of docs/integer.md. With multipliers::

    y = zero_point + round_half_even(clamp(float32(accumulator) * multiplier, low, high))

in float32, with `low = y_min - zero_point` and `high = y_max - zero_point`. Clamping comes before
rounding, so that adding 1.5 * 2**23 rounds to an integer exactly and no fused multiply-add can
change a bit: every instruction is a correctly rounded IEEE 754 operation on every target.

With shifts, in integers alone::

    y = zero_point + clamp(round_half_even(accumulator / 2**n), low, high)

`Added` puts the sum with another tensor, a residual, behind either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from tvm import tirx

from edgepress.targets.schedules.activations import Activation, activated
from edgepress.targets.schedules.elementary import fence
from edgepress.targets.schedules.emit import Expr, cast, splat, vector

_ROUNDING = 12582912.0  # 1.5 * 2**23: the sum's last mantissa bit is worth 1
_ROUNDING_BITS = 0x4B400000
_BEYOND = 2**17  # more than any output less its zero point


@dataclass(frozen=True)
class Requantise:
    """An 8-bit or 16-bit output: dtype, zero point and the clamp that a fused activation leaves.

    Attributes:
        dtype, zero_point, low, high: as they say.
        fits: whether no accumulator times its multiplier reaches 2**31, as with multipliers below
            1. Kernels may then clamp after rounding.
    """

    dtype: str
    zero_point: int
    low: int
    high: int
    fits: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class Shift(Requantise):
    """An output by shifts instead of float32 multipliers.

    Attributes:
        left: whether some shifts are negative. Without, kernels do less.
    """

    left: bool = False


@dataclass(frozen=True)
class Clip:
    """A float32 output, clamped to `[low, high]` by a fused ReLU or Clip (infinite: not at all).

    An activation function, if there is one, comes after the clamp.
    """

    low: float = -np.inf
    high: float = np.inf
    dtype: str = "float32"
    activation: Activation | None = None


@dataclass(frozen=True)
class Added:
    """An output plus a residual: a tensor of the output's shape that is added in registers.

    Integers follow the rule of Add in docs/integer.md to the bit: accumulators become the integers
    that would have been stored (`inner`), these and the residual are centred and scaled by
    `factors`, and the sum becomes the output by `factor`, a multiplier or places to shift, and
    `final`. Floats are added as they are.

    Attributes:
        inner: what accumulators become before the addition.
        final: what the sum becomes.
        residual_dtype: dtype of the residual.
        residual_zero_point: its zero point.
        factors: of the inner output and of the residual.
        factor: of the sum.
    """

    inner: Requantise | Clip
    final: Requantise | Clip
    residual_dtype: str = "float32"
    residual_zero_point: int = 0
    factors: tuple[int, int] = (1, 1)
    factor: float = 1.0

    @property
    def dtype(self) -> str:
        """Dtype of the output."""
        return self.final.dtype


Epilogue = Requantise | Clip | Added


def first_step(epilogue: Epilogue) -> Requantise | Clip:
    """Return what accumulators become before anything is added to them."""
    return epilogue.inner if isinstance(epilogue, Added) else epilogue


def factor_dtype(epilogue: Requantise) -> str:
    """Return the dtype of what scales accumulators: shifts or multipliers."""
    return "int32" if isinstance(epilogue, Shift) else "float32"


def requantise(scaled: Expr, epilogue: Requantise, lanes: int) -> Expr:
    """Turn float32 lanes, already multiplied, into output lanes by the rule above."""
    return cast(requantised(scaled, epilogue, lanes), epilogue.dtype, lanes)


def requantised(scaled: Expr, epilogue: Requantise, lanes: int) -> Expr:
    """Return the same in int32 lanes."""
    rounded = nearest(_limited(scaled, epilogue, lanes), lanes)
    return rounded + splat(epilogue.zero_point, "int32", lanes)


def _limited(scaled: Expr, epilogue: Requantise, lanes: int) -> Expr:
    """Clamp float32 lanes to the limits less the zero point."""
    return tirx.Max(
        tirx.Min(scaled, splat(float(epilogue.high - epilogue.zero_point), "float32", lanes)),
        splat(float(epilogue.low - epilogue.zero_point), "float32", lanes),
    )


def _output(centred: Expr, epilogue: Requantise, lanes: int) -> Expr:
    """Add the zero point to int32 lanes that are clamped already, and narrow them."""
    return cast(centred + splat(epilogue.zero_point, "int32", lanes), epilogue.dtype, lanes)


def nearest(value: Expr, lanes: int) -> Expr:
    """Round float32 lanes of magnitude below 2**22 half to even; int32 lanes.

    The value must not be a product: fused with the addition here, it would round only once.
    """
    sums = tirx.reinterpret(vector("int32", lanes), value + splat(_ROUNDING, "float32", lanes))
    return sums - splat(_ROUNDING_BITS, "int32", lanes)


def clamped_output(rounded: Expr, epilogue: Requantise, lanes: int, dtype: str = "int32") -> Expr:
    """Clamp integer lanes that are rounded already, add the zero point and narrow them."""
    return _output(_clamped(rounded, epilogue, lanes, dtype), epilogue, lanes)


def _clamped(rounded: Expr, epilogue: Requantise, lanes: int, dtype: str = "int32") -> Expr:
    """Clamp integer lanes that are rounded already; int32 lanes without the zero point."""
    clamped = tirx.Max(
        tirx.Min(rounded, splat(epilogue.high - epilogue.zero_point, dtype, lanes)),
        splat(epilogue.low - epilogue.zero_point, dtype, lanes),
    )
    return clamped if dtype == "int32" else cast(clamped, "int32", lanes)


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


def finish(
    accumulator: Expr,
    multiplier: Expr | None,
    epilogue: Epilogue,
    lanes: int,
    residual: Expr | None = None,
) -> Expr:
    """Turn accumulator lanes into output lanes.

    Args:
        accumulator: int32 with a factor, or float32 without.
        multiplier: float32 lanes, or int32 lanes of shifts for `Shift`.
        epilogue: what to do.
        lanes: how many.
        residual: what is added, for `Added` alone: lanes of `epilogue.residual_dtype`.
    """
    if isinstance(epilogue, Added):
        return _finish_added(accumulator, multiplier, epilogue, lanes, residual)
    if isinstance(epilogue, Shift):
        rounded = shifted(accumulator, multiplier, epilogue.left, lanes)
        return clamped_output(rounded, epilogue, lanes)
    if isinstance(epilogue, Requantise):
        return requantise(cast(accumulator, "float32", lanes) * multiplier, epilogue, lanes)
    if epilogue.low != -np.inf:
        accumulator = tirx.Max(accumulator, splat(float(epilogue.low), "float32", lanes))
    if epilogue.high != np.inf:
        accumulator = tirx.Min(accumulator, splat(float(epilogue.high), "float32", lanes))
    if epilogue.activation is not None:
        return activated(accumulator, epilogue.activation, lanes)
    return accumulator


def _finish_added(
    accumulator: Expr, multiplier: Expr | None, epilogue: Added, lanes: int, residual: Expr | None
) -> Expr:
    """Turn accumulator lanes and residual lanes into output lanes."""
    if not isinstance(epilogue.inner, Requantise):
        own = finish(accumulator, multiplier, epilogue.inner, lanes)
        return finish(own + residual, None, epilogue.final, lanes)
    assert isinstance(epilogue.final, Requantise)
    own = _centred(accumulator, multiplier, epilogue.inner, lanes)
    point = splat(epilogue.residual_zero_point, "int32", lanes)
    total = weighted_sum([own, cast(residual, "int32", lanes) - point], epilogue.factors, lanes)
    return finish_sum(total, epilogue.factor, epilogue.final, lanes)


def weighted_sum(values: Sequence[Expr], factors: Sequence[int], lanes: int) -> Expr:
    """Return the sum of int32 lanes, each times its factor."""
    a, b = (
        value * splat(factor, "int32", lanes) for value, factor in zip(values, factors, strict=True)
    )
    return a + b


def finish_sum(total: Expr, factor: float, epilogue: Requantise, lanes: int) -> Expr:
    """Turn int32 lanes into output lanes by one factor: a multiplier, or places for `Shift`."""
    if isinstance(epilogue, Shift):
        return clamped_output(divided(total, int(factor), lanes), epilogue, lanes)
    scaled = cast(total, "float32", lanes) * splat(factor, "float32", lanes)
    return requantise(scaled, epilogue, lanes)


def _centred(accumulator: Expr, multiplier: Expr | None, epilogue: Requantise, lanes: int) -> Expr:
    """Turn int32 accumulator lanes into outputs less their zero point, int32 still."""
    if isinstance(epilogue, Shift):
        rounded = shifted(accumulator, multiplier, epilogue.left, lanes)
        return _clamped(rounded, epilogue, lanes)
    limited = _limited(cast(accumulator, "float32", lanes) * multiplier, epilogue, lanes)
    # Not `nearest`: TVM would multiply its constant by a factor at compile time, and overflow.
    rounding = splat(_ROUNDING, "float32", lanes)
    return cast(fence(limited + rounding) - rounding, "int32", lanes)
