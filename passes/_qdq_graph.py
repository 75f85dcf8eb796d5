"""What passes that write QDQ graphs share: quantized layers in a graph, and figures about it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Range
from edgepress.passes._qdq import QdqWriter
from edgepress.passes._quantized_layer import QuantizedLayer
from edgepress.passes.base import PassRefused

OLDEST_OPSET = 13  # the first with one scale per channel


def demand_opset(pass_name: str, model: ir.Model) -> None:
    """Refuse an opset whose QuantizeLinear has no scale per channel."""
    opset = model.graph.opset_imports.get("", 0)
    if opset < OLDEST_OPSET:
        raise PassRefused(
            pass_name,
            "model",
            f"it has opset {opset}, per-channel scales need {OLDEST_OPSET}; "
            f"put `raise-opset` before `{pass_name}`.",
        )


def calibrated_range(pass_name: str, value: ir.Value) -> Range:
    """Return the range that `calibrate` noted for a value, or refuse."""
    found = value.meta.get("range")
    if not isinstance(found, Range):
        raise PassRefused(
            pass_name,
            f"value {value.name!r}",
            f"no calibrated range for value {value.name!r}; "
            f"put `calibrate` right before `{pass_name}`: passes between may drop ranges.",
        )
    return found


def input_name(node: ir.Node, index: int) -> str:
    """Return the name of an input, or "" where the node has none there."""
    value = node.inputs[index] if index < len(node.inputs) else None
    return (value.name or "") if value is not None else ""


def write_layer(writer: QdqWriter, node: ir.Node, layer: QuantizedLayer) -> None:
    """Give a node its quantized weight and bias."""
    name = input_name(node, 1)
    parameters = writer.parameters(name, layer.scales, layer.zeros)
    writer.constant(node, 1, name, layer.weight, parameters, layer.axis)
    if layer.bias is None:
        return
    name = input_name(node, 2) or f"{node.outputs[0].name}_bias"
    zeros = np.zeros(layer.products.shape, np.int32)
    parameters = writer.parameters(f"{name}_quantized", layer.products, zeros)
    axis = 0 if layer.products.ndim else None
    writer.constant(node, 2, name, layer.bias, parameters, axis)


def quantizing_nodes(model: ir.Model) -> int:
    """Count the nodes that quantize or dequantize."""
    return sum(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph)


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def islands(nodes: Sequence[ir.Node]) -> int:
    """Count groups of float nodes that are connected by values between them."""
    group = {node: node for node in nodes}

    def find(node: ir.Node) -> ir.Node:
        while group[node] is not node:
            node = group[node]
        return node

    for node in nodes:
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer in group:
                group[find(node)] = find(producer)
    return len({find(node) for node in nodes})
