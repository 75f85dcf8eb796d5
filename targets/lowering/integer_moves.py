"""Operators that move integers and compute nothing."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepress.targets.lowering.dialect import array_of
from edgepress.targets.lowering.integer_products import optional_input
from edgepress.targets.lowering.integers import Integers, Pending, Rule
from edgepress.targets.lowering.quantization import Quantization, Quantized

_SAME_STEP = 1e-3  # steps by which a constant may miss the grid of its quantized form


def _accepts_move(state: Integers, node: ir.Node) -> bool:
    if not state.has_operand(node.inputs[0]):
        return False
    if node.op_type == "Resize":
        # Outside a crop there are values that the input does not have.
        crop = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
        nearest = node.attributes.get_string("mode", "nearest") == "nearest"
        return nearest and crop != "tf_crop_and_resize"
    if node.op_type == "Pad":
        given = optional_input(node, 2)
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
    """Return the stored form of what a Pad fills with; None where it has none or varies."""
    x, real = state.operand(node.inputs[0]), array_of(value)
    assert x is not None
    if value in state.weights:
        weight = state.weights[value]
        real = (weight.array - weight.zero_point) * weight.scale
    if real is None or not np.isfinite(real.item()):
        return None
    q = x.quantization
    steps = real.item() / np.float64(q.scale)
    near = np.rint(steps)
    stored = near + q.zero_point
    if abs(steps - near) > _SAME_STEP or not q.lowest <= stored <= q.highest:
        return None
    return int(stored)


_NAMES = (
    "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Resize", "Slice",
    "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
)  # fmt: skip
MOVES: dict[str, Rule] = {name: Rule(_accepts_move, _emit_move) for name in _NAMES}
