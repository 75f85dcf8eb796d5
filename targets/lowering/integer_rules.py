"""Which operators have an integer form, and how it is written: one rule per operator."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepress.targets.lowering.dialect import array_of, shape_of
from edgepress.targets.lowering.integers import (
    Integers,
    Pending,
    Quantization,
    Quantized,
    Rule,
    Weight,
    multiplier,
    output_attributes,
)
from edgepress.targets.lowering.tables import FUNCTIONS, table
from edgepress.targets.lowering.window import (
    clip_bounds,
    global_window,
    overhangs,
    pool_factors,
    reduces_space,
    window_attributes,
)

Array = npt.NDArray[Any]
_SMALLEST = np.finfo(np.float32).tiny
_ADD_BITS = 21  # 9-bit values times 21-bit factors: the sum of two fits 31 bits

_SAME_STEP = 1e-3  # steps by which a constant may miss the grid of its 8-bit form

# Operators that move values and compute nothing.
MOVES = {
    "DepthToSpace",
    "Expand",
    "Flatten",
    "Gather",
    "Identity",
    "Pad",
    "Reshape",
    "Resize",
    "Slice",
    "SpaceToDepth",
    "Split",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
}


# Convolution and matrix product --------------------------------------------------------------


def _weight(state: Integers, value: ir.Value | None, axis: int) -> Weight | None:
    """Return a symmetric int8 weight with one scale per channel of `axis`."""
    weight = state.weights.get(value) if value is not None else None
    if weight is None or weight.array.dtype != np.int8 or weight.zero_point.any():
        return None
    if weight.scale.size > 1 and weight.axis != axis % weight.array.ndim:
        return None
    return weight


def _product(
    state: Integers,
    pending: Pending,
    target: Quantization,
    name: str,
    op_type: str,
    weight: tuple[Array, Array],
    bias_value: ir.Value | None,
    attributes: dict[str, Any],
) -> ir.Value:
    """Emit a node with weights `[out, …]`, int32 bias and one multiplier per output channel."""
    array, scale = weight
    x = state.operand(pending.node.inputs[0])
    assert x is not None
    scales = np.float32(x.quantization.scale) * np.broadcast_to(scale, array.shape[:1])
    scales = scales.astype(np.float32)
    bias = state.bias(bias_value, scales)
    assert bias is not None
    exact = np.float64(x.quantization.scale) * np.broadcast_to(scale, array.shape[:1])
    multipliers = multiplier(exact / np.float64(target.scale))
    label = pending.node.name or name
    return state.builder.node(
        op_type,
        [
            x.value,
            state.builder.constant(f"{label}_weights", array),
            state.builder.constant(f"{label}_bias", bias),
            state.builder.constant(f"{label}_multipliers", multipliers),
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
    """Tell whether there is a constant bias and no int32 accumulator can overflow."""
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
    below = x.quantization.zero_point - x.quantization.lowest
    reach = np.abs(array.reshape(len(array), -1).astype(np.int64)).sum(1) * max(below, 255 - below)
    return bool((np.abs(bias.astype(np.int64)) + reach < 2**31).all())


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def _accepts_conv(state: Integers, node: ir.Node) -> bool:
    weight = _weight(state, node.inputs[1], 0)
    return (
        state.has_operand(node.inputs[0])
        and weight is not None
        and weight.array.ndim == 4
        and _fits(state, node, (weight.array, weight.scale), _input(node, 2))
    )


def _emit_conv(state: Integers, pending: Pending, target: Quantization, name: str) -> ir.Value:
    node = pending.node
    weight = _weight(state, node.inputs[1], 0)
    assert weight is not None
    attributes = window_attributes(node, weight.array.shape[2:])
    attributes["group"] = node.attributes.get_int("group", 1)
    given = (weight.array, weight.scale)
    return _product(state, pending, target, name, "QConv", given, _input(node, 2), attributes)


def _gemm_weight(state: Integers, node: ir.Node) -> tuple[Array, Array] | None:
    """Return weights `[out, in]` and their scales."""
    transposed = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
    weight = _weight(state, node.inputs[1], 0 if transposed else -1)
    if weight is None or weight.array.ndim != 2:
        return None
    return (weight.array if transposed else weight.array.T), weight.scale


def _accepts_gemm(state: Integers, node: ir.Node) -> bool:
    bias = _input(node, 2)
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
    weight = _gemm_weight(state, pending.node)
    assert weight is not None
    return _product(state, pending, target, name, "QGemm", weight, _input(pending.node, 2), {})


# Two operands --------------------------------------------------------------------------------


def _accepts_binary(state: Integers, node: ir.Node) -> bool:
    return all(state.has_operand(value) for value in node.inputs)


def _emit_binary(state: Integers, pending: Pending, target: Quantization, name: str) -> ir.Value:
    node = pending.node
    a, b = (state.operand(value) for value in node.inputs)
    assert a is not None
    assert b is not None
    scale_a, scale_b = np.float64(a.quantization.scale), np.float64(b.quantization.scale)
    attributes: dict[str, Any] = {
        "a_zero_point": a.quantization.zero_point,
        "b_zero_point": b.quantization.zero_point,
        **output_attributes(target, target.clamp(pending.low, pending.high)),
    }
    if node.op_type == "Mul":
        attributes["multiplier"] = float(multiplier(scale_a * scale_b / np.float64(target.scale)))
    else:
        # Both operands as integers on one fine scale: `unit` is worth one step of the sum.
        unit = max(scale_a, scale_b) / 2.0**_ADD_BITS
        sign = -1 if node.op_type == "Sub" else 1
        attributes["a_factor"] = int(np.rint(scale_a / unit))
        attributes["b_factor"] = sign * int(np.rint(scale_b / unit))
        attributes["multiplier"] = float(multiplier(unit / np.float64(target.scale)))
    op_type = "QMul" if node.op_type == "Mul" else "QAdd"
    return state.builder.node(
        op_type,
        [a.value, b.value],
        attributes,
        name,
        target.dtype,
        shape_of(node.outputs[0]),
        label=node.name,
    )


def _accepts_concat(state: Integers, node: ir.Node) -> bool:
    return all(state.has_operand(value) for value in node.inputs)


def _emit_concat(state: Integers, pending: Pending, target: Quantization, name: str) -> ir.Value:
    parts = []
    for i, value in enumerate(pending.node.inputs):
        operand = state.operand(value)
        assert operand is not None
        part_name = f"{name}_part_{i}"
        parts.append(state.rescale(operand, target, part_name, pending.low, pending.high))
    axis = pending.node.attributes.get_int("axis", 1)
    shape = shape_of(pending.node.outputs[0])
    return state.builder.node(
        "Concat", parts, {"axis": axis}, name, target.dtype, shape, "", pending.node.name
    )


# Pools ---------------------------------------------------------------------------------------


def _accepts_pool(state: Integers, node: ir.Node) -> bool:
    x = node.inputs[0]
    if x is None or not state.has_operand(x) or len(shape_of(x)) != 4:
        return False
    if node.op_type == "MaxPool" and len(node.outputs) > 1 and node.outputs[1].uses():
        return False
    if node.op_type == "ReduceMean":
        return reduces_space(node)
    # A window that hangs over the padded edge (ceil_mode) is left to the float path.
    return not node.attributes.get_int("ceil_mode", 0) or not overhangs(node)


def _emit_pool(state: Integers, pending: Pending, target: Quantization, name: str) -> ir.Value:
    node = pending.node
    x = state.operand(node.inputs[0])
    assert x is not None
    shape, given = shape_of(node.outputs[0]), shape_of(x.value)
    if node.op_type == "MaxPool":
        window = window_attributes(node, node.attributes.get_ints("kernel_shape", []))
        pooled = state.builder.node(
            "MaxPool",
            [x.value],
            window,
            f"{name}_pooled",
            x.quantization.dtype,
            shape,
            label=node.name,
        )
        source = Quantized(pooled, x.quantization)
        return state.rescale(source, target, name, pending.low, pending.high)
    if node.op_type == "AveragePool":
        window = window_attributes(node, node.attributes.get_ints("kernel_shape", []))
        factors = pool_factors(node, window)
    else:
        window = global_window(given)
        factors = np.full((1, 1), 1.0 / (given[2] * given[3]))
    scale = np.float64(x.quantization.scale) / np.float64(target.scale)
    multipliers = state.builder.constant(f"{name}_factors", multiplier(factors * scale))
    pooled_shape = (*given[:2], *factors.shape)
    pooled = state.builder.node(
        "QAveragePool",
        [x.value, multipliers],
        {
            **window,
            "x_zero_point": x.quantization.zero_point,
            **output_attributes(target, target.clamp(pending.low, pending.high)),
        },
        name,
        target.dtype,
        pooled_shape,
        label=node.name,
    )
    if pooled_shape == shape:
        return pooled
    wanted = state.builder.constant(f"{name}_shape", np.array(shape, np.int64))
    return state.builder.node(
        "Reshape", [pooled, wanted], {}, f"{name}_squeezed", target.dtype, shape, ""
    )


# One operand ---------------------------------------------------------------------------------


def _accepts_first(state: Integers, node: ir.Node) -> bool:
    return state.has_operand(node.inputs[0])


def _emit_clamp(state: Integers, pending: Pending, target: Quantization, name: str) -> ir.Value:
    x, bounds = state.operand(pending.node.inputs[0]), clip_bounds(pending.node)
    assert x is not None
    assert bounds is not None
    low, high = (min(max(bound, pending.low), pending.high) for bound in (min(bounds), bounds[1]))
    return state.rescale(x, target, name, low, high)


def _accepts_clamp(state: Integers, node: ir.Node) -> bool:
    return state.has_operand(node.inputs[0]) and clip_bounds(node) is not None


def _emit_table(state: Integers, pending: Pending, target: Quantization, name: str) -> ir.Value:
    node = pending.node
    x = state.operand(node.inputs[0])
    assert x is not None
    q = x.quantization
    steps = np.arange(q.lowest, q.lowest + 256, dtype=np.float64) - q.zero_point
    real = FUNCTIONS[node.op_type](steps * np.float64(q.scale), node)
    low, high = target.clamp(pending.low, pending.high)
    entries = table(real, float(target.scale), target.zero_point, low, high, target.dtype)
    return state.builder.node(
        "Table",
        [x.value, state.builder.constant(f"{name}_table", entries)],
        {},
        name,
        target.dtype,
        shape_of(node.outputs[0]),
        label=node.name,
    )


def _accepts_move(state: Integers, node: ir.Node) -> bool:
    if not state.has_operand(node.inputs[0]):
        return False
    if node.op_type == "Resize":
        # Outside a crop there are values that the input does not have.
        crop = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
        nearest = node.attributes.get_string("mode", "nearest") == "nearest"
        return nearest and crop != "tf_crop_and_resize"
    if node.op_type == "Pad":
        given = _input(node, 2)
        return given is None or _pad_steps(state, node, given) is not None
    return all(array_of(value) is not None for value in node.inputs[1:] if value is not None)


def _emit_move(state: Integers, pending: Pending, target: Quantization, name: str) -> ir.Value:
    node = pending.node
    x = state.operand(node.inputs[0])
    assert x is not None
    if node not in state.moved:
        inputs: list[ir.Value | None] = [x.value]
        for index, value in enumerate(node.inputs[1:], 1):
            if value is None:
                inputs.append(None)
            elif node.op_type == "Pad" and index == 2:
                steps = _pad_steps(state, node, value)
                fill = np.array(steps, x.quantization.dtype)
                inputs.append(state.builder.constant(f"{name}_fill", fill))
            else:
                inputs.append(state.float_of(value))
        if node.op_type == "Pad" and len(inputs) < 3:
            zero = np.array(x.quantization.zero_point, x.quantization.dtype)
            inputs.append(state.builder.constant(f"{name}_fill", zero))
        state.moved[node] = state.builder.copy(node, inputs, x.quantization.dtype)
    moved = Quantized(state.moved[node][pending.output], x.quantization)
    return state.rescale(moved, target, name, pending.low, pending.high)


def _pad_steps(state: Integers, node: ir.Node, value: ir.Value) -> int | None:
    """Return the 8-bit form of what a Pad fills with; None where it has none or is not constant."""
    x, real = state.operand(node.inputs[0]), array_of(value)
    assert x is not None
    if value in state.weights:
        weight = state.weights[value]
        real = (weight.array - weight.zero_point) * weight.scale
    if real is None or not np.isfinite(real.item()):
        return None
    steps = real.item() / np.float64(x.quantization.scale)
    near, lowest = np.rint(steps), x.quantization.lowest
    stored = near + x.quantization.zero_point
    if abs(steps - near) > _SAME_STEP or not lowest <= stored <= lowest + 255:
        return None
    return int(stored)


RULES: dict[str, Rule] = {
    "Conv": Rule(_accepts_conv, _emit_conv),
    "Gemm": Rule(_accepts_gemm, _emit_gemm),
    "MatMul": Rule(_accepts_gemm, _emit_gemm),
    "Add": Rule(_accepts_binary, _emit_binary),
    "Sub": Rule(_accepts_binary, _emit_binary),
    "Mul": Rule(_accepts_binary, _emit_binary),
    "Concat": Rule(_accepts_concat, _emit_concat),
    "MaxPool": Rule(_accepts_pool, _emit_pool),
    "AveragePool": Rule(_accepts_pool, _emit_pool),
    "GlobalAveragePool": Rule(_accepts_pool, _emit_pool),
    "ReduceMean": Rule(_accepts_pool, _emit_pool),
    "Relu": Rule(_accepts_clamp, _emit_clamp),
    "Clip": Rule(_accepts_clamp, _emit_clamp),
    **{name: Rule(_accepts_first, _emit_table) for name in FUNCTIONS},
    **{name: Rule(_accepts_move, _emit_move) for name in MOVES},
}


def to_integers(model: ir.Model, storage: str) -> ir.Model:
    """Replace QDQ groups by integer nodes; 8-bit tensors are kept as `storage` (uint8 or int8).

    The model must be canonical: static shapes, constants as initializers. It is not changed.
    """
    return Integers(model, storage, RULES).run()
