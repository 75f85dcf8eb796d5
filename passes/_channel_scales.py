"""Which channels of a graph may be scaled, and which of them must be scaled alike.

What a layer writes may be multiplied by a positive factor per channel, if whatever reads it is
divided by it. Functions f with f(s·x) = s·f(x) for s > 0, such as rectifiers and pools, hand the
factor on, and an addition demands the same factor of both of its operands. A channel that anything
else touches keeps its scale. Nagel et al., "Data-Free Quantization Through Weight Equalization and
Bias Correction", 2019, section 4.1, scale pairs of layers; here a factor reaches all layers behind
branches, additions and concatenations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array
from edgepress.passes._constants import constant
from edgepress.passes._reads import reads
from edgepress.passes._shapes import static_shape

#: f(s·x) = s·f(x) for s > 0, per channel.
HOMOGENEOUS = (
    "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity", "LeakyRelu", "MaxPool",
    "Relu",
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A Conv or Gemm that can take factors into its weights.

    Attributes:
        node: the layer.
        read: `[input channels]` numbers of the channels that it reads.
        written: `[output channels]` numbers of those it writes.
    """

    node: ir.Node
    read: Array
    written: Array


@dataclass
class ChannelScales:
    """The channels of a graph.

    Attributes:
        channels: per value, numbers of the channels on its axis 1. Equal numbers, after `find`,
            must be scaled alike.
        layers: those that can take factors, in graph order.
        unfit: `(name, why)` of a Conv or Gemm that cannot.
    """

    channels: dict[ir.Value, Array] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    unfit: list[tuple[str, str]] = field(default_factory=list)
    _parents: list[int] = field(default_factory=list)
    _why: dict[int, str] = field(default_factory=dict)

    def find(self, numbers: Array) -> Array:
        """Return the representatives of channels."""
        return np.array([self._root(int(number)) for number in numbers.ravel()], np.int64)

    def why(self, number: int) -> str | None:
        """Say why a representative must keep its scale, or None."""
        return self._why.get(number)

    def freeze(self, numbers: Iterable[int], why: str) -> None:
        """Let channels keep their scale."""
        for number in numbers:
            self._why.setdefault(self._root(int(number)), why)

    def fresh(self, count: int) -> Array:
        """Return the numbers of new channels."""
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return np.arange(first, first + count)

    def tie(self, left: Array, right: Array) -> None:
        """Demand the same factors of two lists of channels."""
        for one, other in zip(left, right, strict=True):
            a, b = self._root(int(one)), self._root(int(other))
            if a != b:
                why = self._why.get(a) or self._why.get(b)
                self._parents[b] = a
                if why:
                    self._why[a] = why

    def _root(self, number: int) -> int:
        while self._parents[number] != number:
            self._parents[number] = self._parents[self._parents[number]]
            number = self._parents[number]
        return number


def analyse(model: ir.Model) -> ChannelScales:
    """Find the channels of a model with fixed shapes and which of them may be scaled."""
    found = ChannelScales()
    for value in model.graph.inputs:
        _new(found, value, f"{value.name} is an input of the model")
    for node in model.graph:
        _visit(found, node)
    for value in model.graph.outputs:
        found.freeze(found.channels.get(value, ()), f"{value.name} is an output of the model")
    return found


def _new(found: ChannelScales, value: ir.Value, why: str | None = None) -> Array | None:
    """Number the channels of a value that has an axis of them."""
    shape = static_shape(value)
    if shape is None or len(shape) < 2:
        return None
    numbers = found.fresh(shape[1])
    found.channels[value] = numbers
    if why:
        found.freeze(numbers, why)
    return numbers


def _visit(found: ChannelScales, node: ir.Node) -> None:
    """Hand channels on through one node, or freeze what it touches."""
    read = found.channels.get(node.inputs[0]) if node.inputs and node.inputs[0] else None
    written: Array | None = None
    if not node.domain and read is not None:
        if node.op_type in ("Conv", "Gemm"):
            if (why := _unfit(node)) is None:
                numbers = _new(found, node.outputs[0])
                assert numbers is not None, "a layer writes channels"
                found.layers.append(Layer(node, read, numbers))
                return
            found.unfit.append((node.name or "", why))
            _freeze(found, node, why)
            return
        written = _handed_on(found, node, read)
    if written is None:
        _freeze(found, node, f"{node.name} is no function that hands a factor on")
        return
    found.channels[node.outputs[0]] = written


