"""Writes QuantizeLinear and DequantizeLinear into a graph, named as onnxruntime names them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array

#: A scale and a zero point: the initializers that hold them.
Parameters = tuple[ir.Value, ir.Value]


class QdqWriter:
    """Adds pairs of QuantizeLinear and DequantizeLinear, and quantized initializers, to a graph.

    Initializers of equal content under the same name are written once.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        values = [*graph.inputs, *graph.initializers.values()]
        values += [value for node in graph for value in node.outputs]
        self._taken = {value.name for value in values} | {node.name for node in graph}
        self._written: dict[tuple[str, bytes], ir.Value] = {}

    def parameters(self, name: str, scale: Array, zero_point: Array) -> Parameters:
        """Write `NAME_scale` (float32) and `NAME_zero_point`, of equal shape."""
        return (
            self.initializer(f"{name}_scale", scale),
            self.initializer(f"{name}_zero_point", zero_point),
        )

    def initializer(self, name: str, array: Array) -> ir.Value:
        """Write an initializer, or return the one of this name and content."""
        key = (name, f"{array.dtype}{array.shape}".encode() + array.tobytes())
        if key not in self._written:
            tensor = ir.tensor(array, name=self._free(name))
            value = ir.Value(
                name=tensor.name, const_value=tensor, shape=ir.Shape(array.shape),
                type=ir.TensorType(tensor.dtype),
            )  # fmt: skip
            self.graph.register_initializer(value)
            self._written[key] = value
        return self._written[key]

    def activation(
        self, value: ir.Value, parameters: Parameters, *, output: bool, limit: float | None = None
    ) -> None:
        """Put a pair behind this value; all of its consumers read the dequantized value.

        Args:
            value: a graph input or the output of a node.
            parameters: its scale and zero point.
            output: where the value is a graph output, give its name and its place to the
                dequantized value.
            limit: clamp the value to this magnitude first.
        """
        graph, name = self.graph, value.name or ""
        uses = tuple(value.uses())
        is_output = output and value.is_graph_output()
        if is_output:
            value.name = self._free(f"{name}_QuantizeLinear_Input")
        zero_point = parameters[1].dtype or ir.DataType.UINT8
        made: list[ir.Node] = []
        source = value
        if limit is not None:
            bounds = [
                self.initializer(f"{name}_{what}", scalar(np.float32(bound), "float32"))
                for what, bound in (("low", -limit), ("high", limit))
            ]
            made.append(self._node("Clip", [value, *bounds], name))
            source = made[0].outputs[0]
        quantize = self._node("QuantizeLinear", [source, *parameters], name, zero_point)
        integers = quantize.outputs[0]
        dequantize = self._node("DequantizeLinear", [integers, *parameters], name)
        result = dequantize.outputs[0]
        made += [quantize, dequantize]
        for node in made:
            node.outputs[0].shape = value.shape
        if (producer := value.producer()) is None:
            graph.insert_before(graph[0], made)
        else:
            graph.insert_after(producer, made)
        for user, index in uses:
            user.replace_input_with(index, result)
        if is_output:
            result.name = name
            for index, old in enumerate(graph.outputs):
                if old is value:
                    graph.outputs[index] = result

    def constant(
        self,
        user: ir.Node,
        index: int,
        name: str,
        integers: Array,
        parameters: Parameters,
        axis: int | None,
    ) -> None:
        """Give a node a quantized constant through a DequantizeLinear.

        Args:
            user: the node.
            index: of the input; one that the node does not have yet is added.
            name: of the constant before it was quantized.
            integers: the quantized constant.
            parameters: its scale and zero point.
            axis: of several scales, or None for a single one.
        """
        if index >= len(user.inputs):
            user.resize_inputs(index + 1)
        stored = self.initializer(f"{name}_quantized", integers)
        inputs = [stored, *parameters]
        for known in stored.consumers():
            if known.op_type == "DequantizeLinear" and list(known.inputs) == inputs:
                user.replace_input_with(index, known.outputs[0])
                return
        node = self._node("DequantizeLinear", inputs, name, axis=axis)
        node.outputs[0].shape = stored.shape
        self.graph.insert_before(user, node)
        user.replace_input_with(index, node.outputs[0])

    def drop_unused(self, names: Sequence[str]) -> None:
        """Remove the initializers of these names that nothing reads any more."""
        for name in names:
            value = self.graph.initializers[name]
            if not value.uses() and not value.is_graph_output():
                self.graph.initializers.pop(name)

    def _node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        name: str,
        dtype: ir.DataType = ir.DataType.FLOAT,
        axis: int | None = None,
    ) -> ir.Node:
        """Make a node of one output."""
        node = ir.node(
            op_type,
            inputs,
            attributes={} if axis is None else {"axis": axis},
            name=self._free(f"{name}_{op_type}"),
        )
        node.outputs[0].name = self._free(f"{name}_{op_type}_Output")
        node.outputs[0].type = ir.TensorType(dtype)
        return node

    def _free(self, name: str) -> str:
        """Return the name, with a number behind it where it is taken."""
        candidate, number = name, 1
        while candidate in self._taken:
            candidate, number = f"{name}_{number}", number + 1
        self._taken.add(candidate)
        return candidate


def scalar(value: np.float32 | int, dtype: str) -> Array:
    """Return an array of rank 0, as a single scale or zero point is written."""
    return np.array(value, dtype)
