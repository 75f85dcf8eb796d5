"""Matrix products whose activations are quantized row by row at run time become one node each.

`quantize-dynamic` writes them in plain ONNX. Exactly these nodes are found again here, before
anything else reads the graph, and become `DynamicGemm` of the `edgepress` domain: x float32
`[…, inputs]`, weights int8 `[outputs, inputs]`, scales and bias float32 `[outputs]`, and where
`smooth-activations` left a Mul in front of the rows, its factors float32 `[inputs]`; attributes
`low` and `high` are the clamp of a ReLU or Clip. What differs in any way stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepress.targets.lowering.dialect import array_of, shape_of
from edgepress.targets.lowering.dynamic_reference import SMALLEST_STEP, STEPS
from edgepress.targets.lowering.floats import Array, Claim, claim, clamped_by, sole_user
from edgepress.targets.lowering.integers import is_quantized

_SMALLEST_NORMAL = np.finfo(np.float32).tiny
_MOST_INPUTS = (2**31 - 1) // (STEPS * 128)


def computes_integers(model: ir.Model) -> bool:
    """Tell whether the lowering makes integer arithmetic of some part of a model."""
    return is_quantized(model) or any(
        node.op_type == "MatMulInteger" and _claim(node) is not None for node in model.graph
    )


def claim_dynamic_products(model: ir.Model) -> ir.Model:
    """Replace the products that `quantize-dynamic` wrote. The model is not changed."""
    if not any(node.op_type == "MatMulInteger" for node in model.graph):
        return model
    return claim(model, {"MatMulInteger": _claim})


def _claim(node: ir.Node) -> Claim | None:
    """Claim a MatMulInteger with everything around it."""
    try:
        return _matched(node)
    except _Mismatch:
        return None


class _Mismatch(Exception):
    """A node is not the one that the pattern has here."""


def _matched(node: ir.Node) -> Claim:
    weights = array_of(node.inputs[1])
    _demand(len(node.inputs) == 2 and weights is not None)
    assert weights is not None
    _demand(weights.ndim == 2 and weights.dtype == np.int8 and weights.shape[0] <= _MOST_INPUTS)
    x, step, zero_point = _rows(node.inputs[0])
    _demand(x.dtype == ir.DataType.FLOAT and x.shape is not None and x.shape.is_static())
    _demand(len(shape_of(x)) >= 2 and shape_of(x)[-1] == weights.shape[0] > 0)
    centred = _only_reader(node.outputs[0], "Sub")
    shift, sums = _made_by(centred.inputs[1], "Mul")
    _demand(centred.inputs[0] is node.outputs[0] and shift is zero_point)
    _demand(_equals(sums, weights.astype(np.int64).sum(axis=0)))
    real = _only_reader(centred.outputs[0], "Cast")
    _demand(real.attributes.get_int("to", 0) == ir.DataType.FLOAT)
    by_row = _only_reader(real.outputs[0], "Mul")
    _demand(by_row.inputs[0] is real.outputs[0] and by_row.inputs[1] is step)
    last = _only_reader(by_row.outputs[0], "Mul")
    scales = array_of(last.inputs[1])
    _demand(last.inputs[0] is by_row.outputs[0] and scales is not None)
    assert scales is not None
    _demand(scales.dtype == np.float32 and scales.shape == weights.shape[1:])
    _demand(bool(np.isfinite(scales).all() and (scales >= SMALLEST_STEP).all()))
    followers = [centred, real, by_row, last]
    bias = np.zeros(weights.shape[1], np.float32)
    added = _bias_of(last, bias.shape)
    if added is not None:
        followers.append(added[0])
        last, bias = added
    last, more, bounds = clamped_by(last)
    constants: dict[str, Array] = {
        "weights": np.ascontiguousarray(weights.T),
        "scales": scales,
        # a board may flush what is subnormal
        "bias": np.where(np.abs(bias) < _SMALLEST_NORMAL, np.float32(0), bias),
    }
    smoothed = _smoothed(x)
    if smoothed is not None:
        x, constants["factors"] = smoothed
    return Claim("DynamicGemm", x, constants, dict(bounds), last, followers + more)


def _smoothed(x: ir.Value) -> tuple[ir.Value, Array] | None:
    """Return what a Mul with a constant per channel reads, and the constant; None for others."""
    node = x.producer()
    if node is None or node.op_type != "Mul" or node.domain != "" or x.is_graph_output():
        return None
    for source, other in (node.inputs, node.inputs[::-1]):
        factors = array_of(other)
        if source is None or factors is None or array_of(source) is not None:
            continue
        if source.shape is None or not source.shape.is_static():
            continue
        same = shape_of(source) == shape_of(x) and factors.shape == shape_of(x)[-1:]
        # a product that is subnormal may be flushed, which changes no step of a row
        if same and factors.dtype == np.float32:
            return source, factors
    return None


def _rows(steps: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Return the float value whose rows were quantized, its steps `[…, 1]`, its zero points."""
    (clipped,) = _made_by(steps, "Cast", to=ir.DataType.UINT8)
    shifted, least, most = _made_by(clipped, "Clip")
    _demand(_is(least, 0) and _is(most, STEPS))
    rounded, point = _made_by(shifted, "Add")
    (scaled,) = _made_by(rounded, "Round")
    x, inverse = _made_by(scaled, "Mul")
    one, step = _made_by(inverse, "Div")
    exact, smallest = _made_by(step, "Max")
    span, count = _made_by(exact, "Div")
    high, low = _made_by(span, "Sub")
    largest, zero = _made_by(high, "Max")
    least_value, also_zero = _made_by(low, "Min")
    _demand(_is(one, 1) and _is(smallest, SMALLEST_STEP) and _is(count, STEPS))
    _demand(_is(zero, 0) and _is(also_zero, 0))
    _demand(_reduced(largest, "ReduceMax") is x and _reduced(least_value, "ReduceMin") is x)
    (product,) = _made_by(point, "Round")
    below, factor = _made_by(product, "Mul")
    (negated,) = _made_by(below, "Neg")
    _demand(factor is inverse and negated is low)
    integers = [
        user.outputs[0]
        for user, _ in point.uses()
        if user.op_type == "Cast" and user.attributes.get_int("to", 0) == ir.DataType.INT32
    ]
    _demand(len(integers) == 1)
    return x, step, integers[0]