def _handed_on(found: ChannelScales, node: ir.Node, read: Array) -> Array | None:
    """Return the channels of the output of a node that is no layer; None where it has none."""
    before, after = static_shape(node.inputs[0]), static_shape(node.outputs[0])
    if before is None or after is None or len(after) < 2:
        return None
    kind = node.op_type
    if kind in HOMOGENEOUS and len([v for v in node.outputs if v.uses()]) <= 1:
        return read
    if kind == "PRelu":
        return read if constant(node.inputs[1]) is not None else None
    if kind == "Clip":
        return read if _rectifies(node) else None
    if kind in ("Add", "Sub"):
        other = found.channels.get(node.inputs[1]) if node.inputs[1] else None
        if other is None or static_shape(node.inputs[1]) != before:
            return None
        found.tie(read, other)
        return read
    if kind == "Concat":
        return _concat(found, node)
    if kind == "Pad":
        return read if _pads_space_with_zeros(node) else None
    if kind in ("Flatten", "Reshape", "Squeeze", "ReduceMean"):
        return _flat(node, read, before, after)
    return None


def _rectifies(node: ir.Node) -> bool:
    """Whether a Clip is a rectifier: bounded by 0 below and by nothing above."""
    bounds = []
    for index, default in ((1, -math.inf), (2, math.inf)):
        value = node.inputs[index] if len(node.inputs) > index else None
        array = constant(value)
        if value is not None and (array is None or array.size != 1):
            return False
        bounds.append(default if array is None else float(array.reshape(())))
    low, high = bounds
    return low in (0.0, -math.inf) and high >= float(np.finfo(np.float32).max)


def _concat(found: ChannelScales, node: ir.Node) -> Array | None:
    parts = [found.channels.get(value) for value in node.inputs if value is not None]
    shape = static_shape(node.outputs[0])
    if shape is None or node.attributes.get_int("axis", 0) % len(shape) != 1:
        return None
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if len(known) == len(parts) else None


def _pads_space_with_zeros(node: ir.Node) -> bool:
    pads = constant(node.inputs[1])
    fill = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else np.zeros(1)
    if pads is None or fill is None or fill.any() or len(node.inputs) > 3:
        return False
    rank = len(pads) // 2
    return not pads[[0, 1, rank, rank + 1]].any()


def _flat(
    node: ir.Node, read: Array, before: tuple[int, ...], after: tuple[int, ...]
) -> Array | None:
    """Axes behind the channels go away, or become part of the channels."""
    if node.op_type == "ReduceMean":
        given = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        axes = node.attributes.get_ints("axes", []) if given is None else given.tolist()
        space = list(range(2, len(before)))
        return read if sorted(axis % len(before) for axis in axes) == space else None
    if after[0] != before[0] or math.prod(after) != math.prod(before):
        return None
    if after[:2] == before[:2]:
        return read
    if len(after) == 2:
        return np.repeat(read, math.prod(before[2:]))
    return None


def _freeze(found: ChannelScales, node: ir.Node, why: str) -> None:
    """Freeze whatever a node reads, in subgraphs too, and what it writes."""
    for value in reads(node):
        found.freeze(found.channels.get(value, ()), why)
    for value in node.outputs:
        _new(found, value, why)


def _unfit(node: ir.Node) -> str | None:
    """Say why a Conv or Gemm cannot take factors into its weights, or None."""
    for value in node.inputs[1:]:
        if value is None:
            continue
        if constant(value) is None:
            return f"{node.name} has weights that are computed"
        if len(value.uses()) > 1 or value.is_graph_output():
            return f"{node.name} shares {value.name} with another node"
        if value.dtype != ir.DataType.FLOAT:
            return f"{node.name} is not float32"
    if node.op_type == "Conv":
        return None
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    shape = static_shape(node.outputs[0])
    if node.attributes.get_int("transA", 0) or shape is None:
        return f"{node.name} transposes what it reads"
    if bias is not None and bias.size != shape[1]:
        return f"{node.name} has a bias that is not one per channel"
    return None
