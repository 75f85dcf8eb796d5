"""Depthwise convolutions of a lowered graph as calls of generated kernels."""

from __future__ import annotations

import onnx_ir as ir

from edgepress.targets.lowering.assembly import Assembly
from edgepress.targets.lowering.dialect import shape_of
from edgepress.targets.lowering.node_attributes import (
    constant_of,
    epilogue_of,
    integer_of,
    operand_of,
    pair_of,
)
from edgepress.targets.lowering.operands import call_window, centred_bias, isa_for, staged
from edgepress.targets.schedules import depthwise
from edgepress.targets.schedules.epilogue import Requantise
from edgepress.targets.schedules.window import WindowShape


def is_depthwise(node: ir.Node) -> bool:
    """Tell whether every channel of a convolution has a window of its own."""
    channels, outputs = shape_of(operand_of(node.inputs[0]))[3], shape_of(node.outputs[0])[3]
    return integer_of(node, "group") == channels == outputs and channels > 1


def call_depthwise(assembly: Assembly, node: ir.Node) -> None:
    """Pad the input of a depthwise convolution where it needs that, and convolve."""
    isa, epilogue = isa_for(assembly, node), epilogue_of(node)
    weights, bias = constant_of(node, 1), constant_of(node, 2)
    quantized = isinstance(epilogue, Requantise)
    zero_point = integer_of(node, "x_zero_point") if quantized else 0
    if quantized:
        bias = centred_bias(bias, weights, zero_point)
    batch, _, _, channels = shape_of(operand_of(node.inputs[0]))
    _, out_height, out_width, _ = shape_of(node.outputs[0])
    kernel, strides, dilations = (pair_of(node, n) for n in ("kernel", "strides", "dilations"))
    dtype = isa.storage if quantized else "float32"
    x, height, width = staged(assembly, node, channels, 1, dtype, zero_point)
    shape = WindowShape(
        batch, height, width, channels, out_height, out_width, kernel, strides, dilations
    )
    kind = "qdepthwise" if quantized else "depthwise"
    name = assembly.kernel(kind, depthwise.depthwise, shape, isa, epilogue)
    packed = {"weights": depthwise.pack_weights(weights, isa), "bias": bias}
    if quantized:
        packed["multipliers"] = constant_of(node, 3)
    label = node.name or node.outputs[0].name or "conv"
    call_window(assembly, node, name, x, label, packed)
