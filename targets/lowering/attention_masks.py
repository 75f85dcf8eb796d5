"""Masks of attention: what is added to the scores, as one float32 value that a kernel reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepress.targets.lowering.dialect import shape_of
from edgepress.targets.lowering.views import View, contiguous, origins

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Mask:
    """What is added to scores.

    Attributes:
        value: float32; a condition where `fill` is given.
        shape: of the scores that it is broadcast to.
        fill: what a Where puts in place of scores.
        kept: whether it keeps scores where the condition is true, or where it is false.
    """

    value: ir.Value
    shape: Shape
    fill: float | None = None
    kept: bool = True


def mask_view(masks: Sequence[Mask], shape: Shape) -> View | None:
    """Return the sum of masks as a view `[batch, heads, queries, keys]`, None where there is none.

    Its source is that of a single mask which is there already, else what `MaskBuilder` makes.
    """
    first = masks[0]
    if any(mask.value.shape is None or mask.shape != first.shape for mask in masks):
        return None
    if len(masks) == 1 and first.fill is None:
        candidates = [view for view in origins(first.value)[::-1] if view.scale == 1]
    else:
        total = np.broadcast_shapes(*(shape_of(mask.value) for mask in masks))
        candidates = [View(first.value, 0, total, contiguous(total))]
    for view in candidates:
        whole = view.broadcast(first.shape)
        whole = None if whole is None else whole.reshaped(shape)
        if whole is not None and (whole.strides[3] == 1 or shape[3] == 1):
            return whole
    return None


class MaskBuilder:
    """Adds the nodes that make masks to a graph, each once."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.made: dict[tuple[object, ...], ir.Value] = {}

    def build(self, masks: Sequence[Mask], view: View, before: ir.Node) -> ir.Value:
        """Return the value that `view` shows; nodes that it needs come in front of `before`."""
        if len(masks) == 1 and masks[0].fill is None:
            return view.source
        total = self._addend(masks[0], before)
        for mask in masks[1:]:
            total = self._node("Add", [total, self._addend(mask, before)], before)
        return total

    def _addend(self, mask: Mask, before: ir.Node) -> ir.Value:
        if mask.fill is None:
            return mask.value
        branches = [self._constant(0.0), self._constant(mask.fill)]
        inputs = [mask.value, *(branches if mask.kept else branches[::-1])]
        return self._node("Where", inputs, before)

    def _node(self, op_type: str, inputs: Sequence[ir.Value], before: ir.Node) -> ir.Value:
        key = (op_type, *inputs)
        if key not in self.made:
            shape = np.broadcast_shapes(*(shape_of(value) for value in inputs))
            output = ir.Value(
                name=self._name("mask"),
                shape=ir.Shape(shape),
                type=ir.TensorType(ir.DataType.FLOAT),
            )
            node = ir.Node("", op_type, inputs, outputs=[output], name=output.name)
            self.graph.insert_before(before, node)
            self.made[key] = output
        return self.made[key]

    def _constant(self, number: float) -> ir.Value:
        if (number,) not in self.made:
            name = self._name("mask_fill")
            array = np.array(number, np.float32)
            value = ir.Value(
                name=name,
                shape=ir.Shape(()),
                type=ir.TensorType(ir.DataType.FLOAT),
                const_value=ir.Tensor(array, name=name),
            )
            self.graph.initializers[name] = value
            self.made[number,] = value
        return self.made[number,]

    def _name(self, name: str) -> str:
        taken = {value.name for node in self.graph for value in node.outputs}
        taken |= {*self.graph.initializers, *(value.name for value in self.graph.inputs)}
        number = 1
        while f"attention_{name}_{number}" in taken:
            number += 1
        return f"attention_{name}_{number}"
