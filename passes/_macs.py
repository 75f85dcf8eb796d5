"""Multiply-accumulates of nodes, whole and with channels cut."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from edgepress.passes._channel_axes import Axes, Axis, Ids
from edgepress.passes._shapes import static_shape

COUNTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulInteger")


def node_macs(node: ir.Node) -> int:
    """Count the multiply-accumulates of one node, 0 for operators that have none."""
    if node.domain or node.op_type not in COUNTED:
        return 0
    x, w, y = (static_shape(v) for v in (node.inputs[0], node.inputs[1], node.outputs[0]))
    if x is None or w is None or y is None:
        return 0
    match node.op_type:
        case "Conv":
            return math.prod(y) * math.prod(w[1:])
        case "ConvTranspose":
            return math.prod(x) * math.prod(w[1:])
        case "Gemm":
            return math.prod(y) * x[0 if node.attributes.get_int("transA", 0) else 1]
        case _:
            return math.prod(y) * x[-1]


def macs_after(model: ir.Model, axes: Axes) -> Callable[[Ids], float]:
    """Return a function that counts a model's multiply-accumulates with channels cut.

    A call takes no loop over layers, as a ranking makes many.
    """
    layers = [
        (node_macs(node), [axis for axis in _counted(node, axes) if axis is not None])
        for node in model.graph
        if node_macs(node)
    ]
    extents = [axis for _, counted in layers for axis in counted]
    channels = np.concatenate([*extents, np.empty(0, np.int64)]).astype(np.int64)
    starts = np.cumsum([0, *(len(axis) for axis in extents)])[:-1]
    owner = np.repeat(np.arange(len(layers)), [len(counted) for _, counted in layers])
    whole = np.array([macs for macs, _ in layers], np.float64)
    lengths = np.array([len(axis) for axis in extents], np.float64)

    def count(cut: Ids) -> float:
        stays = np.ones(len(axes.channel), np.int64)
        stays[cut] = 0
        remaining = whole.copy()
        if len(starts):
            np.multiply.at(remaining, owner, np.add.reduceat(stays[channels], starts) / lengths)
        return float(remaining.sum())

    return count


def _counted(node: ir.Node, axes: Axes) -> list[Axis]:
    """Return the channels of the axes whose extents multiply to the work of a node."""
    x, w = (axes.channels_of(value) for value in node.inputs[:2] if value is not None)
    y = axes.channels_of(node.outputs[0])
    match node.op_type:
        case "Conv":
            return [*y, w[1]]
        case "ConvTranspose":
            return [*x, w[1]]
        case "Gemm":
            return [*y, x[0 if node.attributes.get_int("transA", 0) else 1]]
        case _:
            return [*y, x[-1]]
