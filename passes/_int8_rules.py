"""Which nodes run on 8-bit integers, and why the others do not.

An operator is in one of three tables. Anchors bring the speed and are always quantized. Followers
are quantized where all of their activations are already: an Add inside a float island would only
lose accuracy. Carriers move values without computing new ones, so their outputs share the scale
and zero point of their input, and they also join a quantized consumer. What is in no table stays
float, unless it is part of a function of one value (`_functions`), which follows as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Range
from edgepress.passes._functions import ELEMENTWISE, RECTIFIED, RECTIFIERS, find_functions
from edgepress.passes._shapes import static_shape

#: Returns why this node must stay float, or None.
Check = Callable[[ir.Node], str | None]

_ON_CONSTANTS = ("Add", "Concat", "Mul", "Sub")
_SEVERAL = ("Concat", "MatMul")  # besides element-wise operators
_DWARFED = 64  # a range that is this much smaller than another has 4 of its 256 steps
_LONGEST_SOFTMAX = 2**17


@dataclass(frozen=True)
class Plan:
    """What to quantize.

    Attributes:
        nodes: the nodes that run on integers, in graph order.
        fused: values between a node and its rectifier, or inside a function of one value, which get
            no scale of their own.
        functions: those of the nodes that are part of a function, and the value that it is one of;
            their constants stay as they are.
        floats: the nodes on float32 values that stay float, in graph order, and why.
    """

    nodes: list[ir.Node]
    fused: set[ir.Value]
    functions: dict[ir.Node, ir.Value]
    floats: list[tuple[ir.Node, str]]

    def quantizes_operands(self, node: ir.Node) -> bool:
        """Whether the node's constants are quantized like activations."""
        return node.op_type in _ON_CONSTANTS and node not in self.functions


def constant(value: ir.Value | None) -> np.ndarray | None:
    """Return the array of an initializer that nobody can override, or None."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy() if value.is_initializer() else None


def activations(node: ir.Node) -> list[ir.Value]:
    """Return the values that the node computes on, without constants, shapes and bounds."""
    several = node.op_type in _SEVERAL or node.op_type in ELEMENTWISE
    many = len(node.inputs) if several else 1
    values = [value for value in node.inputs[:many] if value is not None]
    return [value for value in values if constant(value) is None]


def results(node: ir.Node) -> list[ir.Value]:
    """Return the node's outputs that exist."""
    return [value for value in node.outputs if value.name]


def is_carrier(node: ir.Node) -> bool:
    """Whether the outputs share the scale and the zero point of the input."""
    if node.op_type == "Resize":
        return node.attributes.get_string("mode", "nearest") == "nearest"
    return node.op_type in CARRIERS


def plan(model: ir.Model, skipped: dict[ir.Node, str], *, everywhere: bool = False) -> Plan:
    """Decide for every node; `skipped` nodes stay float for the reason given.

    With `everywhere`, all that has an integer form is quantized, although it gains or loses by it:
    carriers between float operators, and sums whose constant dwarfs what it is added to.
    """
    order = list(model.graph)
    functions = find_functions([node for node in order if node not in skipped], FOLLOWERS)
    reasons = {
        node: why
        for node in order
        if (why := skipped.get(node))
        or (node not in functions.sources and (why := _check(node, everywhere=everywhere)))
    }
    chosen: set[ir.Node] = {n for n in order if n not in reasons and n.op_type in ANCHORS}

    def is_integer(value: ir.Value) -> bool:
        producer = value.producer()
        if producer is None or producer in chosen:
            return value.is_graph_input() or producer is not None
        # a carrier on a graph input joins as soon as its consumer does
        carries = is_carrier(producer) and producer not in reasons
        return carries and all(map(is_integer, activations(producer)))

    def joins(node: ir.Node) -> bool:
        if node in functions.sources:
            return is_integer(functions.sources[node])
        if is_carrier(node):
            consumers = (user for value in node.outputs for user in value.consumers())
            sources = (value.producer() for value in activations(node))
            return (
                any(source in chosen for source in sources if source)
                or any(user in chosen for user in consumers)
                or (everywhere and all(map(is_integer, activations(node))))
            )
        return all(map(is_integer, activations(node)))

    size = -1
    while size != len(chosen):
        size = len(chosen)
        for node in (*order, *reversed(order)):
            if node not in reasons and node not in chosen and joins(node):
                chosen.add(node)

    floats = []
    for node in order:
        if node in chosen or not any(_is_float(v) for v in (*node.inputs, *node.outputs)):
            continue
        floats.append((node, reasons.get(node) or _follows(node, is_integer)))
    nodes = [node for node in order if node in chosen]
    inside = {node: source for node, source in functions.sources.items() if node in chosen}
    fused = {v for node in nodes if node not in inside and (v := _fused_input(node, chosen))}
    fused |= {value for node in inside for value in node.outputs if value in functions.inner}
    return Plan(nodes, fused, inside, floats)


