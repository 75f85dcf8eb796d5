"""Which nodes have no fixed-point form although they have one in 8-bit QDQ graphs, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from edgepress.calibration.fixed_point import Format
from edgepress.passes._int8_rules import activations, constant, is_carrier
from edgepress.passes._shapes import static_shape

_AVERAGES = ("AveragePool", "GlobalAveragePool", "ReduceMean")
#: How many values a sum in int32 holds, by their bits.
_LARGEST_WINDOW = {8: 2**24 - 1, 16: 2**16 - 1}
_FLOATS = (ir.DataType.BFLOAT16, ir.DataType.DOUBLE, ir.DataType.FLOAT, ir.DataType.FLOAT16)


def without_form(model: ir.Model, bits: int) -> dict[ir.Node, str]:
    """Return the nodes that would execute in float on a board, each with the reason."""
    reasons = {node: _reason(node, bits) for node in model.graph}
    return {node: why for node, why in reasons.items() if why is not None}


def is_fixed_point(model: ir.Model) -> bool:
    """Whether every scale of a quantized model is a power of two, and every zero point 0."""
    for node in model.graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale = constant(node.inputs[1])
        point = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if scale is None or not (np.frexp(scale)[0] == 0.5).all():
            return False
        if point is not None and point.any():
            return False
    return True


def computes_in_float(node: ir.Node) -> bool:
    """Whether the node reads or writes floats of any width."""
    return any(value is not None and value.dtype in _FLOATS for value in _values(node))


def _values(node: ir.Node) -> list[ir.Value | None]:
    return [*node.inputs, *node.outputs]


def _reason(node: ir.Node, bits: int) -> str | None:
    """Return what the lowering to integers does not know about this node."""
    weight = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    shape = static_shape(node.inputs[0]) if node.inputs else None
    if node.op_type == "Conv" and weight is not None and weight.ndim != 4:
        return f"a Conv over {weight.ndim - 2} axes has no integer form; reshape it to 2"
    if node.op_type == "MatMul" and (weight is None or weight.ndim != 2):
        return "only a product with a constant matrix has an integer form"
    if node.op_type == "Resize" and node.attributes.get_string("mode", "nearest") != "nearest":
        return "only a Resize to the nearest neighbour has an integer form"
    if node.op_type not in (*_AVERAGES, "MaxPool"):
        return None
    if shape is None or len(shape) != 4:
        return f"a {node.op_type} that is not over 2 axes has no integer form"
    if node.attributes.get_int("ceil_mode", 0):
        return "a window that leaves the padding has no integer form; set ceil_mode = 0"
    window = math.prod(node.attributes.get_ints("kernel_shape", shape[2:]))
    if node.op_type in _AVERAGES and window > _LARGEST_WINDOW[bits]:
        return f"a sum of {window} values of {bits} bits may overflow int32"
    return None


def stored_limits(stored: Format, whole_bits: int) -> tuple[int, int]:
    """Return the limits of a format in a storage; with fewer bits it is clamped symmetrically."""
    least, largest = stored.limits
    return (least if stored.bits == whole_bits else -largest), largest


def reach(
    value: ir.Value, stored: Format, whole_bits: int, roots: Mapping[ir.Value, ir.Value]
) -> tuple[int, int]:
    """Return the least and the largest integer that a quantized value may hold; 0 is between.

    Args:
        value: an activation.
        stored: its format.
        whole_bits: of the storage.
        roots: activations to those whose format they share.
    """
    low, high = bounds(value, roots)
    steps = np.rint(np.ldexp([low, high], stored.fraction_bits))
    least, largest = np.clip(steps, *stored_limits(stored, whole_bits))
    return min(int(least), 0), max(int(largest), 0)


def bounds(value: ir.Value, roots: Mapping[ir.Value, ir.Value]) -> tuple[float, float]:
    """Return what the graph says about the real numbers of a value, infinite where it is silent.

    A rectifier bounds what it computes, and values that are only moved stay in their bounds; those
    that a Concat brings to another format may round beyond them.
    """
    node = value.producer()
    if node is None:
        return -np.inf, np.inf
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type == "Clip":
        given = [constant(bound) for bound in (*node.inputs[1:3], None, None)[:2]]
        low, high = (
            default if bound is None else float(bound.item())
            for bound, default in zip(given, (-np.inf, np.inf), strict=True)
        )
        return (low, high) if low <= high else (-np.inf, np.inf)
    if is_carrier(node) and node.op_type != "Pad":
        return bounds(activations(node)[0], roots)
    if node.op_type == "Concat" and all(shares_format(v, value, roots) for v in node.inputs):
        lows, highs = zip(*(bounds(v, roots) for v in activations(node)), strict=True)
        return min(lows), max(highs)
    return -np.inf, np.inf


def shares_format(
    value: ir.Value | None, other: ir.Value, roots: Mapping[ir.Value, ir.Value]
) -> bool:
    """Whether two values are activations of one format."""
    return value is not None and other in roots and roots.get(value) is roots[other]
