"""What edgepress cannot compile in a model, and which of its weights cannot be right."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

# An infinite weight of these turns into NaN or swamps every output; elsewhere, as in the mask of an
# attention layer or the bound of a Clip, infinity has a meaning.
_MULTIPLYING = frozenset(
    {
        "BatchNormalization",
        "Conv",
        "ConvTranspose",
        "GRU",
        "Gemm",
        "GroupNormalization",
        "InstanceNormalization",
        "LSTM",
        "LayerNormalization",
        "MatMul",
        "PRelu",
        "RNN",
    }
)
_NO_TENSORS = ("seq(", "optional(", "map(", "sparse_tensor(")
_NO_NUMBERS = ("tensor(string)", "tensor(complex64)", "tensor(complex128)")
_WORDS = (ir.DataType.STRING, ir.DataType.COMPLEX64, ir.DataType.COMPLEX128)


def unsupported_parts(model: ir.Model) -> list[str]:
    """Name every node and value that edgepress cannot compile, and why: `conv_3 (Conv): …`.

    Strings, complex numbers, sequences and optionals enter a graph through its inputs, its
    constants, a Cast or an operator made for them, so those places are enough to look at.
    """
    opset = model.graph.opset_imports[""]
    values = {id(v): v for v in (*model.graph.inputs, *model.graph.outputs)}
    values |= {id(v): v for v in model.graph.initializers.values()}
    parts = [
        f"{value.name} ({_kind(value.type)}): only plain numeric tensors are supported"
        for value in values.values()
        if value.type is not None and not _is_numeric(value.type)
    ]
    reasons = ((node, _why_unsupported(node, opset)) for node in model.graph)
    return parts + [f"{node.name} ({node.op_type}): {why}" for node, why in reasons if why]


def bad_weights(model: ir.Model) -> list[str]:
    """Name every constant with missing bytes, NaN, or infinite weights, and say which."""
    found: list[tuple[str, ir.TensorProtocol | None, list[ir.Node]]] = [
        (name, value.const_value, [node for node, _ in value.uses()])
        for name, value in model.graph.initializers.items()
    ]
    for node in model.graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR:
                users = [user for user, _ in node.outputs[0].uses()]
                found.append((node.outputs[0].name or "", attribute.as_tensor(), users))
    reasons = (
        (name, "it has no data" if tensor is None else _why_bad(tensor, users))
        for name, tensor, users in found
    )
    return [f"{name!r}: {why}" for name, why in reasons if why]


def onnxruntime_runs(opset: int, ir_version: int) -> bool:
    """Whether onnxruntime, the reference, runs models of these versions.

    onnx may be newer than onnxruntime, so only a trial tells.
    """
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    trial = onnx.helper.make_model(
        onnx.helper.make_graph([node], "trial", [x], [y]),
        opset_imports=[onnx.helper.make_opsetid("", opset)],
        ir_version=ir_version,
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # a refusal is an answer, not news
    try:
        onnxruntime.InferenceSession(
            trial.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception:  # onnxruntime's own exceptions have no base of their own
        return False
    return True


def one_line(error: Exception) -> str:
    """Shorten a library's message to its first line."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")


def _is_numeric(kind: ir.TypeProtocol) -> bool:
    """Whether a type is a dense tensor of numbers or truth values."""
    return isinstance(kind, ir.TensorType) and kind.dtype not in _WORDS


def _kind(kind: ir.TypeProtocol) -> str:
    """Write a type for a message, such as `STRING` or `Sequence(Tensor(FLOAT))`."""
    return str(kind.dtype) if isinstance(kind, ir.TensorType) else str(kind)


def _why_unsupported(node: ir.Node, opset: int) -> str:
    """Say why a node cannot be compiled, or nothing."""
    if node.domain != "":
        return f"operators of the domain {node.domain!r} are not supported"
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return f"there is no such operator in opset {opset}"
    if schema.deprecated:
        return f"opset {opset} no longer has this operator"
    for name, attribute in node.attributes.items():
        if attribute.is_ref():
            return f"attribute {name!r} refers to a function, but the node is in none"
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            return "control flow with subgraphs is not supported"
        if attribute.type in (ir.AttributeType.SPARSE_TENSOR, ir.AttributeType.SPARSE_TENSORS):
            return "sparse tensors are not supported"
    for parameter in (*schema.inputs, *schema.outputs):
        if all(t.startswith(_NO_TENSORS) or t in _NO_NUMBERS for t in parameter.types):
            return f"it works on {min(parameter.types)}, only numeric tensors are supported"
    dtype = ir.DataType.FLOAT
    if node.op_type == "Constant" and {"value_string", "value_strings"} & set(node.attributes):
        dtype = ir.DataType.STRING
    elif node.op_type == "Constant" and "value" in node.attributes:
        dtype = node.attributes["value"].as_tensor().dtype
    elif node.op_type == "Cast":
        dtype = ir.DataType(node.attributes.get_int("to", 0))
    return f"{dtype} is not supported" if dtype in _WORDS else ""


def _why_bad(tensor: ir.TensorProtocol, users: list[ir.Node]) -> str:
    """Say why a tensor cannot be used, or nothing."""
    shape = tuple(int(extent) for extent in tensor.shape.numpy())
    if any(extent < 0 for extent in shape):
        return f"its shape is {list(shape)}"
    try:
        array = tensor.numpy()
    except Exception as error:
        return f"its bytes do not fill its shape {list(shape)} ({one_line(error)})"
    if array.size != math.prod(shape):
        return f"it has {array.size} elements, its shape {list(shape)} needs {math.prod(shape)}"
    if not tensor.dtype.is_floating_point():
        return ""
    if nans := int(np.isnan(array).sum()):
        return f"{nans} of {array.size} elements are NaN"
    infinite = int(np.isinf(array).sum())
    if infinite and any(user.op_type in _MULTIPLYING for user in users):
        return f"{infinite} of {array.size} elements are infinite"
    return ""
