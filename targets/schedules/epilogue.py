"""The last step of every kernel: accumulators become outputs.

Integer outputs follow the one requantisation rule of edgepress (docs/integer.md)::

    y = zero_point + round_half_even(clamp(float32(accumulator) * multiplier, low, high))

in float32, with `low = y_min - zero_point` and `high = y_max - zero_point`. Clamping comes before
rounding, so that adding 1.5 * 2**23 rounds to an integer exactly and no fused multiply-add can
change a bit: every instruction is a correctly rounded IEEE 754 operation on every target.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx

from edgepress.targets.schedules.emit import Expr, cast, splat, vector

_ROUNDING = 12582912.0  # 1.5 * 2**23: the sum's last mantissa bit is worth 1
_ROUNDING_BITS = 0x4B400000


@dataclass(frozen=True)
class Requantise:
    """An 8-bit output: its dtype, zero point and the clamp that a fused activation leaves."""

    dtype: str
    zero_point: int
    low: int
    high: int


@dataclass(frozen=True)
class Clip:
    """A float32 output, clamped to `[low, high]` by a fused ReLU or Clip (infinite: not at all)."""

    low: float = -np.inf
    high: float = np.inf
    dtype: str = "float32"


Epilogue = Requantise | Clip


def requantise(scaled: Expr, epilogue: Requantise, lanes: int) -> Expr:
    """Turn float32 lanes, already multiplied, into 8-bit lanes by the rule above."""
    clamped = tirx.Max(
        tirx.Min(scaled, splat(float(epilogue.high - epilogue.zero_point), "float32", lanes)),
        splat(float(epilogue.low - epilogue.zero_point), "float32", lanes),
    )
    rounded = tirx.reinterpret(vector("int32", lanes), clamped + splat(_ROUNDING, "float32", lanes))
    integer = rounded - splat(_ROUNDING_BITS - epilogue.zero_point, "int32", lanes)
    return cast(integer, epilogue.dtype, lanes)


def finish(accumulator: Expr, multiplier: Expr | None, epilogue: Epilogue, lanes: int) -> Expr:
    """Turn accumulator lanes (int32 with a multiplier, or float32 without) into output lanes."""
    if isinstance(epilogue, Requantise):
        return requantise(cast(accumulator, "float32", lanes) * multiplier, epilogue, lanes)
    if epilogue.low != -np.inf:
        accumulator = tirx.Max(accumulator, splat(float(epilogue.low), "float32", lanes))
    if epilogue.high != np.inf:
        accumulator = tirx.Min(accumulator, splat(float(epilogue.high), "float32", lanes))
    return accumulator
