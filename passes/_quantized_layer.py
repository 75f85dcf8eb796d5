"""The integers of one layer: weights, scales and bias, for a given scale of its input."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array
from edgepress.calibration.qparams import (
    dequantize,
    fit_bias,
    quantize,
    quantize_bias,
    weight_qparams,
)
from edgepress.passes._bias_correction import mean_shift


@dataclass(frozen=True)
class QuantizedLayer:
    """A Conv, Gemm or MatMul in integers.

    Attributes:
        weight: int8, in the shape of the float weight.
        scales: of the weight, float32 `[output channels]` or `[]`.
        zeros: of the weight, int8 zeros in the shape of `scales`.
        axis: of the scales, None for one scale.
        bias: int32 `[output channels]`, or None.
        products: scale of the bias, input scale · weight scale, in the shape of `scales`.
        rescaled: channels whose weights got coarser so that the bias fits.
    """

    weight: Array
    scales: Array
    zeros: Array
    axis: int | None
    bias: Array | None
    products: Array
    rescaled: int


def channel_axis(node: ir.Node, weight: Array) -> int | None:
    """Return the axis of output channels, or None where a single scale must do."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if node.attributes.get_int("transB", 0) else 1
    return 1 if weight.ndim == 2 else None


def quantize_layer(
    node: ir.Node,
    weight: Array,
    bias: Array | None,
    input_scale: np.float32,
    *,
    per_channel: bool,
    mean: Array | None = None,
    steps: Array | None = None,
) -> QuantizedLayer:
    """Quantize weight and bias.

    Args:
        node: Conv, Gemm or MatMul.
        weight: float32.
        bias: float32, broadcast over the output channels, or None.
        input_scale: of the activation that the weight multiplies.
        per_channel: one scale per output channel instead of one.
        mean: float64 `[channels]` of the input, where the mean error of the rounded weights is to
            be taken back by the bias.
        steps: int8 in the weight's shape: the weight as it shall be rounded at the scales of
            `weight_qparams`. A channel that needs a coarser one is rounded to the nearest step.
    """
    channels = channel_axis(node, weight)
    axis = channels if per_channel else None
    scales, zeros = weight_qparams(weight, axis)
    if bias is not None:
        bias = np.broadcast_to(bias.reshape(-1), (weight.shape[channels or 0],))
    fitted = fit_bias(scales, input_scale, bias)
    integers = quantize(weight, fitted, zeros, "int8", axis)
    if steps is not None:
        kept = fitted == scales
        if axis is not None:
            kept = kept.reshape([-1 if i == axis % weight.ndim else 1 for i in range(weight.ndim)])
        integers = np.where(kept, steps, integers)
    if mean is not None:
        error = dequantize(integers, fitted, zeros, axis).astype(np.float64) - weight
        shift = mean_shift(node, error, mean)
        bias = -shift if bias is None else bias - shift
    products = (fitted * input_scale).astype(np.float32)
    return QuantizedLayer(
        weight=integers,
        scales=fitted,
        zeros=zeros,
        axis=axis,
        bias=None if bias is None else quantize_bias(bias, products),
        products=products,
        rescaled=int(np.count_nonzero(fitted != scales)),
    )
