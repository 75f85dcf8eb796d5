"""Integer forms of element-wise operators and of Concat."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepress.targets.lowering.dialect import shape_of
from edgepress.targets.lowering.integers import Integers, Pending, Rule
from edgepress.targets.lowering.look_up import emit_function
from edgepress.targets.lowering.quantization import (
    Quantization,
    factor_attribute,
    output_attributes,
)
from edgepress.targets.lowering.tables import FUNCTIONS
from edgepress.targets.lowering.window import clip_bounds

Array = npt.NDArray[Any]
_ADD_BITS = 21  # 9-bit values times 21-bit factors: the sum of two fits 31 bits
_WIDE_ADD_DENOMINATOR = 2**15  # 16-bit values times 15-bit factors: the sum of two fits int32


# Two operands --------------------------------------------------------------------------------


def _accepts_all(state: Integers, node: ir.Node) -> bool:
    return all(state.has_operand(value) for value in node.inputs)


def add_factors(a: Quantization, b: Quantization) -> tuple[int, int, np.float64]:
    """Return integer factors that bring two operands to one fine scale, and that scale.

    8-bit operands get 21 bits. Where one has 16, the ratio of the scales becomes the nearest
    fraction whose terms have 15.
    """
    scales = np.float64(a.scale), np.float64(b.scale)
    largest = max(scales)
    if "int16" not in (a.dtype, b.dtype):
        unit = largest / 2.0**_ADD_BITS
        first, second = (int(np.rint(scale / unit)) for scale in scales)
        return first, second, unit
    ratio = Fraction(float(min(scales))) / Fraction(float(largest))
    near = ratio.limit_denominator(_WIDE_ADD_DENOMINATOR)
    factors = near.denominator, near.numerator
    first, second = factors if scales[0] == largest else factors[::-1]
    return first, second, np.float64(largest / near.denominator)


def _emit_binary(state: Integers, pending: Pending, target: Quantization, name: str) -> ir.Value:
    node = pending.node
    a, b = (state.operand(value) for value in node.inputs)
    assert a is not None
    assert b is not None
    given = (a.quantization, b.quantization)
    scale_a, scale_b = (np.float64(q.scale) for q in given)
    attributes: dict[str, Any] = {
        "a_zero_point": a.quantization.zero_point,
        "b_zero_point": b.quantization.zero_point,
        **output_attributes(target, target.clamp(pending.low, pending.high)),
    }
    if node.op_type == "Mul":
        ratio = scale_a * scale_b / np.float64(target.scale)
    else:
        first, second, unit = add_factors(*given)
        attributes["a_factor"] = first
        attributes["b_factor"] = -second if node.op_type == "Sub" else second
        ratio = unit / np.float64(target.scale)
    attributes |= factor_attribute(ratio, scale_a, scale_b, target.scale)
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


# One operand ---------------------------------------------------------------------------------


def _accepts_first(state: Integers, node: ir.Node) -> bool:
    return state.has_operand(node.inputs[0])


def _accepts_clamp(state: Integers, node: ir.Node) -> bool:
    return state.has_operand(node.inputs[0]) and clip_bounds(node) is not None


def _emit_clamp(state: Integers, pending: Pending, target: Quantization, name: str) -> ir.Value:
    x, bounds = state.operand(pending.node.inputs[0]), clip_bounds(pending.node)
    assert x is not None
    assert bounds is not None
    low, high = (min(max(bound, pending.low), pending.high) for bound in (min(bounds), bounds[1]))
    return state.rescale(x, target, name, low, high)


def _emit_table(state: Integers, pending: Pending, target: Quantization, name: str) -> ir.Value:
    node = pending.node
    x = state.operand(node.inputs[0])
    assert x is not None
    return emit_function(
        state.builder,
        lambda real: FUNCTIONS[node.op_type](real, node),
        x,
        target,
        name,
        bounds=(pending.low, pending.high),
        label=node.name,
    )


ELEMENTWISE: dict[str, Rule] = {
    "Add": Rule(_accepts_all, _emit_binary),
    "Sub": Rule(_accepts_all, _emit_binary),
    "Mul": Rule(_accepts_all, _emit_binary),
    "Concat": Rule(_accepts_all, _emit_concat),
    "Relu": Rule(_accepts_clamp, _emit_clamp),
    "Clip": Rule(_accepts_clamp, _emit_clamp),
    **{name: Rule(_accepts_first, _emit_table) for name in FUNCTIONS},
}
