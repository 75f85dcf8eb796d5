"""A graph in which nodes are replaced by others: what the rules of `decompose` read and emit."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.shape_inference
from onnx.reference import ReferenceEvaluator

from edgepress.targets.lowering.dialect import DOMAIN, take_name
from edgepress.targets.program import Array


class UnknownValue(Exception):
    """A shape or type is not known yet; it may be once other nodes are rewritten."""


class Rewriting:
    """A model that is being rewritten node by node.

    Attributes:
        opset: version of the default domain.
        source: the graph as it was, with inferred shapes.
    """

    def __init__(self, model: onnx.ModelProto, kept: Container[str] = ()) -> None:
        self.opset = opset_of(model)
        self.source = model.graph
        self._model, self._kept = model, kept
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self._empty = empty_inputs(model.graph)
        self._arrays = dict(self._empty)
        self._types = inferred_types(model)
        self._outputs = {value.name for value in self.source.output}
        self._nodes: list[onnx.NodeProto] = []
        self._taken = {n for node in self.source.node for n in (*node.input, *node.output)}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a value. Raises UnknownValue."""
        if name in self._arrays:
            return self._arrays[name].shape
        if name in self._tensors:
            return tuple(self._tensors[name].dims)
        kind = self._types.get(name)
        if kind is None or not kind.HasField("shape"):
            raise UnknownValue(f"the shape of {name} is not known")
        if not all(dimension.HasField("dim_value") for dimension in kind.shape.dim):
            raise UnknownValue(f"the shape of {name} is not static")
        return tuple(dimension.dim_value for dimension in kind.shape.dim)

    def dtype(self, name: str) -> np.dtype[Any]:
        """Element type of a value. Raises UnknownValue."""
        if name in self._arrays:
            return self._arrays[name].dtype
        if name in self._tensors:
            element = self._tensors[name].data_type
            return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(element))
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
        kind = onnx.TypeProto()
        if name in self._arrays or name in self._tensors:
            element = onnx.helper.np_dtype_to_tensor_dtype(self.dtype(name))
            return onnx.helper.make_tensor_type_proto(element, self.shape(name))
        if name in self._types:
            kind.tensor_type.CopyFrom(self._types[name])
        return kind

    def constant(self, name: str) -> Array | None:
        """Array of a value that is known, else None."""
        if name not in self._arrays and name in self._tensors:
            self._arrays[name] = onnx.numpy_helper.to_array(self._tensors[name])
        return self._arrays.get(name)

    def fresh(self, name: str) -> str:
        """Return an unused name."""
        return take_name(name, self._taken)

    def add_constant(self, array: Any, dtype: Any = None) -> str:
        """Add an initializer; return its name."""
        name = self.fresh("constant")
        self._arrays[name] = np.asarray(array, dtype)
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
        for node in nodes:
            node.input[:] = [self._own_name(name) for name in node.input]
        for value in self.source.output:
            if value.name in self._arrays and value.name not in self._tensors:
                known = self.add_constant(self._arrays[value.name])
                nodes.append(onnx.helper.make_node("Identity", [known], [value.name]))
        read = {name for node in nodes for name in _read_by(node)}
        read -= {value.name for value in self.source.input}
        model = _without_graph(self._model)
        model.graph.name = self.source.name
        model.graph.input.extend(self.source.input)
        model.graph.output.extend(self.source.output)
        model.graph.node.extend(nodes)
        claimed = [name for node in nodes if node.domain == DOMAIN for name in node.output]
        model.graph.value_info.extend(  # onnx cannot infer these
            onnx.ValueInfoProto(name=name, type=self.type_of(name)) for name in claimed
        )
        for name in (n for n in (*self._tensors, *self._arrays) if n in read):
            read.remove(name)
            tensor = self._tensors.get(name)
            if tensor is None:
                tensor = onnx.numpy_helper.from_array(self._arrays[name], name)
            model.graph.initializer.append(tensor)
        return model

    def _own_name(self, name: str) -> str:
        """Name of a value, or of a constant like it where it is an input without data."""
        return self.add_constant(self._empty[name]) if name in self._empty else name

    def _fold(self, node: onnx.NodeProto) -> bool:
        """Compute a node whose inputs are all known, or whose answer is a shape."""
        if node.op_type in self._kept or node.op_type == "If":  # a rule chooses the branch
            return False
        if node.op_type == "Identity" and node.output[0] in self._outputs:
            return False  # what finish() added
        if all(self._is_static(name) and 0 in self.shape(name) for name in node.output):
            empty = {name: np.zeros(self.shape(name), self.dtype(name)) for name in node.output}
            self._arrays |= empty
            return True
        if node.op_type in ("Shape", "Size") and self._is_static(node.input[0]):
            feeds = {node.input[0]: np.zeros(self.shape(node.input[0]), np.bool_)}
        else:
            known = {name: self.constant(name) for name in node.input if name}
            feeds = {name: array for name, array in known.items() if array is not None}
            if len(feeds) < len(known):
                return False
        self._arrays |= evaluate(node, feeds, self.opset)
        return True


_LARGEST_READ_BYTES = 1024  # by shape inference, which reads shapes and axes only


def inferred_types(model: onnx.ModelProto) -> dict[str, onnx.TypeProto.Tensor]:
    """Types of all values of a model, without looking into its weights."""
    light = _without_graph(model)
    graph = light.graph
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.value_info.extend(model.graph.value_info)
    graph.output.extend(onnx.ValueInfoProto(name=value.name) for value in model.graph.output)
    declared = {value.name for value in graph.input}
    for tensor in model.graph.initializer:
        if tensor.ByteSize() <= _LARGEST_READ_BYTES:
            graph.initializer.append(tensor)
        elif tensor.name not in declared:
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            graph.input.append(value)
    graph = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    types = {value.name: value.type.tensor_type for value in model.graph.output}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.HasField("tensor_type") and value.type.tensor_type.HasField("shape"):
            types[value.name] = value.type.tensor_type
    return types


def _without_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy what a model says of itself."""
    return onnx.ModelProto(
        ir_version=model.ir_version,
        opset_import=model.opset_import,
        producer_name=model.producer_name,
        metadata_props=model.metadata_props,
    )


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
    return int(next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")))


def evaluate(node: onnx.NodeProto, feeds: Mapping[str, Array], opset: int) -> dict[str, Array]:
    """Compute the outputs of one node by onnx's reference implementation."""
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
    names = (value.name for value in outputs)
    return {name: np.asarray(answer) for name, answer in zip(names, answers, strict=True)}


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """Attributes of a node by name; text as str."""
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in values.items()}
