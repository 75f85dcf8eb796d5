"""The constants that layers multiply with and add: where they are, and how they are laid out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepress.passes._constants import Array, constant, new_initializer

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Read:
    """A constant in its place.

    Attributes:
        layer: the Conv, ConvTranspose, Gemm or MatMul it belongs to.
        node: reads it: the layer, or an Add behind a MatMul.
        index: of the input.
        bias: whether it is added, and not multiplied with.
    """

    layer: ir.Node
    node: ir.Node
    index: int
    bias: bool

    @property
    def value(self) -> ir.Value | None:
        """What is read."""
        return self.node.inputs[self.index]

    @property
    def name(self) -> str:
        """What to call it in reports."""
        return f"{self.layer.name or self.layer.op_type}{' bias' if self.bias else ''}"


@dataclass(frozen=True, eq=False)
class LayerTensor:
    """One constant and all layers that read it; the first of them says how it is laid out."""

    value: ir.Value
    reads: list[Read]

    @property
    def name(self) -> str:
        """What to call it in reports."""
        return self.reads[0].name

    @property
    def readers(self) -> set[tuple[ir.Node, int]]:
        """The nodes that read it, each with the index of the input."""
        return {(read.node, read.index) for read in self.reads}

    @property
    def is_bias(self) -> bool:
        """Whether it is added."""
        return self.reads[0].bias

    @property
    def array(self) -> Array:
        """The constant itself."""
        array = constant(self.value)
        assert array is not None, "layer tensors are constants"
        return array

    def rows(self) -> Array:
        """Return it as `[out, rest]`: all that belongs to one output channel in one row."""
        return self.rows_of(self.array)

    def rows_of(self, array: Array) -> Array:
        """Return another array in the shape of the constant as `rows` does."""
        moved = _outputs_first(self.reads[0], array)
        return moved.reshape(moved.shape[0] * moved.shape[1], -1)

    def from_rows(self, rows: Array) -> Array:
        """Undo `rows`."""
        indices = np.arange(self.array.size).reshape(self.array.shape)
        result = np.empty(self.array.size, rows.dtype)
        result[_outputs_first(self.reads[0], indices).reshape(-1)] = rows.reshape(-1)
        return result.reshape(self.array.shape)


def layer_reads(graph: ir.Graph, *, biases: bool) -> Iterator[Read]:
    """Yield the weights of all layers in order of execution, each followed by its bias.

    A bias is a constant; that of a MatMul is a vector that an Add puts on its output.
    """
    for node in graph:
        if node.domain or node.op_type not in LAYERS:
            continue
        yield Read(node, node, 1, bias=False)
        if not biases:
            continue
        if node.op_type != "MatMul":
            if len(node.inputs) > 2 and constant(node.inputs[2]) is not None:
                yield Read(node, node, 2, bias=True)
            continue
        weight = constant(node.inputs[1])
        for use in node.outputs[0].uses():
            other = use.node.inputs[1 - use.idx] if use.node.op_type == "Add" else None
            array = constant(other)
            if array is not None and weight is not None and array.shape == weight.shape[-1:]:
                yield Read(node, use.node, 1 - use.idx, bias=True)


def why_not(value: ir.Value | None, verb: str) -> str:
    """Say why a constant cannot be changed, or nothing; the verb is what cannot be done to it."""
    if value is None:
        return "it has no weights"
    maker = value.producer()
    if maker is not None and maker.op_type == "DequantizeLinear":
        return f"quantized already; {verb} before quantize-int8"
    if value.is_graph_input():
        return "its weights are an input of the model"
    array = constant(value)
    if array is None:
        return "its second input is not constant"
    if value.is_graph_output():
        return "its weights are an output of the model"
    if value.dtype not in _FLOATS:
        return f"its weights are {value.dtype}"
    if not array.size:
        return "it has no weights"
    return ""


def replace(
    graph: ir.Graph, value: ir.Value, readers: set[tuple[ir.Node, int]], array: Array, suffix: str
) -> None:
    """Give readers of a constant another array; whoever else reads it reads what it was.

    Args:
        graph: holds the constant.
        value: an initializer.
        readers: nodes that read it, each with the index of the input.
        array: in the shape of the constant.
        suffix: for the name of a new initializer, where there are other readers.
    """
    if {(use.node, use.idx) for use in value.uses()} == readers:
        value.const_value = ir.tensor(array, name=value.name)
        return
    new = new_initializer(graph, f"{value.name}_{suffix}", array)
    for use in list(value.uses()):
        if (use.node, use.idx) in readers:
            use.node.replace_input_with(use.idx, new)


def _outputs_first(read: Read, array: Array) -> Array:
    """Return a view `[groups, out/groups, …]` of a constant, in order of output channels.

    Groups other than 1 are those of a ConvTranspose, whose weight is `[in, out/groups, …]`.
    """
    node = read.layer
    if read.bias:
        return array.reshape(1, -1, 1)
    if node.op_type == "Conv":
        return array[None]
    if node.op_type == "ConvTranspose":
        groups = node.attributes.get_int("group", 1)
        grouped = array.reshape(groups, array.shape[0] // groups, *array.shape[1:])
        return np.moveaxis(grouped, 2, 1)
    if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) != 0:
        return array[None]
    return np.moveaxis(array, -1, 0)[None] if array.ndim > 1 else array.reshape(1, 1, -1)
