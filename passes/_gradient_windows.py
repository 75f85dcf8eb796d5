"""Gradients of operators that slide a window over an image: convolutions and pools.

What a strided window read is reached back by a transposed convolution of the same geometry. Its
pads follow from the shapes, so that auto_pad, ceil_mode and positions that no window reaches need
no cases of their own.
"""

from __future__ import annotations

from functools import reduce

import numpy as np
import onnx_ir as ir

from edgepress.passes._constants import Array
from edgepress.passes._gradient_tape import NoGradient, Tape, given
from edgepress.passes._shapes import shape_of

_Sizes = tuple[int, ...]


def conv(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    """Spread every output over the inputs that it summed, by the same weights."""
    weight = given(node.inputs[1])
    window, rest = _window(node, shape_of(weight)[2:], node.inputs[0], node.outputs[0])
    group = node.attributes.get_int("group", 1)
    return [t.op("ConvTranspose", dy, weight, group=group, output_padding=rest, **window)]


def conv_transpose(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    """Sum the outputs that every input was spread over, by the same weights."""
    attributes, weight = node.attributes, given(node.inputs[1])
    padding = attributes.get_string("auto_pad", "NOTSET")
    if "output_shape" in attributes or padding not in ("NOTSET", "VALID"):
        raise NoGradient("it chooses its own padding")
    window, _ = _window(node, shape_of(weight)[2:], node.outputs[0], node.inputs[0])
    return [t.op("Conv", dy, weight, group=attributes.get_int("group", 1), **window)]


def average_pool(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    """Spread every output over its window, divided by what the pool divided by."""
    x, y = given(node.inputs[0]), node.outputs[0]
    kernel = tuple(node.attributes["kernel_shape"].as_ints())
    window, rest = _window(node, kernel, x, y)
    # What is divided by at the border depends on attributes and on the operator's version. The
    # operator tells: on ones it answers the count of positions in the window over the divisor.
    channels, *large = shape_of(x)[1:]
    ratio = t.op("AveragePool", t.full((1, 1, *large), 1, x), **node.attributes)
    shares = t.op("Div", ratio, _positions(window, kernel, x, y))
    ones = t.full((channels, 1, *kernel), 1, x)
    spread = t.op("Mul", dy, shares)
    return [t.op("ConvTranspose", spread, ones, group=channels, output_padding=rest, **window)]


def max_pool(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    """Add every output's gradient to the position of its maximum, which the operator answers."""
    if node.attributes.get_int("storage_order", 0):
        raise NoGradient("it answers indices in column-major order")
    node.resize_outputs(2)
    indices = node.outputs[1]
    indices.name = indices.name or t.name()
    return [t.add_up(dy, indices, shape_of(node.inputs[0]))]


def _window(
    node: ir.Node, kernel: _Sizes, large: ir.Value | None, small: ir.Value | None
) -> tuple[dict[str, list[int]], list[int]]:
    """Return the geometry by which windows over `large` give `small`.

    Returns:
        The attributes strides, dilations and pads, pads being just those that the windows reach
        into; and how many positions at the end of each axis of `large` no window reaches.
    """
    rank, attributes = len(kernel), node.attributes
    strides = attributes.get_ints("strides", (1,) * rank)
    dilations = attributes.get_ints("dilations", (1,) * rank)
    # where the last window ends, counted from the start of the first one, less the extent of large
    over = [
        stride * (n - 1) + dilation * (k - 1) + 1 - extent
        for stride, dilation, k, n, extent in zip(
            strides, dilations, kernel, shape_of(small)[2:], shape_of(large)[2:], strict=True
        )
    ]
    match attributes.get_string("auto_pad", "NOTSET"):
        case "SAME_UPPER":
            begins = [max(total, 0) // 2 for total in over]
        case "SAME_LOWER":
            begins = [(max(total, 0) + 1) // 2 for total in over]
        case _:
            begins = list(attributes.get_ints("pads", (0,) * rank)[:rank])
    ends = [total - begin for total, begin in zip(over, begins, strict=True)]
    window = {
        "kernel_shape": list(kernel),
        "strides": list(strides),
        "dilations": list(dilations),
        "pads": [*begins, *(max(end, 0) for end in ends)],
    }
    return window, [max(-end, 0) for end in ends]


def _positions(
    window: dict[str, list[int]], kernel: _Sizes, large: ir.Value, small: ir.Value
) -> Array:
    """Count the positions of `large` that each window holds, as `[*small's spatial axes]`."""
    counts = []
    for axis, (k, n, extent) in enumerate(
        zip(kernel, shape_of(small)[2:], shape_of(large)[2:], strict=True)
    ):
        starts = np.arange(n) * window["strides"][axis] - window["pads"][axis]
        read = starts[:, None] + np.arange(k) * window["dilations"][axis]
        counts.append(((read >= 0) & (read < extent)).sum(axis=1))
    return np.asarray(np.maximum(reduce(np.multiply.outer, counts), 1))
