"""Integer forms of convolutions and matrix products with constant weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepress.targets.lowering.dialect import shape_of
from edgepress.targets.lowering.integers import Integers, Pending, Rule
from edgepress.targets.lowering.quantization import (
    MOST_RIGHT,
    Quantization,
    Weight,
    are_powers_of_two,
    multiplier,
    output_attributes,
    shifts,
)
from edgepress.targets.lowering.window import window_attributes

Array = npt.NDArray[Any]
_SMALLEST = np.finfo(np.float32).tiny


def symmetric_weight(state: Integers, value: ir.Value | None, axis: int) -> Weight | None:
    """Return a symmetric int8 or int16 weight with one scale per channel of `axis`."""
    weight = state.weights.get(value) if value is not None else None
    if weight is None or weight.array.dtype not in (np.int8, np.int16) or weight.zero_point.any():
        return None
    if weight.scale.size > 1 and weight.axis != axis % weight.array.ndim:
        return None
    return weight


def _emit_product(
    state: Integers,
    pending: Pending,
    target: Quantization,
    name: str,
    op_type: str,
    weight: tuple[Array, Array],
    bias_value: ir.Value | None,
    attributes: dict[str, Any],
) -> ir.Value:
    """Emit a node with weights `[out, …]`, int32 bias and one factor per output channel.

    The factors are float32 multipliers, or int32 shifts where every scale is a power of two.
    """
    array, scale = weight
    x = state.operand(pending.node.inputs[0])
    assert x is not None
    scales = np.float32(x.quantization.scale) * np.broadcast_to(scale, array.shape[:1])
    scales = scales.astype(np.float32)
    bias = state.bias(bias_value, scales)
    assert bias is not None
    ratios = np.float64(x.quantization.scale) * np.broadcast_to(scale, array.shape[:1])
    ratios = ratios / np.float64(target.scale)
    if are_powers_of_two(x.quantization.scale, scale, target.scale):
        factors, kind = shifts(ratios), "shifts"
        if (vanishing := factors == MOST_RIGHT).any():  # beyond what an int32 can be shifted by
            kept = ~vanishing
            array = array * kept.reshape(-1, *[1] * (array.ndim - 1)).astype(array.dtype)
            bias, factors = bias * kept.astype(np.int32), factors * kept.astype(np.int32)
    else:
        factors, kind = multiplier(ratios), "multipliers"
    label = pending.node.name or name
    return state.builder.node(
        op_type,
        [
            x.value,
            state.builder.constant(f"{label}_weights", array),
            state.builder.constant(f"{label}_bias", bias),
            state.builder.constant(f"{label}_{kind}", factors),
        ],
        {
            **attributes,
            "x_zero_point": x.quantization.zero_point,
            **output_attributes(target, target.clamp(pending.low, pending.high)),
        },
        name,
        target.dtype,
        shape_of(pending.node.outputs[0]),
        label=label,
    )


def _fits(
    state: Integers, node: ir.Node, weight: tuple[Array, Array], bias_value: ir.Value | None
) -> bool:
    """Tell whether there is a constant bias and no int32 sum can overflow, whatever the input."""
    x = state.operand(node.inputs[0])
    assert x is not None
    array, scale = weight
    with np.errstate(over="ignore"):
        scales = np.float32(x.quantization.scale) * np.broadcast_to(scale, array.shape[:1])
    if not (np.isfinite(scales) & (scales >= _SMALLEST)).all():
        return False
    bias = state.bias(bias_value, scales)
    if bias is None:
        return False
    low, high = x.reach
    flat = array.reshape(len(array), -1).astype(np.int64)
    above, below = np.maximum(flat, 0).sum(1), np.minimum(flat, 0).sum(1)
    largest = np.maximum(bias.astype(np.int64), 0) + above * high + below * low
    least = np.minimum(bias.astype(np.int64), 0) + above * low + below * high
    return bool(((largest < 2**31) & (least >= -(2**31))).all())


def optional_input(node: ir.Node, index: int) -> ir.Value | None:
    """Return an input, None where the node does not have so many."""
    return node.inputs[index] if len(node.inputs) > index else None


def _accepts_conv(state: Integers, node: ir.Node) -> bool:
    weight = symmetric_weight(state, node.inputs[1], 0)
    return (
        state.has_operand(node.inputs[0])
        and weight is not None
        and weight.array.ndim == 4
        and _fits(state, node, (weight.array, weight.scale), optional_input(node, 2))
    )


def _emit_conv(state: Integers, pending: Pending, target: Quantization, name: str) -> ir.Value:
    node = pending.node
    weight = symmetric_weight(state, node.inputs[1], 0)
    assert weight is not None
    attributes = window_attributes(node, weight.array.shape[2:])
    attributes["group"] = node.attributes.get_int("group", 1)
    given, bias = (weight.array, weight.scale), optional_input(node, 2)
    return _emit_product(state, pending, target, name, "QConv", given, bias, attributes)


def _gemm_weight(state: Integers, node: ir.Node) -> tuple[Array, Array] | None:
    """Return weights `[out, in]` and their scales."""
    transposed = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
    weight = symmetric_weight(state, node.inputs[1], 0 if transposed else -1)
    if weight is None or weight.array.ndim != 2:
        return None
    return (weight.array if transposed else weight.array.T), weight.scale


def _accepts_gemm(state: Integers, node: ir.Node) -> bool:
    bias = optional_input(node, 2)
    plain = (
        node.attributes.get_float("alpha", 1.0) == 1.0
        and (bias is None or node.attributes.get_float("beta", 1.0) == 1.0)
        and not node.attributes.get_int("transA", 0)
    )
    found = _gemm_weight(state, node)
    if not plain or found is None or not state.has_operand(node.inputs[0]):
        return False
    if bias is not None:
        size = math.prod(shape_of(bias))
        if size not in (1, len(found[0])) or (size > 1 and shape_of(bias)[-1] != size):
            return False
    return _fits(state, node, found, bias)


def _emit_gemm(state: Integers, pending: Pending, target: Quantization, name: str) -> ir.Value:
    weight, bias = _gemm_weight(state, pending.node), optional_input(pending.node, 2)
    assert weight is not None
    return _emit_product(state, pending, target, name, "QGemm", weight, bias, {})


PRODUCTS: dict[str, Rule] = {
    "Conv": Rule(_accepts_conv, _emit_conv),
    "Gemm": Rule(_accepts_gemm, _emit_gemm),
    "MatMul": Rule(_accepts_gemm, _emit_gemm),
}