def _fused_input(node: ir.Node, chosen: set[ir.Node]) -> ir.Value | None:
    """Return the value between a rectifier and the node that it folds into."""
    if node.op_type not in RECTIFIERS or (value := node.inputs[0]) is None:
        return None
    producer = value.producer()
    if producer not in chosen or producer.op_type not in RECTIFIED:
        return None
    return value if len(value.uses()) == 1 and not value.is_graph_output() else None


def _follows(node: ir.Node, is_integer: Callable[[ir.Value], bool]) -> str:
    """Say which input keeps a follower or a carrier float."""
    value = next((value for value in activations(node) if not is_integer(value)), None)
    if value is None:
        return f"{node.op_type} between float operators is not worth quantizing"
    return f"its input {value.name!r} is float"


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT


def _check(node: ir.Node, *, everywhere: bool) -> str | None:
    """Return why the node must stay float whatever its neighbours are, or None."""
    check = (ANCHORS | FOLLOWERS | CARRIERS).get(node.op_type) if not node.domain else None
    if check is None:
        return f"{node.op_type} has no 8-bit form here"
    if not all(map(_is_float, (*activations(node), *results(node)))):
        return "not float32"
    if not activations(node):
        if any(value is not None and constant(value) is None for value in node.inputs):
            return "what it reads as numbers is constant: it picks from a table"
        return "all of its inputs are constant; fold them first"
    if everywhere and check is _sum:  # it could be integer, but is better float
        return None
    return check(node)


def _anything(_node: ir.Node) -> str | None:
    return None


def _constant_parameters(node: ir.Node) -> str | None:
    """Shapes, axes, indices and bounds must be known."""
    for value in node.inputs[1:]:
        if value is not None and constant(value) is None:
            return f"its input {value.name!r} is not constant"
    return None


def _sum(node: ir.Node) -> str | None:
    """A constant that dwarfs the other operand, such as a mask, would leave it no steps."""
    spans = [_span(value) for value in node.inputs]
    known = [span for span in spans if span is not None]
    constants = [constant(value) is not None for value in node.inputs]
    if any(constants) and len(known) == 2 and known[constants.index(False)] > 0:
        ratio = known[constants.index(True)] / known[constants.index(False)]
        if ratio > _DWARFED:
            return f"its constant spans {ratio:.0f} times the range of what it is added to"
    return None


def _span(value: ir.Value | None) -> float | None:
    """Return how far the values of a constant or a calibrated activation reach, 0 included."""
    array = constant(value)
    if array is not None:
        return float(array.max(initial=0)) - float(array.min(initial=0))
    found = value.meta.get("range") if value is not None else None
    return max(found.high, 0.0) - min(found.low, 0.0) if isinstance(found, Range) else None


