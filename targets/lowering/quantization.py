"""What a quantized tensor's integers stand for, and how one scale becomes another.

Scales that are powers of two everywhere in a node make it fixed point: its multipliers are shifts
(docs/integer.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepress.targets.lowering.dialect import DOMAIN, array_of

Array = npt.NDArray[Any]
LIMITS = {"uint8": (0, 255), "int8": (-128, 127), "int16": (-(2**15), 2**15 - 1)}
"""Least and largest value of every dtype that activations may have."""

MOST_LEFT, MOST_RIGHT = -17, 32
"""Shifts beyond these change nothing: all but 0 saturates, and everything becomes 0."""

_LARGEST_MULTIPLIER = 2.0**96  # times any int32 it is still finite
_SMALLEST_SCALE = 2.0**-100
# Operators that compute nothing: their results lie within the bounds of what they move.
_MOVING = {
    "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Resize",
    "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
}  # fmt: skip


@dataclass(frozen=True)
class Quantization:
    """Scale, zero point and dtype of a quantized tensor in storage form."""

    scale: np.float32
    zero_point: int
    dtype: str

    @property
    def lowest(self) -> int:
        """Smallest value of the dtype."""
        return LIMITS[self.dtype][0]

    @property
    def highest(self) -> int:
        """Largest value of the dtype."""
        return LIMITS[self.dtype][1]

    def clamp(self, low: float, high: float) -> tuple[int, int]:
        """Return the clamp on stored values that equals a clamp on real ones."""
        bounds = []
        for bound in (low, high):
            real = np.clip(bound / np.float64(self.scale), -1e6, 1e6)
            stored = np.rint(real) + self.zero_point
            bounds.append(int(np.clip(stored, self.lowest, self.highest)))
        return min(bounds), bounds[1]  # where low exceeds high, ONNX's Clip answers high


@dataclass(frozen=True)
class Quantized:
    """An integer value and what it stands for."""

    value: ir.Value
    quantization: Quantization

    @property
    def reach(self) -> tuple[int, int]:
        """Least and largest value less the zero point, as far as the graph tells; 0 is inside."""
        low, high = bounds_of(self.value, self.quantization.dtype)
        point = self.quantization.zero_point
        return min(low - point, 0), max(high - point, 0)


@dataclass(frozen=True)
class Weight:
    """A constant behind a DequantizeLinear: integers, scale per channel or one, zero points."""

    array: Array
    scale: Array
    zero_point: Array
    axis: int

    def real(self) -> Array:
        """Return the float32 values that the integers stand for."""
        shape = [1] * self.array.ndim
        if self.scale.size > 1:
            shape[self.axis] = -1
        centred = self.array.astype(np.float32) - self.zero_point.reshape(shape)
        return np.asarray(centred.astype(np.float32) * self.scale.reshape(shape))


def bounds_of(value: ir.Value, dtype: str) -> tuple[int, int]:
    """Return limits of a value of an integer graph: those of its node's clamp, or of its dtype."""
    array, node = array_of(value), value.producer()
    if array is not None and array.size:
        return int(array.min()), int(array.max())
    if node is None:
        return LIMITS[dtype]
    if node.domain == DOMAIN and "low" in node.attributes:
        return node.attributes["low"].as_int(), node.attributes["high"].as_int()
    inputs = [v for v in node.inputs if v is not None]
    if node.op_type == "Table" and (entries := array_of(inputs[1])) is not None:
        places = node.attributes.get_int("fraction", 0)
        return int(entries.min()) >> places, -(-int(entries.max()) >> places)
    if node.op_type in _MOVING:
        return bounds_of(inputs[0], dtype)
    if node.op_type in ("Concat", "Pad"):  # a Pad has what it fills with, and counts of int64
        parts = [v for v in inputs if v.dtype == value.dtype]
        lows, highs = zip(*(bounds_of(v, dtype) for v in parts), strict=True)
        return min(lows), max(highs)
    return LIMITS[dtype]


def usable(scale: Array) -> bool:
    """Tell whether a scale is one that the arithmetic can divide by."""
    return bool((np.isfinite(scale) & np.greater_equal(scale, _SMALLEST_SCALE)).all())


def exponent(scale: Any) -> int | None:
    """Return n where the scale is 2**n, else None.

    >>> exponent(0.25), exponent(0.3)
    (-2, None)
    """
    mantissa, power = math.frexp(float(scale))
    return power - 1 if mantissa == 0.5 else None


def fixed_point_exponent(scale: Any, zero_point: int, dtype: str) -> int | None:
    """Return the exponent of a scale of a fixed-point graph; None where floats are quicker.

    >>> fixed_point_exponent(0.25, 128, "uint8"), fixed_point_exponent(0.25, 127, "uint8")
    (-2, None)
    """
    return exponent(scale) if zero_point == (128 if dtype == "uint8" else 0) else None


def are_powers_of_two(*scales: Any) -> bool:
    """Tell whether all scales, single ones and arrays of them, are powers of two."""
    return all(exponent(s) is not None for given in scales for s in np.ravel(np.asarray(given)))


def multiplier(ratio: Any) -> Array:
    """Round ratios of scales to float32; a huge one saturates any accumulator but 0 anyway."""
    return np.asarray(np.minimum(ratio, _LARGEST_MULTIPLIER), np.float32)


def shifts(ratios: Any) -> Array:
    """Return int32 n where `a * ratio = a / 2**n`, for ratios that are powers of two."""
    exponents = [-(math.frexp(float(ratio))[1] - 1) for ratio in np.ravel(np.asarray(ratios))]
    limited = np.clip(np.array(exponents, np.int64), MOST_LEFT, MOST_RIGHT)
    return limited.astype(np.int32).reshape(np.shape(ratios))


def factor_attribute(ratio: np.float64, *scales: Any) -> dict[str, Any]:
    """Return the attribute by which one ratio scales accumulators: a shift or a multiplier.

    Args:
        ratio: of the accumulator's scale to the output's.
        scales: of all inputs and the output; a shift needs powers of two throughout.
    """
    if are_powers_of_two(*scales):
        return {"shift": int(shifts(ratio))}
    return {"multiplier": float(multiplier(ratio))}


def output_attributes(target: Quantization, bounds: tuple[int, int]) -> dict[str, int]:
    """Return the attributes that every requantising node has."""
    return {"zero_point": target.zero_point, "low": bounds[0], "high": bounds[1]}
