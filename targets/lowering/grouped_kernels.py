"""Convolutions in groups of few channels as calls of generated kernels."""

from __future__ import annotations

from dataclasses import replace

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
from edgepress.targets.schedules import conv, grouped
from edgepress.targets.schedules.epilogue import Requantise, first_step


def has_narrow_groups(assembly: Assembly, node: ir.Node) -> bool:
    """Tell whether a vector can hold the outputs of several groups of a convolution."""
    height, width = shape_of(operand_of(node.inputs[0]))[1:3]
    shape, isa = _shape(assembly, node, height, width), isa_for(assembly, node)
    quantized = isinstance(first_step(epilogue_of(node)), Requantise)
    return grouped.groups_together(shape, isa, quantized) > 1


def call_grouped(assembly: Assembly, node: ir.Node) -> None:
    """Pad the input of a convolution where it needs that, and convolve several groups at once."""
    isa, epilogue = replace(isa_for(assembly, node), matrix=None), epilogue_of(node)
    weights, bias = constant_of(node, 1), constant_of(node, 2)
    quantized = isinstance(first_step(epilogue), Requantise)
    zero_point = integer_of(node, "x_zero_point") if quantized else 0
    if quantized:
        bias = centred_bias(bias, weights, zero_point)
    x_shape = shape_of(operand_of(node.inputs[0]))
    shape = _shape(assembly, node, *x_shape[1:3])
    dtype = isa.staged if quantized else "float32"
    x, height, width = staged(assembly, node, shape.channels, shape.groups, dtype, zero_point)
    shape = _shape(assembly, node, height, width)
    tile = grouped.grouped_tile(shape, isa)
    kind = "qgrouped" if quantized else "grouped"
    name = assembly.kernel(kind, grouped.grouped, shape, isa, epilogue, tile, str(weights.dtype))
    vectors = grouped.together(shape, grouped.groups_together(shape, isa, quantized))
    packed = {
        "weights": grouped.pack_weights(weights, shape, isa),
        "bias": conv.pack_channels(bias, vectors, isa),
    }
    if quantized:
        packed["multipliers"] = conv.pack_channels(constant_of(node, 3), vectors, isa)
    call_window(assembly, node, name, x, node.name or name, packed)


def _shape(assembly: Assembly, node: ir.Node, height: int, width: int) -> conv.ConvShape:
    """Return the geometry, on an input of some height and width."""
    quantized = isinstance(first_step(epilogue_of(node)), Requantise)
    read = isa_for(assembly, node).group if quantized else 1
    groups = integer_of(node, "group")
    batch, _, _, channels = shape_of(operand_of(node.inputs[0]))
    _, out_height, out_width, out_channels = shape_of(node.outputs[0])
    kernel, strides, dilations = (pair_of(node, n) for n in ("kernel", "strides", "dilations"))
    return conv.ConvShape(
        batch,
        height,
        width,
        -(-channels // groups // read) * read,
        out_height,
        out_width,
        out_channels,
        kernel,
        strides,
        dilations,
        groups,
    )
