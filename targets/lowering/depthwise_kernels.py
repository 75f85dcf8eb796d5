"""Depthwise convolutions of a lowered graph as calls of generated kernels."""

from __future__ import annotations

import onnx_ir as ir

from edgepress.targets.lowering.assembly import Assembly
from edgepress.targets.lowering.dialect import dtype_of, shape_of
from edgepress.targets.lowering.node_attributes import (
    constant_of,
    epilogue_of,
    integer_of,
    operand_of,
    pair_of,
)
from edgepress.targets.lowering.operands import centred_bias, isa_for
from edgepress.targets.schedules.depthwise import depthwise
from edgepress.targets.schedules.depthwise_layout import (
    DepthwiseShape,
    border_size,
    pack_channels,
    pack_weights,
)
from edgepress.targets.schedules.epilogue import Requantise


def is_depthwise(node: ir.Node) -> bool:
    """Tell whether every channel of a convolution has a window of its own."""
    channels, outputs = shape_of(operand_of(node.inputs[0]))[3], shape_of(node.outputs[0])[3]
    return integer_of(node, "group") == channels == outputs and channels > 1


def call_depthwise(assembly: Assembly, node: ir.Node) -> None:
    """Convolve the input of a depthwise convolution where it lies."""
    isa, epilogue = isa_for(assembly, node), epilogue_of(node)
    weights, bias = constant_of(node, 1), constant_of(node, 2)
    quantized = isinstance(epilogue, Requantise)
    zero_point = integer_of(node, "x_zero_point") if quantized else 0
    x = operand_of(node.inputs[0])
    if quantized:
        bias = centred_bias(bias, weights, zero_point)
    batch, height, width, channels = shape_of(x)
    _, out_height, out_width, _ = shape_of(node.outputs[0])
    kernel, strides, dilations = (pair_of(node, n) for n in ("kernel", "strides", "dilations"))
    top, left, _, _ = (int(pad) for pad in node.attributes["pads"].as_ints())
    shape = DepthwiseShape(
        batch,
        height,
        width,
        channels,
        out_height,
        out_width,
        kernel,
        strides,
        dilations,
        (top, left),
    )
    kind = "qdepthwise" if quantized else "depthwise"
    arguments = (shape, isa, epilogue, dtype_of(x), zero_point)
    name = assembly.kernel(kind, depthwise, *arguments)
    label = node.name or node.outputs[0].name or "conv"
    packed = {
        "weights": pack_weights(weights, shape, isa),
        "bias": pack_channels(bias, isa, quantized),
    }
    if quantized:
        packed["multipliers"] = pack_channels(constant_of(node, 3), isa, quantized)
    constants = [assembly.constant(f"{label}.{key}", array) for key, array in packed.items()]
    if size := border_size(shape):
        constants.append(assembly.repeated(dtype_of(x), zero_point, size))
    assembly.call(name, [assembly.tensor(x), *constants], assembly.declare(node.outputs[0]), label)
