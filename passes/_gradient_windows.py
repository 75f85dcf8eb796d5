"""Gradients of operators that slide a window over an image: convolutions and pools.

What a strided window read is reached back by a transposed convolution of the same geometry. Its
pads follow from the shapes, so that auto_pad, ceil_mode and positions that no window reaches need
no cases of their own. The gradient of a weight is a convolution, too, of the image with the
gradient as its kernel, in which strides and dilations have changed places.
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
    x, weight = given(node.inputs[0]), given(node.inputs[1])
    window, rest = _window(node, shape_of(weight)[2:], x, node.outputs[0])
    group = node.attributes.get_int("group", 1)
    dx = t.op("ConvTranspose", dy, weight, group=group, output_padding=rest, **window)
    dw = _weight(t, weight, (x, shape_of(x)), (dy, shape_of(node.outputs[0])), group, window)
    return [dx, dw, *_bias(t, node, dy)]


def conv_transpose(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    """Sum the outputs that every input was spread over, by the same weights."""
    attributes, weight = node.attributes, given(node.inputs[1])
    padding = attributes.get_string("auto_pad", "NOTSET")
    if "output_shape" in attributes or padding not in ("NOTSET", "VALID"):
        raise NoGradient("it chooses its own padding")
    x, group = given(node.inputs[0]), attributes.get_int("group", 1)
    window, _ = _window(node, shape_of(weight)[2:], node.outputs[0], x)
    dx = t.op("Conv", dy, weight, group=group, **window)
    dw = _weight(t, weight, (dy, shape_of(node.outputs[0])), (x, shape_of(x)), group, window)
    return [dx, dw, *_bias(t, node, dy)]


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


def _weight(
    t: Tape,
    weight: ir.Value,
    large: tuple[ir.Value, _Sizes],
    small: tuple[ir.Value, _Sizes],
    group: int,
    window: dict[str, list[int]],
) -> ir.Value:
    """Correlate what windows read with what each of them gave: `[small/…, large/group, kernel]`.

    Args:
        t: appends to the graph.
        weight: its shape is the result's.
        large: the value `[batch, channels, …]` that windows slide over, with its shape.
        small: the value that has a position for each window, with its shape.
        group: of the convolution.
        window: its geometry.
    """
    (x, (batch, channels, *extents)), (g, (_, _, *positions)) = large, small
    rank, inside = len(extents), channels // group
    # channels of a group become the batch, and the batch the channels that are summed over
    x = t.reshape(x, (batch, group, inside, *extents))
    x = t.op("Transpose", x, perm=[2, 1, 0, *range(3, rank + 3)])
    x = t.reshape(x, (inside, group * batch, *extents))
    kernel = t.op("Transpose", g, perm=[1, 0, *range(2, rank + 2)])
    found = t.op(
        "Conv",
        x,
        kernel,
        group=group,
        kernel_shape=positions,
        strides=window["dilations"],
        dilations=window["strides"],
        pads=window["pads"],
    )
    # positions that no window reaches would be further taps
    axes = range(2, rank + 2)
    ends = shape_of(weight)[2:]
    found = t.op("Slice", found, t.ints([0] * rank), t.ints(ends), t.ints(axes))
    return t.op("Transpose", found, perm=[1, 0, *axes])


def _bias(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    """Sum the gradient of every output channel, where the node has a bias."""
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return []
    shape = shape_of(node.outputs[0])
    total = t.total(dy, [0, *range(2, len(shape))])
    return [t.reshape(total, (shape[1],))]


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
