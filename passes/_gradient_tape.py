"""What gradient rules build with: new nodes under free names, and sums over axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir

from edgepress.passes._constants import Array, constant

_T = TypeVar("_T")
_COMPARISONS = ("Equal", "Greater", "Less")

#: What `Tape.op` reads: a value, an input left out, or a constant in the dtype of the others.
Operand = ir.Value | Array | float | None


class NoGradient(Exception):
    """The gradient of a node is not known; the message says why."""


class Tape:
    """Appends nodes and constants to a graph, under names that nothing in it has."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._stem = "gradient_"
        taken = ir.convenience.create_value_mapping(graph)
        while any(name.startswith(self._stem) for name in taken):
            self._stem = f"_{self._stem}"
        self._count = itertools.count()

    def name(self) -> str:
        """Return a name that is free."""
        return f"{self._stem}{next(self._count)}"

    def op(self, op_type: str, *inputs: Operand, **attributes: Any) -> ir.Value:
        """Append a node and return its only output.

        Its dtype is that of the first floating input, which numbers among the inputs get as well.
        """
        read = [operand for operand in inputs if isinstance(operand, ir.Value)]
        dtype = next((value.dtype for value in read if value.dtype and is_float(value)), None)
        values: list[ir.Value | None] = []
        for operand in inputs:
            if operand is None or isinstance(operand, ir.Value):
                values.append(operand)
            else:
                values.append(self.constant(operand, given(dtype)))
        if op_type in _COMPARISONS:
            dtype = ir.DataType.BOOL
        elif op_type == "Cast":
            dtype = ir.DataType(attributes["to"])
        kind = None if dtype is None else ir.TensorType(dtype)
        output = ir.Value(name=self.name(), type=kind)
        self._append(op_type, values, [output], attributes)
        return output

    def split(self, value: ir.Value, sizes: Sequence[int], axis: int) -> list[ir.Value]:
        """Append a Split and return its outputs."""
        outputs = [ir.Value(name=self.name(), type=value.type) for _ in sizes]
        self._append("Split", [value, self.ints(sizes)], outputs, {"axis": axis})
        return outputs

    def _append(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outputs: Sequence[ir.Value],
        attributes: Mapping[str, Any],
    ) -> None:
        name = outputs[0].name
        self._graph.append(ir.node(op_type, inputs, attributes, outputs=outputs, name=name))

    def constant(self, array: Any, dtype: ir.DataType) -> ir.Value:
        """Add an initializer."""
        name, stored = self.name(), np.asarray(array, dtype.numpy())
        value = ir.Value(
            name=name,
            shape=ir.Shape(stored.shape),
            type=ir.TensorType(dtype),
            const_value=ir.tensor(stored, name=name),
        )
        self._graph.register_initializer(value)
        return value

    def ints(self, numbers: Sequence[int] | Array) -> ir.Value:
        """Add an int64 constant, such as axes or a shape."""
        return self.constant(numbers, ir.DataType.INT64)

    def full(self, shape: Sequence[int], number: float, like: ir.Value) -> ir.Value:
        """Return a number repeated to a shape, in the dtype of `like`, when the model runs."""
        return self.op("Expand", self.constant(number, given(like.dtype)), self.ints(shape))

    def reshape(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """Append a Reshape."""
        return self.op("Reshape", value, self.ints(shape))

    def total(self, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        """Sum over axes, which stay with extent 1; over no axis it is the value itself."""
        return self.op("ReduceSum", value, self.ints(axes), keepdims=1) if axes else value

    def unbroadcast(
        self, gradient: ir.Value, shape: tuple[int, ...], target: tuple[int, ...]
    ) -> ir.Value:
        """Sum a gradient of this shape over the axes along which `target` was repeated to it."""
        full = (1,) * (len(shape) - len(target)) + target
        axes = [axis for axis, extent in enumerate(shape) if full[axis] != extent]
        summed = self.total(gradient, axes)
        return summed if full == target else self.reshape(summed, target)

    def add_up(self, gradient: ir.Value, places: ir.Value, shape: tuple[int, ...]) -> ir.Value:
        """Add every element to the place in a flattened tensor of this shape that it came from.

        Args:
            gradient: of any shape.
            places: int64 in the same shape.
            shape: of the result.
        """
        dtype = given(gradient.dtype)
        # onnxruntime adds up no narrower floats
        wide = ir.DataType.FLOAT if dtype.bitwidth < ir.DataType.FLOAT.bitwidth else dtype
        updates = self.op("Cast", self.reshape(gradient, (-1,)), to=wide.value)
        zeros = self.full((math.prod(shape),), 0, updates)
        places = self.reshape(places, (-1,))
        flat = self.op("ScatterElements", zeros, places, updates, axis=0, reduction="add")
        return self.reshape(self.op("Cast", flat, to=dtype.value), shape)


def is_float(value: ir.Value) -> bool:
    """Whether a gradient can flow through a value."""
    return value.dtype is None or value.dtype.is_floating_point()


def given(item: _T | None) -> _T:
    """Return what an operator always has, such as its first input."""
    assert item is not None
    return item


def fixed(node: ir.Node, index: int) -> Array | None:
    """Return a constant input, or None where it is left out. Raises NoGradient otherwise."""
    value = node.inputs[index] if index < len(node.inputs) else None
    array = constant(value)
    if value is not None and array is None:
        raise NoGradient(f"its input {value.name!r} is not constant")
    return array