def _reduced(value: ir.Value, op_type: str) -> ir.Value:
    """Return what a node reduces over the last axis, which it keeps."""
    x, *axes = _made_by(value, op_type)
    node = value.producer()
    assert node is not None
    given = node.attributes.get_ints("axes", []) if not axes else array_of(axes[0])
    _demand(given is not None and node.attributes.get_int("keepdims", 1) == 1)
    assert given is not None
    _demand(list(given) in ([-1], [-1 if x.shape is None else len(x.shape) - 1]))
    return x


def _bias_of(node: ir.Node, shape: tuple[int, ...]) -> tuple[ir.Node, Array] | None:
    """Return the Add of a constant per column that alone reads a node, and the constant."""
    user = sole_user(node.outputs[0])
    if user is None or user.op_type != "Add" or user.domain != "":
        return None
    other = user.inputs[1] if user.inputs[0] is node.outputs[0] else user.inputs[0]
    addend = array_of(other)
    if addend is None or addend.shape != shape or addend.dtype != np.float32:
        return None
    return user, addend


def _demand(condition: bool) -> None:
    if not condition:
        raise _Mismatch


def _made_by(value: ir.Value | None, op_type: str, **attributes: int) -> tuple[ir.Value, ...]:
    """Return the inputs of the node that made a value."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != op_type or node.domain != "":
        raise _Mismatch
    given: Mapping[str, Any] = node.attributes
    if any(name not in given or given[name].value != v for name, v in attributes.items()):
        raise _Mismatch
    return tuple(v for v in node.inputs if v is not None)


def _only_reader(value: ir.Value, op_type: str) -> ir.Node:
    """Return the node that alone reads a value, once."""
    user = sole_user(value)
    if user is None or user.op_type != op_type or user.domain != "":
        raise _Mismatch
    return user


def _is(value: ir.Value, number: float) -> bool:
    """Tell whether a value is this number, of rank 0, in float32."""
    array = array_of(value)
    return (
        array is not None
        and array.shape == ()
        and array.dtype == np.float32
        and array == np.float32(number)
    )


def _equals(value: ir.Value, wanted: Array) -> bool:
    array = array_of(value)
    return array is not None and array.dtype == np.int32 and np.array_equal(array, wanted)
