"""Quantized operators that are left among float ones → arithmetic."""

from __future__ import annotations

import math

import numpy as np
import onnx

from edgepress.targets.lowering.rewriting import Rewriting, attributes_of

_EXACT_IN_FLOAT32 = 1 << 24


def _parameter(graph: Rewriting, name: str, node: onnx.NodeProto) -> str:
    """Bring a scale or zero point to a shape that broadcasts."""
    attributes = attributes_of(node)
    shape, own = graph.shape(node.input[0]), graph.shape(name)
    if own == ():
        return name
    axis, block = attributes.get("axis", 1) % len(shape), attributes.get("block_size", 0)
    if math.prod(own) == 1:
        return graph.reshape(name, [1] * len(shape))
    if not block:
        return graph.reshape(name, [-1 if i == axis else 1 for i in range(len(shape))])
    before, after = own[:axis], own[axis + 1 :]
    columns = graph.reshape(name, [*before, own[axis], 1, *after])
    repeated = [*before, own[axis], block, *after]
    spread = graph.emit("Expand", columns, graph.add_constant(repeated, np.int64))
    whole = graph.reshape(spread, [*before, own[axis] * block, *after])
    bounds = (graph.add_constant([i], np.int64) for i in (0, shape[axis], axis))
    return graph.emit("Slice", whole, *bounds)


def _dequantize(graph: Rewriting, node: onnx.NodeProto) -> bool:
    if graph.dtype(node.input[1]) != np.float32:
        return False
    scale = _parameter(graph, node.input[1], node)
    value = node.input[0]
    if len(node.input) > 2 and node.input[2]:
        zero = _parameter(graph, node.input[2], node)
        value = graph.emit("Sub", graph.cast(value, np.int32), graph.cast(zero, np.int32))
    graph.emit("Mul", graph.cast(value, np.float32), scale, output=node.output[0])
    return True


def _quantize(graph: Rewriting, node: onnx.NodeProto) -> bool:
    dtype = graph.dtype(node.output[0])
    if dtype.kind not in "iu" or graph.dtype(node.input[0]) != np.float32:
        return False
    scale = _parameter(graph, node.input[1], node)
    steps = graph.emit("Round", graph.emit("Div", node.input[0], scale))
    if len(node.input) > 2 and node.input[2]:
        zero = _parameter(graph, node.input[2], node)
        steps = graph.emit("Add", steps, graph.cast(zero, np.float32))
    _saturate(graph, steps, dtype, node.output[0])
    return True


def _saturate(graph: Rewriting, x: str, dtype: np.dtype, output: str) -> None:
    limits = np.iinfo(dtype)
    bounds = (graph.add_constant(limit, np.float32) for limit in (limits.min, limits.max))
    graph.cast(graph.emit("Clip", x, *bounds), dtype, output)


def _centred(graph: Rewriting, x: str, zero: str, shape: list[int], dtype: type) -> str:
    """Subtract a zero point, as a number that sums of products fit into."""
    value = graph.cast(x, np.int32)
    if zero:
        value = graph.emit("Sub", value, graph.reshape(graph.cast(zero, np.int32), shape))
    return value if dtype is np.int32 else graph.cast(value, dtype)


def _requantize(
    graph: Rewriting, sums: str, scales: tuple[str, str, str], zero: str, output: str
) -> None:
    """Multiply sums by a * b / y, round, add the zero point, saturate."""
    a, b, y = scales
    factor = graph.emit("Div", graph.emit("Mul", a, b), y)
    scaled = graph.emit("Mul", sums, factor)
    shifted = graph.emit("Add", scaled, graph.cast(zero, np.float32))
    _saturate(graph, graph.emit("Round", shifted), graph.dtype(zero), output)


def _qlinear_matmul(graph: Rewriting, node: onnx.NodeProto) -> bool:
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = node.input
    rows = graph.shape(a_zero)
    left = _centred(graph, a, a_zero, [-1, 1] if math.prod(rows) > 1 else [1], np.int32)
    right = _centred(graph, b, b_zero, [-1], np.int32)
    if math.prod(graph.shape(a_scale)) > 1:
        a_scale = graph.reshape(a_scale, [-1, 1])
    sums = graph.cast(graph.emit("MatMul", left, right), np.float32)
    _requantize(graph, sums, (a_scale, b_scale, y_scale), y_zero, node.output[0])
    return True


def exact_in_float32(weights: tuple[int, ...]) -> bool:
    """Whether float32 holds every sum of products of a convolution with weights of this shape."""
    return math.prod(weights[1:]) * 255 * 255 < _EXACT_IN_FLOAT32


def _convolved(graph: Rewriting, node: onnx.NodeProto, names: list[str]) -> str:
    """Convolve centred integers in float32: x, its zero point, weights, their zero point."""
    x, x_zero, w, w_zero = names
    per_channel = [-1] + [1] * (len(graph.shape(w)) - 1)
    left = _centred(graph, x, x_zero, [1], np.float32)
    right = _centred(graph, w, w_zero, per_channel, np.float32)
    return graph.emit("Conv", left, right, **attributes_of(node))


def _conv_integer(graph: Rewriting, node: onnx.NodeProto) -> bool:
    names = [*node.input, "", ""]
    if not exact_in_float32(graph.shape(node.input[1])):
        return False
    sums = _convolved(graph, node, [names[0], names[2], names[1], names[3]])
    graph.cast(sums, np.int32, node.output[0])
    return True


def _qlinear_conv(graph: Rewriting, node: onnx.NodeProto) -> bool:
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero, *bias = node.input
    wide = [1, -1] + [1] * (len(graph.shape(w)) - 2)
    sums = _convolved(graph, node, [x, x_zero, w, w_zero])
    if bias and bias[0]:
        sums = graph.emit("Add", sums, graph.reshape(graph.cast(bias[0], np.float32), wide))
    if math.prod(graph.shape(w_scale)) > 1:
        w_scale = graph.reshape(w_scale, wide)
    _requantize(graph, sums, (x_scale, w_scale, y_scale), y_zero, node.output[0])
    return True


RULES = {
    "ConvInteger": _conv_integer,
    "DequantizeLinear": _dequantize,
    "QLinearConv": _qlinear_conv,
    "QLinearMatMul": _qlinear_matmul,
    "QuantizeLinear": _quantize,
}
