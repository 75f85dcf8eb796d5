"""Cuts single layers out of a graph, as models of their own, to be measured on a device.

A layer is a Conv, Gemm or MatMul with a constant weight, together with what a compiler fuses into
it: the constant bias that an Add brings after a MatMul, and a Relu or Clip that nothing else
precedes. The models hold random weights that depend on their shapes alone, so equal layers give
equal models, whatever they have learned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array
from edgepress.passes._constants import constant, new_initializer
from edgepress.passes._shapes import refresh_shapes, shape_of

LAYERS = ("Conv", "Gemm", "MatMul")
_IR_VERSION = 8  # the oldest that every opset from 13 on runs with in onnxruntime
Attributes = Mapping[str, int | float | Sequence[int]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """A weighted layer that need not be in a graph.

    Attributes:
        op_type: "Conv", "Gemm" or "MatMul".
        attributes: as ONNX names them. A Conv has all of them but auto_pad.
        weight: in the layout of the operator: [out, in/group, kh, kw], [in, out], or [out, in] for
            a Gemm with transB.
        bias: whatever the operator takes, or None.
    """

    op_type: str
    attributes: Attributes
    weight: Array
    bias: Array | None = None

    @property
    def channels(self) -> tuple[int, int]:
        """Channels that the layer reads and writes."""
        if self.op_type == "Conv":
            group = self.attributes["group"]
            assert isinstance(group, int)
            return self.weight.shape[1] * group, self.weight.shape[0]
        rows, columns = self.weight.shape
        return (columns, rows) if self.attributes.get("transB") else (rows, columns)

    @property
    def parameters(self) -> int:
        """Elements of weight and bias."""
        return self.weight.size + (0 if self.bias is None else self.bias.size)


def layer_of(node: ir.Node) -> Layer:
    """Read a layer from a graph with static shapes; auto_pad becomes explicit pads.

    Raises ValueError where it is no Conv, Gemm or MatMul with a constant weight as second input,
    or its bias is computed.
    """
    weight = constant(node.inputs[1]) if node.op_type in LAYERS else None
    if weight is None or (weight.ndim != 2 and node.op_type != "Conv"):
        raise ValueError(f"{node.name} is no Conv, Gemm or MatMul with a constant weight")
    given_bias = node.inputs[2] if len(node.inputs) > 2 else None
    bias = constant(given_bias)
    if given_bias is not None and bias is None:
        raise ValueError(f"{node.name} has a bias that is computed")
    if node.op_type == "Conv":
        attributes: Attributes = _conv_attributes(node, weight.shape[2:])
    elif node.op_type == "Gemm":
        given = node.attributes
        attributes = {
            "alpha": given.get_float("alpha", 1.0),
            "beta": given.get_float("beta", 1.0),
            "transA": given.get_int("transA", 0),
            "transB": given.get_int("transB", 0),
        }
    else:
        attributes = {}
    return Layer(op_type=node.op_type, attributes=attributes, weight=weight, bias=bias)


def followers(node: ir.Node) -> list[ir.Node]:
    """Return what is fused into a layer, in order: the Add of a bias, then a Relu or Clip."""
    found: list[ir.Node] = []
    reader = _only_reader(node)
    if reader is not None and node.op_type == "MatMul" and reader.op_type == "Add":
        shape = shape_of(node.outputs[0])
        arrays = [array for value in reader.inputs if (array := constant(value)) is not None]
        if any(a.shape[-1:] == shape[-1:] == (a.size,) and a.ndim <= len(shape) for a in arrays):
            found.append(reader)
            reader = _only_reader(reader)
    if reader is not None and reader.op_type in ("Relu", "Clip"):
        bounds = [value for value in reader.inputs[1:] if value is not None]
        if all(constant(value) is not None for value in bounds):
            found.append(reader)
    return found


def layer_model(node: ir.Node, layers: Sequence[Layer] = ()) -> ir.Model:
    """Return a model of one layer and what is fused into it, with random weights and biases.

    Args:
        node: a layer in a graph with static shapes.
        layers: what takes the node's place, in order of execution; nothing takes the node itself.

    Returns:
        A canonical model of the graph's opset, input `x` and output `y`.

    Raises:
        ValueError: as `layer_of`.
    """
    source = node.inputs[0]
    assert source is not None
    assert node.graph is not None
    x = ir.Value(name="x", shape=ir.Shape(shape_of(source)), type=source.type)
    opsets = {"": node.graph.opset_imports[""]}
    graph = ir.Graph([x], [], nodes=[], opset_imports=opsets, name="layer")
    chain = layers or [layer_of(node)]
    value = x
    for index, layer in enumerate(chain, 1):
        arrays = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
        weights = [new_initializer(graph, f"w{index}", _random(array)) for array in arrays]
        value = _append(graph, layer.op_type, [value, *weights], layer.attributes, f"layer_{index}")
    for index, follower in enumerate(followers(node), 1):
        inputs: list[ir.Value | None] = []
        for given in follower.inputs:
            array = constant(given)
            if given is None:
                inputs.append(None)
            elif array is None:
                inputs.append(value)
            else:
                array = _random(array) if follower.op_type == "Add" else array
                inputs.append(new_initializer(graph, f"c{index}", array))
        value = _append(graph, follower.op_type, inputs, {}, f"fused_{index}")
    value.name = "y"
    graph.outputs.append(value)
    model = ir.Model(graph, ir_version=_IR_VERSION)
    refresh_shapes(model, "layer", static=True)
    return model


def signature(model: ir.Model) -> str:
    """Describe all that the speed of a layer's model depends on, one line a node.

    >>> x = ir.val("x", ir.DataType.FLOAT, [1, 4])
    >>> y = ir.node("Relu", [x])
    >>> print(signature(ir.Model(ir.Graph([x], y.outputs, nodes=[y]), ir_version=8)))
    Relu(FLOAT[1,4])
    """
    return "\n".join(_line(node) for node in model.graph)


def macs(shape: tuple[int, ...], layers: Sequence[Layer]) -> int:
    """Count multiply-accumulates of layers in a row on an input of this shape."""
    total = 0
    for layer in layers:
        shape = _output_shape(shape, layer)
        total += math.prod(shape) * (layer.weight.size // layer.channels[1])
    return total


def _append(
    graph: ir.Graph,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Attributes,
    name: str,
) -> ir.Value:
    """Append a node to a graph; return the value that it writes."""
    value = ir.Value(name=f"{name}_output")
    graph.append(ir.node(op_type, inputs, attributes, outputs=[value], name=name))
    return value


def _line(node: ir.Node) -> str:
    """Describe one node of a layer's model."""
    attributes = (f"{key}={value.value}" for key, value in sorted(node.attributes.items()))
    inputs = (f"{v.dtype}{list(shape_of(v))}" if v is not None else "_" for v in node.inputs)
    text = f"{node.op_type}({', '.join(inputs)})".replace(" ", "")
    return " ".join([text, *attributes])


