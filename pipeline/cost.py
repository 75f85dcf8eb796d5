"""What a model costs: parameters, multiply-accumulates, bytes of weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

FLOATS = (
    ir.DataType.FLOAT,
    ir.DataType.FLOAT16,
    ir.DataType.BFLOAT16,
    ir.DataType.DOUBLE,
)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Static figures of a model.

    Attributes:
        parameters: elements of weights; not those of scales, zero points and shapes.
        macs: multiply-accumulates of Conv, ConvTranspose, Gemm and MatMul for one inference; 0 for
            a node whose shape is unknown.
        size_bytes: bytes of every constant as the model stores it.
    """

    parameters: int
    macs: int
    size_bytes: int


def cost(model: ir.Model) -> Cost:
    """Count a model's parameters, multiply-accumulates and bytes."""
    graph = model.graph
    parameters = size_bytes = 0
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            continue
        size_bytes += tensor.nbytes
        if _is_parameter(value, tensor.dtype):
            parameters += tensor.size
    return Cost(
        parameters=parameters,
        macs=sum(node_macs(node) for node in graph),
        size_bytes=size_bytes,
    )


def _is_parameter(value: ir.Value, dtype: ir.DataType) -> bool:
    roles = [(use.node.op_type, use.idx) for use in value.uses()]
    quantized = [i for op, i in roles if op in ("QuantizeLinear", "DequantizeLinear")]
    return 0 in quantized or (not quantized and dtype in FLOATS)


def node_macs(node: ir.Node) -> int:
    """Count the multiply-accumulates of one node, 0 for operators that have none."""
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return 0
    x, w, y = (_shape(value) for value in (node.inputs[0], node.inputs[1], node.outputs[0]))
    if x is None or w is None or y is None:
        return 0
    match node.op_type:
        case "Conv":
            return math.prod(y) * math.prod(w[1:])
        case "ConvTranspose":
            return math.prod(x) * math.prod(w[1:])
        case "Gemm":
            return math.prod(y) * x[0 if node.attributes.get_int("transA", 0) else 1]
        case _:
            return math.prod(y) * x[-1]


def _shape(value: ir.Value | None) -> tuple[int, ...] | None:
    if value is None or value.shape is None:
        return None
    dims = tuple(value.shape)
    return tuple(int(d) for d in dims if isinstance(d, int)) if value.shape.is_static() else None
