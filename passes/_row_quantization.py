"""Writes matrix products with 8-bit operands whose activations are quantized while the model runs.

Per row of the activations, over its last axis, in float32::

    step       = max((max(row, 0) - min(row, 0)) / 255, 2**-60)
    inverse    = 1 / step
    zero_point = round(-min(row, 0) * inverse)
    steps      = clip(round(row * inverse) + zero_point, 0, 255)            uint8

and for every product that reads them, with int8 weights of one scale per column::

    product = float32(steps @ weights - zero_point * column sums) * step * column scales

Everything is a plain operator of ONNX. The lowering (`edgepress.targets.lowering.dynamic`) finds
exactly these nodes again and makes two kernels of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array

SMALLEST_STEP = 2.0**-60  # of rows and of columns: products of two are no subnormal numbers
LARGEST_STEPS, LARGEST_WEIGHT = 255, 127
MOST_INPUTS = (2**31 - 1) // (LARGEST_STEPS * LARGEST_WEIGHT)  # of a sum that fits int32
_AXES_ARE_INPUTS_SINCE = 18


@dataclass(frozen=True)
class QuantizedRows:
    """An activation whose rows are quantized.

    Attributes:
        steps: uint8, shaped like the activation.
        step: float32 `[…, 1]`.
        zero_point: int32 `[…, 1]`.
    """

    steps: ir.Value
    step: ir.Value
    zero_point: ir.Value


@dataclass(frozen=True)
class QuantizedColumns:
    """A weight whose columns are quantized.

    Attributes:
        weights: int8 `[inputs, outputs]`, in [-127, 127].
        sums: int32 `[outputs]`, of the weights.
        scales: float32 `[outputs]`.
    """

    weights: ir.Value
    sums: ir.Value
    scales: ir.Value


def column_scales(weights: Array, per_channel: bool = True) -> Array:
    """Return the float32 scale `[outputs]` of every column of weights `[inputs, outputs]`."""
    largest = np.abs(weights).max(axis=0, initial=0)
    if not per_channel:
        largest = np.full_like(largest, largest.max(initial=0))
    scales = np.maximum(largest / np.float32(LARGEST_WEIGHT), np.float32(SMALLEST_STEP))
    return np.asarray(scales)


def to_steps(weights: Array, scales: Array) -> Array:
    """Round weights to whole steps of their scales, as int8 in [-127, 127]."""
    steps = np.rint(weights / scales)
    return np.clip(steps, -LARGEST_WEIGHT, LARGEST_WEIGHT).astype(np.int8)


class RowQuantizer:
    """Writes nodes into a graph; what is asked for twice is written once.

    Attributes:
        rows_of: the activations that are quantized so far.
    """

    def __init__(self, model: ir.Model) -> None:
        self.graph, self.opset = model.graph, model.graph.opset_imports.get("", 0)
        self._taken = {v.name for node in model.graph for v in node.outputs}
        self._taken |= {v.name for v in model.graph.inputs} | set(model.graph.initializers)
        self._taken_nodes = {node.name for node in model.graph}
        self.rows_of: dict[ir.Value, QuantizedRows] = {}
        self._scalars: dict[tuple[float, str], ir.Value] = {}

    def rows(self, x: ir.Value, before: ir.Node) -> QuantizedRows:
        """Quantize the rows of an activation, ahead of the first node that reads the result."""
        if x in self.rows_of:
            return self.rows_of[x]
        zero, one = self.scalar(0.0), self.scalar(1.0)

        def emit(op_type: str, *inputs: ir.Value, what: str, **attributes: int) -> ir.Value:
            return self.emit(before, op_type, inputs, f"{x.name}_{what}", **attributes)

        high = emit("Max", self._reduce("ReduceMax", x, before, "largest"), zero, what="high")
        low = emit("Min", self._reduce("ReduceMin", x, before, "smallest"), zero, what="low")
        span = emit("Sub", high, low, what="span")
        exact = emit("Div", span, self.scalar(LARGEST_STEPS), what="exact_step")
        step = emit("Max", exact, self.scalar(SMALLEST_STEP), what="step")
        inverse = emit("Div", one, step, what="inverse")
        below = emit("Mul", emit("Neg", low, what="below"), inverse, what="steps_below")
        point = emit("Round", below, what="zero_point")
        rounded = emit("Round", emit("Mul", x, inverse, what="scaled"), what="rounded")
        shifted = emit("Add", rounded, point, what="shifted")
        clipped = emit("Clip", shifted, zero, self.scalar(LARGEST_STEPS), what="clipped")
        self.rows_of[x] = QuantizedRows(
            emit("Cast", clipped, what="steps", to=ir.DataType.UINT8),
            step,
            emit("Cast", point, what="zero_point_int32", to=ir.DataType.INT32),
        )
        return self.rows_of[x]

    def columns(self, name: str, steps: Array, scales: Array) -> QuantizedColumns:
        """Add the constants of a weight `[inputs, outputs]`."""
        sums = steps.astype(np.int64).sum(axis=0).astype(np.int32)
        return QuantizedColumns(
            self.constant(f"{name}_quantized", steps),
            self.constant(f"{name}_sums", sums),
            self.constant(f"{name}_scales", scales.astype(np.float32)),
        )

    def product(
        self, rows: QuantizedRows, columns: QuantizedColumns, node: ir.Node, name: str
    ) -> ir.Value:
        """Multiply, in front of the node that it stands for; the float product is returned."""

        def emit(op_type: str, *inputs: ir.Value, what: str, **attributes: int) -> ir.Value:
            return self.emit(node, op_type, inputs, f"{name}_{what}", **attributes)

        sums = emit("MatMulInteger", rows.steps, columns.weights, what="sums")
        maker = sums.producer()
        if maker is not None and node.name:
            maker.name = node.name  # profiles and messages keep calling it so
        shift = emit("Mul", rows.zero_point, columns.sums, what="shift")
        centred = emit("Sub", sums, shift, what="centred")
        real = emit("Cast", centred, what="centred_float", to=ir.DataType.FLOAT)
        return emit("Mul", emit("Mul", real, rows.step, what="rows"), columns.scales, what="scaled")

    def scalar(self, value: float, dtype: str = "float32") -> ir.Value:
        """Return a constant of rank 0."""
        if (value, dtype) not in self._scalars:
            array = np.array(value, dtype)
            self._scalars[value, dtype] = self.constant(f"dynamic_{value:g}", array)
        return self._scalars[value, dtype]

    def constant(self, name: str, array: Array) -> ir.Value:
        """Add an initializer."""
        name = _free(name, self._taken)
        value = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            const_value=ir.Tensor(np.ascontiguousarray(array).reshape(array.shape), name=name),
        )
        self.graph.register_initializer(value)
        return value

    def emit(
        self,
        before: ir.Node,
        op_type: str,
        inputs: tuple[ir.Value, ...],
        name: str,
        **attributes: int | list[int],
    ) -> ir.Value:
        """Insert a node of one output ahead of another one."""
        node = ir.node(op_type, inputs, attributes, name=_free(name, self._taken_nodes))
        node.outputs[0].name = _free(name, self._taken)
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def _reduce(self, op_type: str, x: ir.Value, before: ir.Node, what: str) -> ir.Value:
        """Reduce the last axis and keep it."""
        name = f"{x.name}_{what}"
        if self.opset < _AXES_ARE_INPUTS_SINCE:
            return self.emit(before, op_type, (x,), name, axes=[-1], keepdims=1)
        key = (-1.0, "int64")
        if key not in self._scalars:
            self._scalars[key] = self.constant("dynamic_axes", np.array([-1], np.int64))
        return self.emit(before, op_type, (x, self._scalars[key]), name, keepdims=1)


def _free(name: str, taken: set[str | None]) -> str:
    """Return the name, with a number behind it where it is taken, and take it."""
    candidate, number = name, 1
    while candidate in taken:
        candidate, number = f"{name}_{number}", number + 1
    taken.add(candidate)
    return candidate
