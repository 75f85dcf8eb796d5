"""Reading, writing and naming constants of a graph."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]


def constant(value: ir.Value | None) -> Array | None:
    """Return the array of an initializer, or None for anything else."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    if value.is_graph_input():
        return None
    return value.const_value.numpy()


def new_initializer(graph: ir.Graph, stem: str, array: Array) -> ir.Value:
    """Register an initializer under a free name that starts with `stem`."""
    value = ir.Value(name=free_name(graph, stem), const_value=None)
    tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=value.name)
    value.const_value = tensor
    value.shape = ir.Shape(array.shape)
    value.dtype = tensor.dtype
    graph.register_initializer(value)
    return value


def free_name(graph: ir.Graph, stem: str) -> str:
    """Return `stem`, or `stem_1`, `stem_2`, … where a value has that name already."""
    taken = {value.name for node in graph for value in node.outputs}
    taken |= {value.name for value in graph.inputs} | set(graph.initializers)
    name, count = stem, 0
    while name in taken:
        count += 1
        name = f"{stem}_{count}"
    return name


def set_input(node: ir.Node, index: int, array: Array, stem: str) -> None:
    """Make a node read this array; an initializer that other nodes read too stays as it was."""
    graph = node.graph
    assert graph is not None
    old = node.inputs[index] if index < len(node.inputs) else None
    alone = old is not None and len(old.uses()) == 1 and not old.is_graph_output()
    if old is not None and alone and old.is_initializer() and not old.is_graph_input():
        tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=old.name)
        old.const_value = tensor
        old.shape = ir.Shape(array.shape)
        old.dtype = tensor.dtype
        return
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, new_initializer(graph, stem, array))


def drop_unread(graph: ir.Graph) -> int:
    """Remove initializers that nothing reads; return how many."""
    unread = [
        name
        for name, value in graph.initializers.items()
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input()
    ]
    for name in unread:
        del graph.initializers[name]
    return len(unread)


def replace_output(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let all readers of `old` read `new`; a graph output keeps the name of `old`.

    Where `new` is a graph input, an initializer or a graph output itself, an Identity writes the
    output. The node that wrote `old` is left without readers.
    """
    if not old.is_graph_output():
        old.replace_all_uses_with(new)
        return
    name, node = old.name or "", old.producer()
    assert node is not None
    fixed = new.is_graph_input() or new.is_initializer() or new.is_graph_output()
    if fixed:
        written = ir.Value(shape=old.shape, type=old.type)
        graph.insert_after(
            node, ir.node("Identity", [new], outputs=[written], name=f"{node.name}_output")
        )
    else:
        written = new
    for index, value in enumerate(graph.outputs):
        if value is old:
            graph.outputs[index] = written
    old.replace_all_uses_with(new)
    old.name = None
    written.name = name


def size_bytes(shape: tuple[int, ...], dtype: ir.DataType) -> int:
    """Bytes of a dense tensor."""
    return math.ceil(math.prod(shape) * dtype.bitwidth / 8)