def _softmax(node: ir.Node) -> str | None:
    """Integers hold the sum of as many exponentials as a row may have."""
    shape = static_shape(node.inputs[0])
    if not shape:
        return "its shape is not known"
    length = shape[node.attributes.get_int("axis", -1) % len(shape)]
    if length > _LONGEST_SOFTMAX:
        return f"a sum of {length} exponentials may overflow"
    return None


def _conv(node: ir.Node) -> str | None:
    return _constant_parameters(node)


def _gemm(node: ir.Node) -> str | None:
    attributes = node.attributes
    if attributes.get_float("alpha", 1.0) != 1.0 or attributes.get_float("beta", 1.0) != 1.0:
        return "alpha and beta must be 1"
    if attributes.get_int("transA", 0):
        return "transA must be 0"
    if why := _constant_parameters(node):
        return why
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    weight = constant(node.inputs[1])
    assert weight is not None, "_constant_parameters looked"
    width = weight.shape[0 if attributes.get_int("transB", 0) else 1]
    if bias is not None and bias.size not in (1, width):
        return f"its bias of shape {list(bias.shape)} differs per row"
    if bias is not None and bias.size == width and bias.ndim and bias.shape[-1] != width:
        return f"its bias of shape {list(bias.shape)} differs per row"
    return None


def _matmul(node: ir.Node) -> str | None:
    return "its first input is constant" if constant(node.inputs[0]) is not None else None


def _max_pool(node: ir.Node) -> str | None:
    return "its indices are used" if len(results(node)) > 1 else None


def _reduce_mean(node: ir.Node) -> str | None:
    """Only the mean over all spatial axes is a pool."""
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is None or len(shape) < 3:
        return "it has no spatial axes"
    if why := _constant_parameters(node):
        return why
    given = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    axes = node.attributes.get_ints("axes", []) if given is None else given.tolist()
    if sorted(axis % len(shape) for axis in axes) != list(range(2, len(shape))):
        return "it does not reduce exactly the spatial axes"
    return None


def _resize(node: ir.Node) -> str | None:
    mode = node.attributes.get_string("mode", "nearest")
    if mode not in ("nearest", "linear"):
        return f"its mode {mode!r} overshoots its input's range"
    if node.attributes.get_int("antialias", 0):
        return "it is antialiased"
    if node.attributes.get_string("coordinate_transformation_mode", "") == "tf_crop_and_resize":
        return "tf_crop_and_resize extrapolates"
    return _constant_parameters(node)


def _pad(node: ir.Node) -> str | None:
    """Padding must be a value that the input's scale represents exactly."""
    if why := _constant_parameters(node):
        return why
    fill = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    mode = node.attributes.get_string("mode", "constant")
    if mode == "constant" and fill is not None and fill.any():
        return f"it pads with {fill.item()}, which the input's scale may not represent"
    return None


ANCHORS: dict[str, Check] = {"Conv": _conv, "Gemm": _gemm, "MatMul": _matmul}

FOLLOWERS: dict[str, Check] = {
    "Add": _sum,
    "AveragePool": _anything,
    "Clip": _constant_parameters,
    "Concat": _anything,
    "Elu": _anything,
    "GlobalAveragePool": _anything,
    "HardSigmoid": _anything,
    "HardSwish": _anything,
    "LeakyRelu": _anything,
    "Mul": _anything,
    "ReduceMean": _reduce_mean,
    "Relu": _anything,
    "Sigmoid": _anything,
    "Softmax": _softmax,
    "Sub": _sum,
    "Tanh": _anything,
}

CARRIERS: dict[str, Check] = {
    "DepthToSpace": _anything,
    "Expand": _constant_parameters,
    "Flatten": _anything,
    "Gather": _constant_parameters,
    "MaxPool": _max_pool,
    "Pad": _pad,
    "Reshape": _constant_parameters,
    "Resize": _resize,
    "Slice": _constant_parameters,
    "SpaceToDepth": _anything,
    "Split": _constant_parameters,
    "Squeeze": _constant_parameters,
    "Transpose": _anything,
    "Unsqueeze": _constant_parameters,
}