def _only_reader(node: ir.Node) -> ir.Node | None:
    """Return the one node that reads a node's output, where nothing else does."""
    value = node.outputs[0]
    readers = [use.node for use in value.uses()]
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def _conv_attributes(node: ir.Node, kernel: tuple[int, ...]) -> Attributes:
    """Return all attributes of a Conv, with auto_pad resolved."""
    given, axes = node.attributes, len(kernel)
    strides = tuple(given.get_ints("strides", [1] * axes))
    dilations = tuple(given.get_ints("dilations", [1] * axes))
    pads = tuple(given.get_ints("pads", [0] * 2 * axes))
    automatic = given.get_string("auto_pad", "NOTSET")
    if automatic != "NOTSET":
        extents = zip(shape_of(node.inputs[0])[2:], shape_of(node.outputs[0])[2:], strict=True)
        totals = [
            0 if automatic == "VALID" else max((out - 1) * s + (k - 1) * d + 1 - size, 0)
            for (size, out), s, k, d in zip(extents, strides, kernel, dilations, strict=True)
        ]
        small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
        pads = (*large, *small) if automatic == "SAME_LOWER" else (*small, *large)
    return {
        "dilations": dilations,
        "group": given.get_int("group", 1),
        "kernel_shape": kernel,
        "pads": pads,
        "strides": strides,
    }


def _output_shape(shape: tuple[int, ...], layer: Layer) -> tuple[int, ...]:
    """Return the shape that a layer makes of its input's."""
    outputs = layer.channels[1]
    if layer.op_type != "Conv":
        rows = shape[::-1] if layer.attributes.get("transA") else shape
        return (*rows[:-1], outputs)
    strides, dilations, pads = (_ints(layer, key) for key in ("strides", "dilations", "pads"))
    kernel = layer.weight.shape[2:]
    axes = len(kernel)
    extents = (
        (size + pads[i] + pads[axes + i] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1
        for i, size in enumerate(shape[2:])
    )
    return (shape[0], outputs, *extents)


def _ints(layer: Layer, name: str) -> Sequence[int]:
    """Return an attribute that is a list."""
    value = layer.attributes[name]
    assert isinstance(value, Sequence)
    return value


def _random(like: Array) -> Array:
    """Return numbers of the shape and dtype, the same every time, that keep outputs moderate."""
    size = like.size // max(like.shape[0], 1) if like.ndim > 1 else 1
    numbers = np.random.default_rng(like.shape).standard_normal(like.shape)
    return np.asarray(numbers / math.sqrt(max(size, 1)), like.dtype)
