"""Convolutions of a lowered graph as calls of generated kernels: which algorithm, and its call."""

from __future__ import annotations

import onnx_ir as ir

from edgepress.targets.lowering.assembly import Assembly
from edgepress.targets.lowering.depthwise_kernels import call_depthwise, is_depthwise
from edgepress.targets.lowering.dialect import shape_of
from edgepress.targets.lowering.gemm_kernels import packed_conv
from edgepress.targets.lowering.grouped_kernels import call_grouped, has_narrow_groups
from edgepress.targets.lowering.node_attributes import (
    constant_of,
    epilogue_of,
    integer_of,
    operand_of,
    pair_of,
)
from edgepress.targets.lowering.operands import call_window, centred_bias, isa_for, staged
from edgepress.targets.lowering.winograd_kernels import call_winograd, winograd_plan
from edgepress.targets.schedules import conv
from edgepress.targets.schedules.epilogue import Requantise, first_step


def call_conv(assembly: Assembly, node: ir.Node) -> None:
    """Convolve by the algorithm that suits the layer."""
    if is_depthwise(node):
        call_depthwise(assembly, node)
    elif has_narrow_groups(assembly, node):
        call_grouped(assembly, node)
    elif (plan := winograd_plan(assembly, node)) is not None:
        call_winograd(assembly, node, plan)
    else:
        call_direct(assembly, node)


def call_direct(assembly: Assembly, node: ir.Node) -> None:
    """Pad the input of a convolution where it needs that, and convolve."""
    isa, epilogue = isa_for(assembly, node), epilogue_of(node)
    weights, groups = constant_of(node, 1), integer_of(node, "group")
    quantized = isinstance(first_step(epilogue), Requantise)
    zero_point = integer_of(node, "x_zero_point") if quantized else 0
    bias = constant_of(node, 2)
    if quantized:
        bias = centred_bias(bias, weights, zero_point)
    batch, _, _, in_channels = shape_of(operand_of(node.inputs[0]))
    _, out_height, out_width, out_channels = shape_of(node.outputs[0])
    kernel, strides, dilations = (pair_of(node, n) for n in ("kernel", "strides", "dilations"))
    label = node.name or node.outputs[0].name or "conv"
    read = conv.step(isa, quantized)
    channels = -(-in_channels // groups // read) * read
    dtype = isa.staged if quantized else "float32"
    x, height, width = staged(assembly, node, channels, groups, dtype, zero_point)
    shape = conv.ConvShape(
        batch,
        height,
        width,
        channels,
        out_height,
        out_width,
        out_channels,
        kernel,
        strides,
        dilations,
        groups,
    )
    tile = assembly.tiles.choose("conv", shape, isa, quantized)
    kind = "qconv" if quantized else "conv"
    name = assembly.kernel(kind, conv.conv, shape, isa, epilogue, tile, str(weights.dtype))
    packed = packed_conv(node, weights, bias, shape, isa, tile, quantized)
    call_window(assembly, node, name, x, label, packed)
