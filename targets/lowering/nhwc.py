"""Windows run over channels-last tensors: NCHW becomes NHWC where kernels want it.

Convolutions and pools of the `edgepress` domain read and write NHWC. Element-wise operators and
Concat between them follow, so that a whole network pays two transposes, at its ends. Values keep
their names; the NHWC form of a value is called `NAME_nhwc`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgepress.targets.lowering.dialect import DOMAIN, Builder, array_of, dtype_of, shape_of

_WINDOWS = {"Conv", "QConv", "MaxPool", "AveragePool", "QAveragePool", "Resize"}
_FOLLOWING = {
    "Activation", "Dequantize", "Interlace", "QAdd", "QMul", "QSoftmax",
    "Quantize", "Rescale", "Table",
}  # fmt: skip
_WITH_TABLE = ("QSoftmax", "Table")
_ALONG_AN_AXIS = ("Concat", "QSoftmax")
_ELEMENTWISE = {
    "Abs", "Add", "Cast", "Ceil", "Clip", "Div", "Elu", "Erf", "Exp", "Floor", "Gelu",
    "HardSigmoid", "HardSwish", "LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg", "Pow",
    "PRelu", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Softplus", "Softsign",
    "Sqrt", "Sub", "Sum", "Tanh", "ThresholdedRelu", "Where",
}  # fmt: skip
_TO_NHWC = (0, 2, 3, 1)


def to_nhwc(model: ir.Model) -> ir.Model:
    """Give every window NHWC operands. The model is not changed."""
    return _Layout(model).run()


class _Layout:
    def __init__(self, model: ir.Model) -> None:
        self.source = model
        self.builder = Builder()
        self.nchw: dict[ir.Value, ir.Value] = {}
        self.nhwc: dict[ir.Value, ir.Value] = {}

    def run(self) -> ir.Model:
        graph = self.source.graph
        inputs = []
        for value in graph.inputs:
            copy = ir.Value(name=value.name, shape=value.shape, type=value.type)
            self.builder.unique(value.name or "input")
            inputs.append(copy)
            self.nchw[value] = copy
        for value in graph.outputs:
            self.builder.unique(value.name or "output")
        for node in graph:
            if node.domain == DOMAIN and node.op_type in _WINDOWS:
                self.window(node)
            elif not self.follow(node):
                self.keep(node)
        outputs = []
        for value in graph.outputs:
            result = self.plain(value)
            if result.name != value.name:
                self.builder.release(value.name or "")
                result = self.builder.node(
                    "Identity",
                    [result],
                    {},
                    value.name or "out",
                    dtype_of(value),
                    shape_of(value),
                    "",
                )
            outputs.append(result)
        return self.builder.model(self.source, inputs, outputs)

    def window(self, node: ir.Node) -> None:
        """Emit a window on NHWC operands; its weights and factors stay as they are."""
        x, output = node.inputs[0], node.outputs[0]
        assert x is not None
        operands = [self.last(x), *(self.plain(value) for value in node.inputs[1:] if value)]
        self.emit(node, operands, output)

    def follow(self, node: ir.Node) -> bool:
        """Emit an element-wise node or Concat in NHWC if one of its inputs is there already."""
        custom = node.domain == DOMAIN
        if custom and node.op_type not in _FOLLOWING:
            return False
        if not custom and node.op_type not in _ELEMENTWISE | {"Concat"}:
            return False
        if len(node.outputs) != 1 or len(shape_of(node.outputs[0])) != 4:
            return False
        values = [value for value in node.inputs if value is not None]
        if not any(value in self.nhwc and value not in self.nchw for value in values):
            return False
        operands: list[ir.Value | None] = []
        for i, value in enumerate(node.inputs):
            if value is None or (custom and i > 0 and node.op_type in _WITH_TABLE):
                operands.append(None if value is None else self.plain(value))
            elif len(shape_of(value)) == 4:
                operands.append(self.last(value))
            elif array_of(value) is not None:
                operands.append(self.constant_last(value, node))
            else:
                return False
        self.emit(node, operands, node.outputs[0])
        return True

    def keep(self, node: ir.Node) -> None:
        """Emit a node as it is, on NCHW operands."""
        inputs = [None if value is None else self.plain(value) for value in node.inputs]
        for value in node.outputs:
            if value.is_graph_output():
                self.builder.release(value.name or "")
        outputs = self.builder.copy(node, inputs)
        self.nchw.update(zip(node.outputs, outputs, strict=True))

    def emit(self, node: ir.Node, operands: Sequence[ir.Value | None], output: ir.Value) -> None:
        shape = shape_of(output)
        permuted = tuple(shape[axis] for axis in _TO_NHWC)
        attributes = list(node.attributes.values())
        if node.op_type in _ALONG_AN_AXIS:
            axis = node.attributes.get_int("axis", 1) % 4
            attributes = [attribute for attribute in attributes if attribute.name != "axis"]
            attributes.append(ir.AttrInt64("axis", _TO_NHWC.index(axis)))
        result = self.builder.node(
            node.op_type,
            operands,
            {},
            f"{output.name}_nhwc",
            dtype_of(output),
            permuted,
            node.domain,
        )
        made = self.builder.nodes[-1]
        made.name = node.name
        for attribute in attributes:
            made.attributes.add(attribute)
        self.nhwc[output] = result

    def plain(self, value: ir.Value) -> ir.Value:
        """Return a value as it was, transposing it back if only its NHWC form exists."""
        if value in self.nchw:
            return self.nchw[value]
        if value in self.nhwc:
            name = value.name or "value"
            if value.is_graph_output():
                self.builder.release(name)
            result = self.swap(self.nhwc[value], name, shape_of(value), to_last=False)
        else:
            array = array_of(value)
            if array is None:
                raise ValueError(f"{value.name!r} has no producer")
            result = self.builder.constant(value.name or "constant", array)
        self.nchw[value] = result
        return result

    def last(self, value: ir.Value) -> ir.Value:
        """Return the NHWC form of a 4-D value."""
        if value not in self.nhwc:
            name = f"{value.name}_nhwc"
            array = array_of(value)
            if array is not None:
                self.nhwc[value] = self.builder.constant(name, array.transpose(_TO_NHWC))
            else:
                shape = shape_of(value)
                permuted = tuple(shape[axis] for axis in _TO_NHWC)
                self.nhwc[value] = self.swap(self.plain(value), name, permuted, to_last=True)
        return self.nhwc[value]

    def swap(self, value: ir.Value, name: str, shape: Sequence[int], to_last: bool) -> ir.Value:
        """Move the channels to the end or back; a mere change of shape where one side is 1."""
        given = shape_of(value)
        rows, columns = (
            (given[1], given[2] * given[3]) if to_last else (given[1] * given[2], given[3])
        )
        if 1 in (rows, columns):
            return self.builder.node("View", [value], {}, name, dtype_of(value), shape)
        attributes = {"batch": given[0], "rows": rows, "columns": columns}
        return self.builder.node("Transpose", [value], attributes, name, dtype_of(value), shape)

    def constant_last(self, value: ir.Value, node: ir.Node) -> ir.Value:
        """Return a broadcast constant of lower rank in NHWC; a scalar stays one."""
        array = array_of(value)
        assert array is not None
        if array.size == 1 or (node.op_type == "PRelu" and array.ndim == 1):
            return self.plain(value)
        full = array.reshape((1,) * (4 - array.ndim) + array.shape)
        return self.builder.constant(f"{value.name}_nhwc", np.transpose(full, _TO_NHWC))
