"""Building blocks for lowered graphs: values with known shapes, nodes of the `edgepress` domain.

A lowered graph is an `onnx_ir.Model` in which some nodes belong to the domain `edgepress`; their
attributes hold everything that a kernel generator needs. The rest are plain ONNX nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

DOMAIN = "edgepress"
VIEWS = {"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
"""ONNX operators that only give the same bytes another shape."""
Array = npt.NDArray[Any]


def take_name(name: str, taken: set[str]) -> str:
    """Return the name, or its first free variation, and mark it as taken.

    >>> take_name("x", {"x", "x_2"})
    'x_3'
    """
    candidate, number = name, 1
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    taken.add(candidate)
    return candidate


class Builder:
    """Collects the nodes and initializers of a new graph."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self._taken: set[str] = set()

    def unique(self, name: str) -> str:
        """Return the name, or the first free variation of it."""
        return take_name(name, self._taken)

    def release(self, name: str) -> None:
        """Let the next node take a name that was reserved for it."""
        self._taken.discard(name)

    def free(self, name: str) -> None:
        """Rename whatever holds a name, so that the next node can take it."""
        holders = [value for node in self.nodes for value in node.outputs if value.name == name]
        if name in self.initializers:
            holders.append(self.initializers.pop(name))
        for value in holders:
            value.name = self.unique(name)
            if value.const_value is not None:
                self.initializers[value.name] = value
        self.release(name)

    def constant(self, name: str, array: Array) -> ir.Value:
        """Add an initializer."""
        name = self.unique(name)
        array = np.ascontiguousarray(array) if array.ndim else array
        value = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            const_value=ir.Tensor(array, name=name),
        )
        self.initializers[name] = value
        return value

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any],
        name: str,
        dtype: str,
        shape: Sequence[int],
        domain: str = DOMAIN,
        label: str | None = None,
    ) -> ir.Value:
        """Add a node with one output `name`; the node is called `label`, or like its output."""
        output = ir.Value(
            name=self.unique(name),
            shape=ir.Shape(shape),
            type=ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype))),
        )
        self.nodes.append(
            ir.Node(
                domain,
                op_type,
                inputs,
                ir.convenience.convert_attributes(attributes),
                outputs=[output],
                name=label or output.name,
            )
        )
        return output

    def copy(
        self, node: ir.Node, inputs: Sequence[ir.Value | None], dtype: str | None = None
    ) -> list[ir.Value]:
        """Add a copy of a node on other inputs; outputs keep shapes, and dtypes unless given."""
        outputs = []
        for old in node.outputs:
            kind = ir.DataType.from_numpy(np.dtype(dtype)) if dtype else old.dtype
            outputs.append(
                ir.Value(
                    name=self.unique(old.name or f"{node.name}_out"),
                    shape=old.shape,
                    type=None if kind is None else ir.TensorType(kind),
                )
            )
        self.nodes.append(
            ir.Node(
                node.domain,
                node.op_type,
                inputs,
                list(node.attributes.values()),
                outputs=outputs,
                name=node.name,
            )
        )
        return outputs

    def model(
        self, like: ir.Model, inputs: Iterable[ir.Value], outputs: Iterable[ir.Value]
    ) -> ir.Model:
        """Return the graph as a model with the opsets of another, without unused nodes."""
        graph = ir.Graph(
            inputs=list(inputs),
            outputs=list(outputs),
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={**like.graph.opset_imports, DOMAIN: 1},
            name=like.graph.name or "graph",
        )
        model = ir.Model(graph, ir_version=max(like.ir_version, 8))
        RemoveUnusedNodesPass()(model)
        return model


def array_of(value: ir.Value | None) -> Array | None:
    """Return the constant that a value holds, or None."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """Return a static shape. Raises ValueError where it is not."""
    if value.shape is None or not value.shape.is_static():
        raise ValueError(f"{value.name!r} has no static shape; canonicalise the model first")
    return tuple(int(dim) for dim in value.shape)  # type: ignore[arg-type]


def dtype_of(value: ir.Value) -> str:
    """Return the NumPy name of a value's dtype."""
    if value.dtype is None:
        raise ValueError(f"{value.name!r} has no dtype; canonicalise the model first")
    return value.dtype.numpy().name
