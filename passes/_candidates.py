"""Layers of low rank that can take a layer's place in a graph."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array
from edgepress.passes import _factors
from edgepress.passes._constants import constant, free_name, new_initializer, set_input
from edgepress.passes._factors import Ranks
from edgepress.passes._layer_models import Attributes, Layer, layer_of, macs
from edgepress.passes._moments import Moments
from edgepress.passes._shapes import shape_of, static_shape

# The spatial axes along which each factor of a convolution has its stride, pads and dilation.
_AXES: dict[str, tuple[tuple[int, ...], ...]] = {
    "channel": ((0, 1), ()),
    "spatial": ((0,), (1,)),
    "tucker": ((), (0, 1), ()),
}
_MARK = "edgepress.low_rank"  # on nodes that are factors
_ROUNDING = 1e-12  # of what a layer computes, squared: this much is nothing


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """Layers that compute nearly what a layer does, or the layer itself.

    Attributes:
        label: such as "spatial rank 16".
        layers: in order of execution.
        lost: the share that they lose of the layer's squared output, of its variance where a bias
            takes up the mean; without samples, of its squared weight.
        macs: multiply-accumulates of one inference.
    """

    label: str
    layers: Sequence[Layer]
    lost: float
    macs: int

    @property
    def parameters(self) -> int:
        """Elements of all weights and biases."""
        return sum(layer.parameters for layer in self.layers)


def is_factor(node: ir.Node) -> bool:
    """Tell whether a node is part of a layer that was decomposed before."""
    return _MARK in node.metadata_props


def why_not(node: ir.Node) -> str:
    """Say why a Conv, Gemm or MatMul cannot be decomposed, or nothing."""
    if is_factor(node):
        return "it is a factor of a layer that was decomposed already"
    x, value = node.inputs[:2]
    weight = constant(value)
    if value is None or weight is None:
        return "its weight is not constant"
    if constant(x) is not None:
        return "its input is constant"
    if value.dtype != ir.DataType.FLOAT:
        return f"its weight is {value.dtype}, not float32"
    axes = weight.ndim - (2 if node.op_type == "Conv" else 0)
    if axes != 2:
        return f"its {'kernel' if node.op_type == 'Conv' else 'weight'} has {axes} axes, not 2"
    if not all(math.prod(static_shape(v) or (0,)) for v in (x, value, node.outputs[0])):
        return "a shape is empty or not fixed"
    if len(value.uses()) > 1 or value.is_graph_output():
        return f"its weight {value.name!r} is read by others too"
    if not np.isfinite(weight).all():
        return "its weight is not finite"
    if (groups := node.attributes.get_int("group", 1)) != 1:
        return f"it has {groups} groups; only convolutions of one group are decomposed"
    if node.attributes.get_int("transA", 0):
        return "it transposes its input"
    given = node.inputs[2] if len(node.inputs) > 2 else None
    bias = constant(given)
    if given is not None and bias is None:
        return "its bias is not constant"
    if bias is not None and bias.size != math.prod(bias.shape[-1:]):
        return "its bias differs per row"
    return ""


def methods_for(node: ir.Node, method: str) -> list[str]:
    """Return which decompositions a layer has, out of one of them or of all for "best"."""
    if node.op_type != "Conv":
        return ["channel"]
    height, width = shape_of(node.inputs[1])[2:]
    fits = {"channel": True, "spatial": width > 1, "tucker": height * width > 1}
    return [name for name in _AXES if fits[name] and method in (name, "best")]


def largest_rank(node: ir.Node, method: str) -> int:
    """Return the largest rank that may be asked of a layer."""
    return min(_factors.largest_ranks(method, _shape(layer_of(node))))


def itself(node: ir.Node) -> Candidate:
    """Return a layer as a candidate for its own place."""
    layer = layer_of(node)
    cost = macs(shape_of(node.inputs[0]), [layer])
    return Candidate(label="the layer itself", layers=(layer,), lost=0.0, macs=cost)


def candidates(
    node: ir.Node,
    methods: Sequence[str],
    moments: Moments | None,
    *,
    align: int,
    rank: int | None,
    lost: float,
) -> Iterator[Candidate]:
    """Decompose a layer by several methods, for a rank or for what it may lose.

    Args:
        node: a layer for which `why_not` says nothing.
        methods: of those that `methods_for` names.
        moments: of the layer's input, or None where the weights alone decide.
        align: ranks are rounded up to a multiple of it.
        rank: at most `largest_rank`, or None.
        lost: where rank is None, the share that may be lost; see `Candidate`.
    """
    layer = layer_of(node)
    weight, bias = _weight(layer), _bias(layer)
    # a MatMul has no bias that could take up a mean
    centred = layer.op_type != "MatMul"
    metric = None
    if moments is not None:
        metric = _factors.metric_of(moments.second[0], moments.count, centred=centred)
    for method in methods:
        found = _factors.decomposition(method, weight, metric)
        if rank is None:
            rungs = _factors.ladder(method, weight.shape, align, _input_share(node))
            ranks = _factors.cheapest(found, rungs, max(lost, _ROUNDING))
        else:
            largest = _factors.largest_ranks(method, weight.shape)
            ranks = tuple(_factors.aligned(rank, align, most) for most in largest)
        factors = found.factors(ranks)
        shifted = bias
        if moments is not None and centred:
            error = (weight - _factors.multiplied(factors)).reshape(len(weight), -1)
            shifted = (0.0 if bias is None else bias) + error @ moments.second[0, :-1, -1]
        layers = _layers(layer, method, factors, shifted)
        yield Candidate(
            label=_label(layer, method, ranks),
            layers=layers,
            lost=found.lost(ranks),
            macs=macs(shape_of(node.inputs[0]), layers),
        )


def put(node: ir.Node, chosen: Candidate) -> None:
    """Replace a layer: nodes are put before it, and it becomes the last factor.

    So the value that it writes stays the same. Shapes are stale afterwards.
    """
    graph, value = node.graph, node.inputs[0]
    assert graph is not None
    stem = node.outputs[0].name
    *before, last = chosen.layers
    for number, layer in enumerate(before, 1):
        written = ir.Value(name=free_name(graph, f"{stem}_factor_{number}"))
        weight = new_initializer(graph, f"{written.name}_weight", layer.weight)
        name = _free_node_name(graph, f"{node.name}_factor_{number}")
        factor = ir.node(
            layer.op_type, [value, weight], layer.attributes, outputs=[written], name=name
        )
        factor.metadata_props[_MARK] = chosen.label
        graph.insert_before(node, factor)
        value = written
    node.replace_input_with(0, value)
    set_input(node, 1, last.weight, f"{stem}_weight")
    if last.bias is not None:
        set_input(node, 2, last.bias, f"{stem}_bias")
    node.attributes.clear()
    for attribute in ir.convenience.convert_attributes(last.attributes):
        node.attributes.add(attribute)
    node.metadata_props[_MARK] = chosen.label


def _free_node_name(graph: ir.Graph, stem: str) -> str:
    """Return `stem`, or `stem_1`, `stem_2`, … where a node has that name already."""
    taken = {node.name for node in graph}
    name, count = stem, 0
    while name in taken:
        count += 1
        name = f"{stem}_{count}"
    return name


def _input_share(node: ir.Node) -> float:
    """Return the positions of a layer's input over those of its output."""
    if node.op_type != "Conv":
        return 1.0
    before, after = (math.prod(shape_of(v)[2:]) for v in (node.inputs[0], node.outputs[0]))
    return before / after


