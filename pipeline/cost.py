"""What a model costs: parameters, multiply-accumulates, bytes of weights."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from edgepress.passes.analysis import node_macs

FLOATS = (
    ir.DataType.FLOAT,
    ir.DataType.FLOAT16,
    ir.DataType.BFLOAT16,
    ir.DataType.DOUBLE,
)


_READ_AS_INT8 = {("MatMulInteger", 1), ("Gather", 0)}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Static figures of a model.

    Attributes:
        parameters: elements of weights; not those of scales, zero points and shapes.
        macs: multiply-accumulates of Conv, ConvTranspose, Gemm, MatMul and MatMulInteger for one
            inference; 0 for a node whose shape is unknown.
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
        if is_parameter(value):
            parameters += tensor.size
    return Cost(
        parameters=parameters,
        macs=sum(node_macs(node) for node in graph),
        size_bytes=size_bytes,
    )


def is_parameter(value: ir.Value) -> bool:
    """Tell whether a constant is a weight, and no scale, zero point or shape."""
    dtype = None if value.const_value is None else value.const_value.dtype
    roles = [(use.node.op_type, use.idx) for use in value.uses()]
    if dtype == ir.DataType.INT8 and roles and set(roles) <= _READ_AS_INT8:
        return True
    quantized = [i for op, i in roles if op in ("QuantizeLinear", "DequantizeLinear")]
    return 0 in quantized or (not quantized and dtype in FLOATS)
