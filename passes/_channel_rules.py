"""What every operator does to channels: a table of rules.

A rule ties the axes of a node's inputs where they must be cut alike, and gives its outputs their
axes. What it computes when a channel is removed must be what it computes when that channel is
masked with zeros, in all other channels; where that is not so, the axis is frozen. The exceptions
are LayerNormalization and RMSNormalization, whose statistics are then over what remains.

An axis of an input that is not tied, handed on or summed away is frozen. That holds for the inputs
that are no data, such as shapes, too: another node may read them as data.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepress.passes._channel_axes import Axes, Axis, Kept, NoRule
from edgepress.passes._channel_shapes import (
    SHAPE_RULES,
    Rule,
    broadcast,
    freeze_inputs,
    operand,
    parameter,
)
from edgepress.passes._shapes import shape_of, static_shape

#: One value in, one out, element by element. Parameters beside the first input are scalars.
_ELEMENTWISE = (
    "Abs",
    "Acos",
    "Acosh",
    "Asin",
    "Asinh",
    "Atan",
    "Atanh",
    "BitwiseNot",
    "Cast",
    "Ceil",
    "Celu",
    "Clip",
    "Cos",
    "Cosh",
    "Dropout",
    "Elu",
    "Erf",
    "Exp",
    "Floor",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "IsInf",
    "IsNaN",
    "LeakyRelu",
    "Log",
    "Mish",
    "Neg",
    "Not",
    "Reciprocal",
    "Relu",
    "Round",
    "Selu",
    "Shrink",
    "Sigmoid",
    "Sign",
    "Sin",
    "Sinh",
    "Softplus",
    "Softsign",
    "Sqrt",
    "Swish",
    "Tan",
    "Tanh",
    "ThresholdedRelu",
)
#: Several values, broadcast to one shape.
_BROADCAST = (
    "Add",
    "And",
    "BitwiseAnd",
    "BitwiseOr",
    "BitwiseXor",
    "Div",
    "Equal",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "Max",
    "Mean",
    "Min",
    "Mod",
    "Mul",
    "Or",
    "PRelu",
    "Pow",
    "Sub",
    "Sum",
    "Where",
    "Xor",
)
#: Zeros that are left out change nothing.
_SUMS = ("ReduceL1", "ReduceL2", "ReduceSum", "ReduceSumSquare")
_OTHER_REDUCTIONS = (
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
)
_POOLS = ("AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool")


def _elementwise(axes: Axes, node: ir.Node) -> None:
    freeze_inputs(axes, node, 1)
    axes.set(node.outputs[0], axes.of(operand(node, 0)))


def _broadcast(axes: Axes, node: ir.Node) -> None:
    values = [value for value in node.inputs if value is not None]
    operands = [(axes.of(value), shape_of(value)) for value in values]
    axes.set(node.outputs[0], broadcast(axes, node, operands, shape_of(node.outputs[0])))


def _conv(axes: Axes, node: ir.Node) -> None:
    x, weight = operand(node, 0), operand(node, 1)
    inputs, kernel = axes.of(x), axes.of(weight)
    axes.freeze(*inputs[2:], *kernel[2:], why=f"{node.name} slides over it")
    groups, channels = node.attributes.get_int("group", 1), shape_of(x)[1]
    if groups == channels and groups > 1:
        multiplier = shape_of(weight)[0] // channels
        repeated = None if inputs[1] is None else np.repeat(inputs[1], multiplier)
        axes.tie(kernel[0], repeated, f"{node.name} filters an axis that must stay")
        axes.freeze(kernel[1], why=f"{node.name} is depthwise")
        _count_groups(axes, node, inputs[1])
    else:
        # equal positions of all groups go together, so that the groups stay equally wide
        for part in _split(inputs[1], groups):
            axes.tie(kernel[1], part, f"{node.name} reads it beside an axis that must stay")
        _alike(axes, node, kernel[0], groups)
        axes.reads(node, weight, 1, inputs[1])
    axes.makes(node, weight, 0)
    _bias(axes, node, kernel[0])
    axes.set(node.outputs[0], [inputs[0], kernel[0], *[None] * (len(inputs) - 2)])


def _conv_transpose(axes: Axes, node: ir.Node) -> None:
    x, weight = operand(node, 0), operand(node, 1)
    inputs, kernel = axes.of(x), axes.of(weight)
    axes.freeze(*inputs[2:], *kernel[2:], why=f"{node.name} slides over it")
    groups, multiplier = node.attributes.get_int("group", 1), shape_of(weight)[1]
    axes.tie(kernel[0], inputs[1], f"{node.name} reads it beside an axis that must stay")
    outputs: Axis
    if groups == shape_of(x)[1] and groups > 1:
        outputs = None if kernel[0] is None else np.repeat(kernel[0], multiplier)
        axes.freeze(kernel[1], why=f"{node.name} is depthwise")
        _count_groups(axes, node, inputs[1])
        axes.makes(node, weight, 0, outputs)
    else:
        _alike(axes, node, kernel[0], groups)
        outputs = None if kernel[1] is None else np.tile(kernel[1], groups)
        axes.makes(node, weight, 1, outputs)
        axes.reads(node, weight, 0)
    _bias(axes, node, outputs)
    axes.set(node.outputs[0], [inputs[0], outputs, *[None] * (len(inputs) - 2)])


def _count_groups(axes: Axes, node: ir.Node, inputs: Axis) -> None:
    """Let a depthwise convolution keep one group per channel."""

    def fix(kept: Kept) -> None:
        if inputs is not None and not kept(inputs).all():
            node.attributes["group"] = ir.AttrInt64("group", int(kept(inputs).sum()))

    axes.on_cut(fix)


def _bias(axes: Axes, node: ir.Node, outputs: Axis) -> None:
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        axes.tie(axes.of(node.inputs[2])[0], outputs, f"{node.name} adds it to an axis that stays")


def _split(axis: Axis, parts: int) -> list[Axis]:
    return [None] * parts if axis is None else list(axis.reshape(parts, -1))


def _alike(axes: Axes, node: ir.Node, axis: Axis, groups: int) -> None:
    """Cut equal positions of all groups alike."""
    first, *others = _split(axis, groups)
    for part in others:
        axes.tie(first, part, f"{node.name} has equal groups")


def _matmul(axes: Axes, node: ir.Node) -> None:
    one, other = operand(node, 0), operand(node, 1)
    left, right = axes.of(one), axes.of(other)
    if len(left) < 2 or len(right) < 2:
        raise NoRule(" of a vector")
    axes.tie(left[-1], right[-2], f"{node.name} sums over it beside an axis that must stay")
    axes.makes(node, one, -2)
    axes.reads(node, one, -1)
    axes.makes(node, other, -1)
    axes.reads(node, other, -2)
    batches = [(left[:-2], shape_of(one)[:-2]), (right[:-2], shape_of(other)[:-2])]
    batch = broadcast(axes, node, batches, shape_of(node.outputs[0])[:-2])
    axes.set(node.outputs[0], [*batch, left[-2], right[-1]])


def _gemm(axes: Axes, node: ir.Node) -> None:
    one, other = operand(node, 0), operand(node, 1)
    row, over = (1, 0) if node.attributes.get_int("transA", 0) else (0, 1)
    under, column = (1, 0) if node.attributes.get_int("transB", 0) else (0, 1)
    left, right = axes.of(one), axes.of(other)
    axes.tie(left[over], right[under], f"{node.name} sums over it beside an axis that must stay")
    axes.makes(node, other, column)
    axes.reads(node, other, under)
    shape = shape_of(node.outputs[0])
    terms = [([left[row], right[column]], shape)]
    if len(node.inputs) > 2 and (bias := node.inputs[2]) is not None:
        terms.append((axes.of(bias), shape_of(bias)))
    axes.set(node.outputs[0], broadcast(axes, node, terms, shape))


def _batch_norm(axes: Axes, node: ir.Node) -> None:
    """Scales, shifts and statistics belong to axis 1."""
    if node.attributes.get_int("training_mode", 0):
        raise NoRule(" in training mode")
    inputs = axes.of(operand(node, 0))
    for value in node.inputs[1:]:
        if value is not None:
            axes.tie(axes.of(value)[0], inputs[1], f"{node.name} normalises an axis that stays")
    if node.op_type == "InstanceNormalization":
        axes.freeze(*inputs[2:], why=f"{node.name} normalises over it")
        inputs = [*inputs[:2], *[None] * (len(inputs) - 2)]
    axes.set(node.outputs[0], inputs)


def _layer_norm(axes: Axes, node: ir.Node) -> None:
    """Scales and shifts belong to the last axes, those that are normalised."""
    x = operand(node, 0)
    terms = [(axes.of(x), shape_of(x))]
    terms += [(axes.of(value), shape_of(value)) for value in node.inputs[1:] if value is not None]
    axes.set(node.outputs[0], broadcast(axes, node, terms, shape_of(x)))


def _pool(axes: Axes, node: ir.Node) -> None:
    inputs = axes.of(operand(node, 0))
    axes.freeze(*inputs[2:], why=f"{node.name} slides over it")
    axes.set(node.outputs[0], [*inputs[:2], *[None] * (len(inputs) - 2)])


def _softmax(axes: Axes, node: ir.Node) -> None:
    inputs = list(axes.of(operand(node, 0)))
    axis = node.attributes.get_int("axis", -1)
    axes.freeze(inputs[axis], why=f"{node.name} normalises over it")
    inputs[axis] = None
    axes.set(node.outputs[0], inputs)


def _reduce(axes: Axes, node: ir.Node) -> None:
    inputs = axes.of(operand(node, 0))
    rank = len(inputs)
    given = parameter(axes, node, 1)
    listed = node.attributes.get_ints("axes", ()) if given is None else given.reshape(-1).tolist()
    everything = not listed and not node.attributes.get_int("noop_with_empty_axes", 0)
    reduced = set(range(rank)) if everything else {int(axis) % rank for axis in listed}
    if node.op_type not in _SUMS:
        axes.freeze(*(inputs[axis] for axis in reduced), why=f"{node.name} reduces over it")
    result = [None if index in reduced else axis for index, axis in enumerate(inputs)]
    if not node.attributes.get_int("keepdims", 1):
        result = [axis for index, axis in enumerate(result) if index not in reduced]
    axes.set(node.outputs[0], result)


def _quantization(axes: Axes, node: ir.Node) -> None:
    """Scales and zero points per channel go with their channels."""
    if node.attributes.get_int("block_size", 0):
        raise NoRule(" of blocks")
    inputs = axes.of(operand(node, 0))
    for value in node.inputs[1:]:
        if value is None or not shape_of(value):
            continue
        (scales,) = axes.of(value)
        if shape_of(value) == (1,):
            axes.freeze(scales, why=f"{node.name} scales all of a tensor with it")
        else:
            axis = inputs[node.attributes.get_int("axis", 1)]
            axes.tie(scales, axis, f"{node.name} scales an axis that must stay")
    axes.set(node.outputs[0], inputs)


RULES: dict[str, Rule] = {
    **SHAPE_RULES,
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_BROADCAST, _broadcast),
    **dict.fromkeys((*_SUMS, *_OTHER_REDUCTIONS), _reduce),
    **dict.fromkeys(_POOLS, _pool),
    **dict.fromkeys(("LogSoftmax", "Softmax", "Hardmax"), _softmax),
    **dict.fromkeys(("DequantizeLinear", "QuantizeLinear"), _quantization),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _layer_norm),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization"), _batch_norm),
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
}


def rule_of(node: ir.Node) -> Rule:
    """Return the rule of a node. Raises NoRule where there is none for its operator or form."""
    rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if rule is None:
        raise NoRule
    outputs = [value for value in node.outputs if value.uses() or value.is_graph_output()]
    if node.op_type != "Split" and any(value in node.outputs[1:] for value in outputs):
        raise NoRule(" whose second output is read")
    values = [*(value for value in node.inputs if value is not None), node.outputs[0], *outputs]
    if any(static_shape(value) is None for value in values):
        raise NoRule(" of unknown shape")
    return rule
