"""A graph in which nodes are replaced by others: what the rules of `decompose` read and emit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.shape_inference
from onnx.reference import ReferenceEvaluator

from edgepress.targets.program import Array


class UnknownValue(Exception):
    """A shape or type is not known yet; it may be once other nodes are rewritten."""


class Rewriting:
    """A model that is being rewritten node by node.

    Attributes:
        opset: version of the default domain.
        constants: arrays of the initializers by name.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        graph = model.graph
        self.opset = opset_of(model)
        self.constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        self._types = {
            value.name: value.type.tensor_type
            for value in (*graph.input, *graph.value_info, *graph.output)
        }
        self.constants |= empty_inputs(graph)
        self._nodes: list[onnx.NodeProto] = []
        self._taken = {name for node in graph.node for name in (*node.input, *node.output)}
        self._model = model

    @property
    def source(self) -> onnx.GraphProto:
        """The graph as it was, with inferred shapes."""
        return self._model.graph

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a value. Raises UnknownValue."""
        if name in self.constants:
            return self.constants[name].shape
        kind = self._types.get(name)
        if kind is None or not kind.HasField("shape"):
            raise UnknownValue(f"the shape of {name} is not known")
        if not all(dimension.HasField("dim_value") for dimension in kind.shape.dim):
            raise UnknownValue(f"the shape of {name} is not static")
        return tuple(dimension.dim_value for dimension in kind.shape.dim)

    def dtype(self, name: str) -> np.dtype[Any]:
        """Element type of a value. Raises UnknownValue."""
        if name in self.constants:
            return self.constants[name].dtype
        if name not in self._types:
            raise UnknownValue(f"the type of {name} is not known")
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(self._types[name].elem_type))

    def _is_static(self, name: str) -> bool:
        try:
            self.shape(name)
        except UnknownValue:
            return False
        return True

    def type_of(self, name: str) -> onnx.TypeProto:
        """ONNX type of a value; empty for a missing input."""
        if name in self.constants:
            array = self.constants[name]
            element = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            return onnx.helper.make_tensor_type_proto(element, array.shape)
        kind = onnx.TypeProto()
        if name in self._types:
            kind.tensor_type.CopyFrom(self._types[name])
        return kind

    def constant(self, name: str) -> Array | None:
        """Array of a value that is known, else None."""
        return self.constants.get(name)

    def fresh(self, name: str) -> str:
        """Return an unused name."""
        candidate, number = name, 1
        while candidate in self._taken:
            number += 1
            candidate = f"{name}_{number}"
        self._taken.add(candidate)
        return candidate

    def add_constant(self, array: Any, dtype: Any = None) -> str:
        """Add an initializer; return its name."""
        name = self.fresh("constant")
        self.constants[name] = np.asarray(array, dtype)
        return name

    def add_node(self, node: onnx.NodeProto) -> None:
        """Add a finished node."""
        self._taken.update(node.output)
        self._nodes.append(node)

    def attempt(self, rule: Callable[[Rewriting, onnx.NodeProto], bool], node: Any) -> bool:
        """Apply a rule; add nothing where it says no or lacks a shape."""
        before = len(self._nodes)
        try:
            done = rule(self, node)
        except UnknownValue:
            done = False
        if not done:
            del self._nodes[before:]
        return done

    def emit(self, op_type: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Add a node with one output; return the output's name."""
        output = output or self.fresh(op_type.lower())
        name = self.fresh(f"{op_type}_{output}")
        self.add_node(onnx.helper.make_node(op_type, inputs, [output], name, **attributes))
        return output

    def emit_axes(
        self,
        op_type: str,
        x: str,
        axes: Sequence[int],
        output: str | None = None,
        **attributes: Any,
    ) -> str:
        """Add a node whose axes are an input or an attribute, as the opset has it."""
        since = 13 if op_type in ("ReduceSum", "Squeeze", "Unsqueeze") else 18
        if self.opset >= since:
            wanted = self.add_constant(axes, np.int64)
            return self.emit(op_type, x, wanted, output=output, **attributes)
        return self.emit(op_type, x, output=output, axes=list(axes), **attributes)

    def reshape(self, x: str, shape: Sequence[int], output: str | None = None) -> str:
        """Add a Reshape."""
        return self.emit("Reshape", x, self.add_constant(shape, np.int64), output=output)

    def cast(self, x: str, dtype: Any, output: str | None = None) -> str:
        """Add a Cast."""
        element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self.emit("Cast", x, output=output, to=element)

    def finish(self) -> onnx.ModelProto:
        """Return the model of the added nodes, with what became constant computed."""
        nodes = [node for node in self._nodes if not self._fold(node)]
        used = {name for node in nodes for name in _read_by(node)}
        used |= {value.name for value in self.source.output}
        inputs = {value.name for value in self.source.input}
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:]
        model.graph.node.extend(nodes)
        model.graph.initializer.extend(
            onnx.numpy_helper.from_array(np.asarray(array), name)
            for name, array in self.constants.items()
            if name in used and name not in inputs
        )
        return model

    def _fold(self, node: onnx.NodeProto) -> bool:
        """Compute a node whose inputs are all known, or whose answer is a shape."""
        if node.op_type in ("Shape", "Size") and self._is_static(node.input[0]):
            feeds = {node.input[0]: np.zeros(self.shape(node.input[0]), np.bool_)}
        elif node.op_type == "If":  # the decomposer chooses the branch
            return False
        elif all(name in self.constants for name in node.input if name):
            feeds = {name: self.constants[name] for name in node.input if name}
        else:
            return False
        self.constants |= zip(node.output, evaluate(node, feeds, self.opset), strict=False)
        return True


def empty_inputs(graph: onnx.GraphProto) -> dict[str, Array]:
    """Inputs that hold no data, and so are known."""
    arrays = {}
    for value in graph.input:
        kind = value.type.tensor_type
        if any(d.HasField("dim_value") and d.dim_value == 0 for d in kind.shape.dim):
            dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
            arrays[value.name] = np.zeros([d.dim_value for d in kind.shape.dim], dtype)
    return arrays


def _read_by(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads, in its branches too."""
    yield from node.input
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                yield from _read_by(inner)


def opset_of(model: onnx.ModelProto) -> int:
    """Version of the default domain."""
    return next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))


def evaluate(node: onnx.NodeProto, feeds: Mapping[str, Array], opset: int) -> list[Array]:
    """Compute one node by onnx's reference implementation."""
    inputs = [
        onnx.helper.make_tensor_value_info(
            name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
        )
        for name, array in feeds.items()
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
    graph = onnx.helper.make_graph([node], "constant", inputs, outputs)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    with np.errstate(all="ignore"):
        answers = ReferenceEvaluator(model).run(None, dict(feeds))
    return [np.asarray(answer) for answer in answers]


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """Attributes of a node by name; text as str."""
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in values.items()}
