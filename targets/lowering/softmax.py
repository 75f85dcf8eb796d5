"""Softmax in integers: when it has this form, and the constants that it needs.

The rule is in docs/integer.md. The bounds here keep its sums within int64, its divisor within
2 … 2**31 - 1, and every quotient a division of two int32.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepress.targets.lowering.dialect import shape_of
from edgepress.targets.lowering.integers import Integers, Pending, Rule
from edgepress.targets.lowering.quantization import Quantization, output_attributes

EXPONENTIAL_BITS = 29
_FACTOR_BITS = 16
_LONGEST = 2**17  # elements that sum to 1: 2**17 * 2**29 * 2**16 is 2**62
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-28, 2.0**8  # of the result, which is 1 at most
_SINCE_ONE_AXIS = 13  # before, all axes from the given one on sum to 1 together


def _accepts_softmax(state: Integers, node: ir.Node) -> bool:
    """Tell whether the rows are short enough and the scales of the results are sensible."""
    x, output = node.inputs[0], node.outputs[0]
    shape = shape_of(output)
    if not state.has_operand(x) or not shape or 0 in shape:
        return False
    axis = _axis(state, node)
    if shape[axis] > _LONGEST or (axis != len(shape) - 1 and not _has_one_axis(state)):
        return False
    targets = [state.quantization(user) for user in _quantizers(output)]
    return all(t is not None and _SMALLEST_SCALE <= t.scale <= _LARGEST_SCALE for t in targets)


def _emit_softmax(state: Integers, pending: Pending, target: Quantization, name: str) -> ir.Value:
    """Emit a QSoftmax: x and its table of exponentials."""
    node = pending.node
    x = state.operand(node.inputs[0])
    assert x is not None
    table = exponentials(float(x.quantization.scale), x.quantization.dtype)
    factor, shift = divisor_factor(float(target.scale))
    bounds = target.clamp(pending.low, pending.high)
    attributes: dict[str, Any] = {
        "axis": _axis(state, node),
        "factor": factor,
        "factor_shift": shift,
        **output_attributes(target, bounds),
    }
    operands = [x.value, state.builder.constant(f"{name}_exponentials", table)]
    shape = shape_of(node.outputs[0])
    return state.builder.node(
        "QSoftmax", operands, attributes, name, target.dtype, shape, label=node.name
    )


def exponentials(scale: float, dtype: str) -> npt.NDArray[np.int32]:
    """Return `exp(-scale * d)` in units of 2**-29 for d from 0 to 255.

    Of int16 values, d has 16 bits: first the exponentials of its upper byte, then of its lower.
    """
    below = np.arange(256, dtype=np.float64)
    steps = np.concatenate([below * 256, below]) if dtype == "int16" else below
    return np.rint(np.exp(-scale * steps) * 2.0**EXPONENTIAL_BITS).astype(np.int32)


def divisor_factor(scale: float) -> tuple[int, int]:
    """Return `(factor, shift)` with `scale = factor / 2**shift`, to 16 bits.

    >>> divisor_factor(1 / 256), divisor_factor(1 / 255)
    ((32768, 23), (32897, 23))
    """
    mantissa, exponent = math.frexp(scale)
    return round(mantissa * 2**_FACTOR_BITS), _FACTOR_BITS - exponent


def _quantizers(value: ir.Value) -> list[ir.Node]:
    """Return what quantizes a value, perhaps behind a ReLU or Clip; nothing else reads it."""
    users = value.consumers()
    direct = [user for user in users if user.op_type == "QuantizeLinear"]
    return direct or [q for user in users for q in _quantizers(user.outputs[0])]


def _has_one_axis(state: Integers) -> bool:
    return state.source.graph.opset_imports.get("", 0) >= _SINCE_ONE_AXIS


def _axis(state: Integers, node: ir.Node) -> int:
    default = -1 if _has_one_axis(state) else 1
    return node.attributes.get_int("axis", default) % len(shape_of(node.outputs[0]))


def softmax_axes(node: ir.Node) -> tuple[int, int]:
    """Return the first axis of those that sum to 1 together, and the one behind the last."""
    rank, graph = len(shape_of(node.outputs[0])), node.graph
    opset = graph.opset_imports.get("", _SINCE_ONE_AXIS) if graph is not None else _SINCE_ONE_AXIS
    one = opset >= _SINCE_ONE_AXIS
    axis = node.attributes.get_int("axis", -1 if one else 1) % rank
    return axis, axis + 1 if one else rank


SOFTMAX = {"Softmax": Rule(_accepts_softmax, _emit_softmax)}
