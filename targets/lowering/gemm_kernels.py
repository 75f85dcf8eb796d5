"""Matrix products of a lowered graph as calls of generated kernels."""

from __future__ import annotations

import math
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from edgepress.targets.isa.base import Isa
from edgepress.targets.lowering.assembly import Assembly
from edgepress.targets.lowering.dialect import dtype_of, shape_of
from edgepress.targets.lowering.node_attributes import (
    constant_of,
    epilogue_of,
    integer_of,
    operand_of,
)
from edgepress.targets.lowering.operands import call_window, centred_bias, isa_for
from edgepress.targets.schedules import conv
from edgepress.targets.schedules.epilogue import Requantise, first_step
from edgepress.targets.schedules.stage import StageShape, stage

Array = npt.NDArray[Any]


def call_gemm(assembly: Assembly, node: ir.Node) -> None:
    """Multiply rows by a matrix, widening or padding the rows where that is needed."""
    isa, epilogue = isa_for(assembly, node), epilogue_of(node)
    quantized = isinstance(first_step(epilogue), Requantise)
    weights, bias = constant_of(node, 1), constant_of(node, 2)
    if quantized:
        bias = centred_bias(bias, weights, integer_of(node, "x_zero_point"))
    x = operand_of(node.inputs[0])
    inputs, outputs = weights.shape[1], weights.shape[0]
    rows = math.prod(shape_of(x)) // inputs
    label = node.name or node.outputs[0].name or "gemm"
    read = conv.step(isa, quantized)
    channels = -(-inputs // read) * read
    source = assembly.tensor(x)
    dtype = isa.staged if quantized else "float32"
    if channels != inputs or dtype != dtype_of(x):
        line = StageShape(1, 1, rows, inputs, 0, 0, 1, rows, channels)
        widen = assembly.kernel("stage", stage, line, isa, (dtype_of(x), dtype), 0)
        staged = assembly.scratch(f"{node.outputs[0].name}_staged", dtype, (rows, channels))
        assembly.call(widen, [source], staged, f"{node.name} (padding)")
        source = staged
    shape = conv.ConvShape(1, 1, rows, channels, 1, rows, outputs)
    tile = assembly.tiles.choose("conv", shape, isa, quantized)
    options = (shape, isa, epilogue, tile, str(weights.dtype))
    name = assembly.kernel("qgemm" if quantized else "gemm", conv.conv, *options)
    expanded = weights.reshape(outputs, inputs, 1, 1)
    packed = packed_conv(node, expanded, bias, shape, isa, tile, quantized)
    call_window(assembly, node, name, source, label, packed)


def packed_conv(
    node: ir.Node,
    weights: Array,
    bias: Array,
    shape: conv.ConvShape,
    isa: Isa,
    tile: conv.Tile,
    quantized: bool,
) -> dict[str, Array]:
    """Return the constants of a convolution or product in the layout of its kernel."""
    packed = {
        "weights": conv.pack_weights(weights, shape, isa, tile),
        "bias": conv.pack_channels(bias, shape, isa),
    }
    if quantized:
        packed["multipliers"] = conv.pack_channels(constant_of(node, 3), shape, isa)
    return packed
