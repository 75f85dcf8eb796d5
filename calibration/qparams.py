"""Scales and zero points, and the arithmetic of QuantizeLinear and DequantizeLinear, in NumPy.

A real number r is represented by the integer q as `r = scale · (q - zero_point)` (Jacob et al.,
"Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
2018). The conventions are those of onnxruntime's static quantization, so that both tools give the
same integers from the same ranges.
"""

from __future__ import annotations

import math

import numpy as np

from edgepress.calibration.base import Array, CalibrationError, Range

#: No scale is smaller: the product of an activation's and a weight's scale stays a normal float32
#: as long as one of them is above 2**-26.
SMALLEST_SCALE = 2.0**-100

#: Quantized biases stay below this: room in int32 for as much again in the sum of products.
LARGEST_BIAS = 2**30

LIMITS = {
    "uint8": (0, 255),
    "int8": (-128, 127),
    "int16": (-(2**15), 2**15 - 1),
    "int32": (-(2**31), 2**31 - 1),
}


def activation_qparams(
    value_range: Range, dtype: str = "uint8", *, symmetric: bool = False
) -> tuple[np.float32, int]:
    """Return the scale and the zero point of a tensor with this range.

    The range is widened to hold 0, and 0 is represented exactly: padding with zeros must cost
    nothing.

    Args:
        value_range: what must be represented.
        dtype: "uint8", "int8" or "int16".
        symmetric: put the zero point in the middle (128 or 0) and use as many steps on either side.

    Returns:
        A positive, finite scale of at least 2**-100, and a zero point within the dtype. A range
        of nothing but 0 gets scale 1: any scale represents it, and 1 keeps products of scales
        finite and the quantized zeros obvious.

    Raises:
        CalibrationError: the range is not finite or is reversed.

    >>> activation_qparams(Range(-1.0, 1.55))
    (np.float32(0.01), 100)
    """
    if not (math.isfinite(value_range.low) and math.isfinite(value_range.high)):
        raise CalibrationError(f"the range {value_range.low} to {value_range.high} is not finite.")
    if value_range.low > value_range.high:
        raise CalibrationError(f"the range {value_range.low} to {value_range.high} is reversed.")
    qmin, qmax = LIMITS[dtype]
    low, high = min(value_range.low, 0.0), max(value_range.high, 0.0)
    middle = (qmin + qmax + 1) // 2
    if low == high:
        return np.float32(1.0), middle if symmetric else max(qmin, 0)
    if symmetric:
        scale = max(-low, high) / ((qmax - qmin) // 2)
        return np.float32(max(scale, SMALLEST_SCALE)), middle
    scale = max((high - low) / (qmax - qmin), SMALLEST_SCALE)
    zero_point = round(qmin - low / scale)
    return np.float32(scale), min(max(zero_point, qmin), qmax)


def weight_qparams(weight: Array, axis: int | None) -> tuple[Array, Array]:
    """Return symmetric int8 scales and zero points of a weight, in [-127, 127].

    Args:
        weight: float32, any shape.
        axis: the axis that has one scale per index, or None for one scale. `[32, 3, 3, 3]` with
            axis 0 gives scales `[32]`.

    Returns:
        float32 scales `[shape[axis]]` (or `[]`) of at least 2**-100, and int8 zeros of the same
        shape. A channel of nothing but 0 (a pruned one) borrows the largest scale of its tensor,
        or 1/127 where all of it is 0: its scale matters to its bias alone, which then gets about
        the resolution that its neighbours have.
    """
    magnitude = np.abs(weight, dtype=np.float64)
    if axis is None:
        largest = np.array(magnitude.max(initial=0.0))
    else:
        others = tuple(i for i in range(weight.ndim) if i != axis % weight.ndim)
        largest = magnitude.max(axis=others, initial=0.0)
    borrowed = largest.max(initial=0.0) or 1.0
    scales = np.where(largest > 0.0, largest, borrowed) / 127
    return np.maximum(scales, SMALLEST_SCALE).astype(np.float32), np.zeros(scales.shape, np.int8)


def fit_bias(scales: Array, input_scale: np.float32, bias: Array | None) -> Array:
    """Enlarge weight scales until int32 can hold the bias at scale `input_scale · scale`.

    A channel with tiny weights and a large bias (a batch norm folded into a dead channel) would
    need a bias beyond int32. Coarser steps for its weights cost little: they are small beside the
    bias. onnxruntime and TensorFlow Lite's converter do the same.

    Args:
        scales: float32 `[channels]` or `[]`, from weight_qparams.
        input_scale: of the activation that the weight multiplies.
        bias: float32 `[channels]`, or None.

    Returns:
        float32 scales of the same shape, none smaller; `|bias / (input_scale · scale)| < 2**30`
        and `input_scale · scale >= 2**-100`.
    """
    needed = np.full(scales.shape, SMALLEST_SCALE)
    if bias is not None:
        magnitude = np.abs(bias, dtype=np.float64)
        largest = magnitude if scales.ndim else magnitude.max(initial=0.0)
        needed = np.maximum(needed, largest / LARGEST_BIAS)
    # a little above the least: the float32 product rounds
    needed = needed / np.float64(input_scale) * (1 + 2.0**-20)
    product = scales.astype(np.float64)
    return np.where(product < needed, needed, product).astype(np.float32)


def quantize(
    values: Array, scale: Array | np.float32, zero_point: Array | int, dtype: str,
    axis: int | None = None,
) -> Array:  # fmt: skip
    """QuantizeLinear: divide in float32, round half to even, add the zero point, saturate.

    Args:
        values: float32, any shape.
        scale: float32, one or `[shape[axis]]`.
        zero_point: integers, as many as scales or one.
        dtype: "uint8", "int8" or "int16".
        axis: the axis of the scales, or None for a single scale.

    Returns:
        The integers, in the shape of `values`.
    """
    qmin, qmax = LIMITS[dtype]
    scale, zero_point = _along(scale, values, axis), _along(zero_point, values, axis)
    with np.errstate(over="ignore"):  # a value far outside the range saturates
        steps = np.rint(values.astype(np.float32) / scale.astype(np.float32))
    integers: Array = np.clip(steps + zero_point, qmin, qmax).astype(dtype)
    return integers


def dequantize(
    integers: Array, scale: Array | np.float32, zero_point: Array | int, axis: int | None = None
) -> Array:
    """DequantizeLinear: `(integers - zero_point) · scale` in float32; arguments as in quantize."""
    scale, zero_point = _along(scale, integers, axis), _along(zero_point, integers, axis)
    centred = integers.astype(np.int64) - zero_point.astype(np.int64)
    real: Array = centred.astype(np.float32) * scale.astype(np.float32)
    return real


def quantize_bias(bias: Array, scale: Array) -> Array:
    """Round a bias to int32 at the scale of the products, zero point 0.

    Args:
        bias: float32 `[channels]`.
        scale: float32 `[channels]` or `[]`: input scale · weight scale.

    Returns:
        int32 `[channels]`, saturated.
    """
    qmin, qmax = LIMITS["int32"]
    steps = np.rint(bias.astype(np.float64) / scale.astype(np.float64))
    return np.clip(steps, qmin, qmax).astype(np.int32)


def _along(parameter: Array | np.float32 | int, values: Array, axis: int | None) -> Array:
    """Reshape scales or zero points so that they broadcast along the axis."""
    array = np.asarray(parameter)
    if axis is None or array.ndim == 0:
        return array
    shape = [1] * values.ndim
    shape[axis] = -1
    return array.reshape(shape)