def _shape(layer: Layer) -> tuple[int, ...]:
    """Return [out, in, kh, kw]; a dense layer is a 1×1 convolution."""
    return tuple(layer.weight.shape) if layer.op_type == "Conv" else (*layer.channels[::-1], 1, 1)


def _weight(layer: Layer) -> Array:
    """Return the weight as float64 [out, in, kh, kw], times the alpha of a Gemm."""
    weight = layer.weight.astype(np.float64)
    if layer.op_type != "Conv":
        weight = weight if layer.attributes.get("transB") else weight.T
    return weight.reshape(_shape(layer)) * _attribute(layer, "alpha")


def _bias(layer: Layer) -> Array | None:
    """Return the bias as float64 [out], times the beta of a Gemm."""
    if layer.bias is None:
        return None
    bias = layer.bias.astype(np.float64).reshape(-1) * _attribute(layer, "beta")
    return np.broadcast_to(bias, layer.channels[1:])


def _attribute(layer: Layer, name: str) -> float:
    """Return alpha or beta, 1 where the operator has none."""
    value = layer.attributes.get(name, 1.0)
    assert isinstance(value, float)
    return value


def _layers(
    layer: Layer, method: str, factors: list[Array], bias: Array | None
) -> tuple[Layer, ...]:
    """Give factors the operator and the attributes that make them the layer."""
    weights = [factor.astype(np.float32) for factor in factors]
    biases = [None] * (len(weights) - 1) + [None if bias is None else bias.astype(np.float32)]
    attributes: list[Attributes] = [{} for _ in weights]
    if layer.op_type == "Conv":
        attributes = [
            _conv_attributes(layer, w.shape[2:], axes)
            for w, axes in zip(weights, _AXES[method], strict=True)
        ]
    else:
        weights = [w[..., 0, 0] for w in weights]
        if layer.attributes.get("transB"):
            attributes = [{"transB": 1} for _ in weights]
        else:
            weights = [w.T for w in weights]
    return tuple(
        Layer(op_type=layer.op_type, attributes=a, weight=np.ascontiguousarray(w), bias=b)
        for a, w, b in zip(attributes, weights, biases, strict=True)
    )


def _conv_attributes(layer: Layer, kernel: tuple[int, ...], axes: tuple[int, ...]) -> Attributes:
    """Return the attributes of a factor that takes over the convolution along some axes."""

    def taken(name: str, idle: int) -> tuple[int, ...]:
        given = layer.attributes[name]
        assert isinstance(given, Sequence)
        return tuple(x if i % 2 in axes else idle for i, x in enumerate(given))

    return {
        "dilations": taken("dilations", 1),
        "group": 1,
        "kernel_shape": kernel,
        "pads": taken("pads", 0),
        "strides": taken("strides", 1),
    }


def _label(layer: Layer, method: str, ranks: Ranks) -> str:
    """Name a candidate by its method, where there is a choice, and its ranks."""
    if method == "tucker":
        r_out, r_in = ranks
        return f"tucker ranks {r_in} and {r_out}"
    return f"{method + ' ' if layer.op_type == 'Conv' else ''}rank {ranks[0]}"
