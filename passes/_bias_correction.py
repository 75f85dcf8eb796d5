"""Takes back the mean error that rounded weights leave in a layer's output.

Rounding a weight w to ŵ shifts the mean of the layer's output by `E[ŵ·x] - E[w·x] = (ŵ-w)·E[x]`.
The shift is known, so it is subtracted from the bias: Nagel et al., "Data-Free Quantization
Through Weight Equalization and Bias Correction", 2019, section 4.2, with E[x] measured on the
calibration samples. Depthwise convolutions gain most: few weights share the error.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array, Samples
from edgepress.passes._taps import grouped, input_shapes, open_taps
from edgepress.passes.base import Context


def channel_means(
    pass_name: str, model: ir.Model, layers: list[ir.Node], samples: Samples, context: Context
) -> dict[ir.Value, Array]:
    """Measure E[x] per channel for the first input of every layer.

    Args:
        pass_name: for refusals.
        model: not yet quantized.
        layers: Conv or Gemm; both have the channels of their input on axis 1.
        samples: all are run.
        context: for its progress.

    Returns:
        float64 `[channels]` by value.
    """
    inputs = list(dict.fromkeys(x for node in layers if (x := node.inputs[0]) is not None))
    shapes = input_shapes(pass_name, model)
    means: dict[ir.Value, list[Array]] = {value: [] for value in inputs}
    groups = list(grouped(inputs))
    for number, group in enumerate(groups):
        tap = open_taps(pass_name, model, group)
        for index, feed in enumerate(samples.feeds(shapes)):
            found = tap(feed, index)
            for value in group:
                array = np.moveaxis(found[value.name or ""], 1, 0)
                means[value].append(array.reshape(len(array), -1).mean(axis=1, dtype=np.float64))
            context.progress(
                "measure means", number * len(samples) + index + 1, len(groups) * len(samples)
            )
    # sorted, so that the order of the samples changes no bit of the sum
    return {value: np.sort(each, axis=0).sum(axis=0) / len(each) for value, each in means.items()}


def mean_shift(node: ir.Node, error: Array, mean: Array) -> Array:
    """Return by how much the mean of each output channel moved.

    Zeros that a convolution pads with have no error; they count as if they were not there.

    Args:
        node: Conv or Gemm.
        error: `ŵ - w` in the weight's shape.
        mean: `[channels]` of the input.

    Returns:
        float64 `[output channels]`.
    """
    if node.op_type == "Gemm":
        transposed = node.attributes.get_int("transB", 0)
        row: Array = np.einsum("oi,i->o" if transposed else "io,i->o", error, mean)
        return row
    groups = node.attributes.get_int("group", 1)
    outputs, inputs = error.shape[:2]
    kernel = error.reshape(groups, outputs // groups, inputs, -1).sum(axis=3)
    shift: Array = np.einsum("goi,gi->go", kernel, mean.reshape(groups, inputs))
    return shift.reshape(outputs)
