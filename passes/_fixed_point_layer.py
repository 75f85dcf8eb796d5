"""The fixed-point integers of one layer, such that no int32 sum overflows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array, Range
from edgepress.calibration.fixed_point import (
    MOST_FRACTION_BITS,
    Format,
    Rounding,
    fitting_format,
    to_fixed,
)
from edgepress.passes._bias_correction import mean_shift
from edgepress.passes._quantized_layer import QuantizedLayer, channel_axis

#: A sum in int32 stays below this.
ACCUMULATOR = 2**31
#: The scale of a bias is that of the products, which must be a finite float32.
_FEWEST_PRODUCT_BITS = -127


@dataclass(frozen=True)
class FixedPointLayer(QuantizedLayer):
    """A Conv, Gemm or MatMul in fixed point; `rescaled` channels are coarser than weights ask for.

    Attributes:
        fraction_bits: of the weights, int64 `[output channels]` or `[]`.
        saturated: weights that their format does not hold.
        saturated_biases: biases that int32 does not hold.
        noise: `Σ(ŵ - w)² / Σw²` in the mean over the channels, 0 where all weights are 0.
    """

    fraction_bits: Array
    saturated: int
    saturated_biases: int
    noise: float


@dataclass(frozen=True)
class FloatLayer:
    """A layer with constant weights before it is quantized.

    Attributes:
        node: Conv, Gemm or MatMul.
        weight: float32.
        bias: float32 that broadcasts over the output channels, or None.
        bits: 8 or 16, of the quantized weights.
        per_channel: one format per output channel instead of one.
        rounding: of weights, and of the bias.
        mean: float64 `[channels]` of the input, where the mean error of the rounded weights is to
            be taken back by the bias.
    """

    node: ir.Node
    weight: Array
    bias: Array | None
    bits: int
    per_channel: bool
    rounding: tuple[Rounding, Rounding]
    mean: Array | None = None

    @property
    def axis(self) -> int:
        """The axis of the output channels."""
        return channel_axis(self.node, self.weight) or 0

    def rows(self, weight: Array) -> Array:
        """Return a weight as `[output channels, what each sums up]`."""
        moved = np.moveaxis(weight, self.axis, 0)
        return moved.reshape(len(moved), -1)

    @cached_property
    def wanted(self) -> Array:
        """What `weight_formats` chooses: int64 `[output channels]`, or `[1]` for one format.

        Raises CalibrationError where a weight is not finite.
        """
        rows = self.rows(self.weight)
        return weight_formats(rows if self.per_channel else rows.reshape(1, -1), self.bits)

    def fixed(self, source: Format, reach: tuple[int, int]) -> FixedPointLayer:
        """Quantize for an input of this format.

        A channel gets the format that its weights ask for, or a coarser one where a sum or a part
        of it could leave int32, or the bias would need more than 100 fraction bits.

        Args:
            source: the format of the input.
            reach: the least and the largest integer that the input may hold; 0 is between them.

        Raises:
            CalibrationError: a weight is not finite.
            OverflowError: products are beyond float32.
        """
        formats = np.minimum(self.wanted, MOST_FRACTION_BITS - source.fraction_bits)
        while True:
            if (formats + source.fraction_bits).min() < _FEWEST_PRODUCT_BITS:
                raise OverflowError("the products of its weights and its input are beyond float32")
            places = self._along(formats)
            integers, saturated = to_fixed(
                self.weight, places, _symmetric(self.bits), self.rounding[0]
            )
            error = np.ldexp(integers.astype(np.float64), -places) - self.weight
            bias = self._shifted(error)
            if bias is not None:
                bias = self.rounding[1](np.ldexp(bias, formats + source.fraction_bits))
            sums = _sums(self.rows(integers), bias, reach)
            if not self.per_channel:
                sums = sums.max(keepdims=True)
            if (sums < ACCUMULATOR).all():
                break
            bits_over = np.log2(np.maximum(sums / ACCUMULATOR, 1.0)).astype(np.int64)
            formats = formats - np.where(sums < ACCUMULATOR, 0, np.maximum(bits_over, 1))
        shape = formats.shape if self.per_channel else ()
        product_scales = np.ldexp(1.0, -formats - source.fraction_bits)
        return FixedPointLayer(
            weight=integers.astype(f"int{self.bits}"),
            scales=np.ldexp(1.0, -formats).astype(np.float32).reshape(shape),
            zeros=np.zeros(shape, f"int{self.bits}"),
            axis=self.axis if self.per_channel else None,
            bias=None if bias is None else bias.astype(np.int32),
            products=product_scales.astype(np.float32).reshape(shape),
            rescaled=int(np.count_nonzero(formats < self.wanted)),
            fraction_bits=formats.reshape(shape),
            saturated=saturated,
            saturated_biases=0 if bias is None else _count_beyond_int32(bias),
            noise=self._noise(error),
        )

    def _along(self, formats: Array) -> Array:
        """Reshape formats so that they broadcast against the weight."""
        shape = [1] * self.weight.ndim
        shape[self.axis] = -1
        return formats.reshape(shape)

    def _shifted(self, error: Array) -> Array | None:
        """Return the bias without what rounding the weights added to the mean of the output."""
        bias = self.bias
        if bias is not None:
            bias = np.broadcast_to(bias.reshape(-1), (self.weight.shape[self.axis],))
        if self.mean is None:
            return None if bias is None else bias.astype(np.float64)
        shift = mean_shift(self.node, error, self.mean)
        return -shift if bias is None else bias - shift

    def _noise(self, error: Array) -> float:
        """Return the error of the weights over their power, in the mean over the channels."""
        power = np.square(self.rows(self.weight), dtype=np.float64).sum(axis=1)
        squared = np.square(self.rows(error)).sum(axis=1)
        share = np.divide(squared, power, out=np.zeros_like(squared), where=power > 0)
        return float(share.mean())


def weight_formats(rows: Array, bits: int) -> Array:
    """Choose a format per row: the finest that fits, or one bit finer where that errs less.

    Saturating the one largest weight of a channel by a few steps may cost less than halving the
    resolution of all others; the mean squared error decides. A row of nothing but 0 (a pruned
    channel) borrows the coarsest format of the others: it matters to its bias alone.

    Args:
        rows: float32 `[rows, weights]`.
        bits: 8 or 16; the least integer is not used, so that a weight can be negated.

    Returns:
        int64 `[rows]` of fraction bits.
    """
    magnitude = np.abs(rows).max(axis=1, initial=0.0)
    fitting = np.array(
        [fitting_format(Range(0.0, float(m)), bits).fraction_bits for m in magnitude], np.int64
    )
    used = magnitude > 0
    borrowed = int(fitting[used].min()) if used.any() else bits - 1
    fitting[~used] = borrowed
    finer = np.minimum(fitting + 1, MOST_FRACTION_BITS)
    better = _error(rows, finer, bits) < _error(rows, fitting, bits)
    return np.where(better & used, finer, fitting)


def _error(rows: Array, fraction_bits: Array, bits: int) -> Array:
    """Sum the squared errors of each row."""
    exponents = fraction_bits[:, None]
    integers, _ = to_fixed(rows, exponents, _symmetric(bits))
    error: Array = np.square(np.ldexp(integers.astype(np.float64), -exponents) - rows).sum(axis=1)
    return error


def _symmetric(bits: int) -> tuple[int, int]:
    largest = Format(bits, 0).limits[1]
    return -largest, largest


def _count_beyond_int32(steps: Array) -> int:
    return int(np.count_nonzero(np.abs(steps) >= ACCUMULATOR))


def _sums(rows: Array, bias: Array | None, reach: tuple[int, int]) -> Array:
    """Return the largest magnitude that each channel's sum, and every part of it, can have."""
    least, largest = reach
    above = np.maximum(rows, 0).sum(axis=1).astype(np.float64)
    below = np.minimum(rows, 0).sum(axis=1).astype(np.float64)
    added = np.zeros(len(rows)) if bias is None else bias
    high = np.maximum(added, 0) + above * largest + below * least
    low = np.minimum(added, 0) + above * least + below * largest
    largest_sums: Array = np.maximum(high, -low)
    return largest_sums
