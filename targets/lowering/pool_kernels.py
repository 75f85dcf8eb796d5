"""Pools of a lowered graph as calls of generated kernels."""

from __future__ import annotations

import math

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
from edgepress.targets.lowering.operands import call_window, staged
from edgepress.targets.lowering.quantization import LIMITS
from edgepress.targets.schedules import pool
from edgepress.targets.schedules.epilogue import Requantise, Shift
from edgepress.targets.schedules.window import WindowShape


def _pool_shape(node: ir.Node, height: int, width: int) -> WindowShape:
    batch, out_height, out_width, channels = shape_of(node.outputs[0])
    window = [pair_of(node, name) for name in ("kernel", "strides", "dilations")]
    return WindowShape(batch, height, width, channels, out_height, out_width, *window)


def call_max_pool(assembly: Assembly, node: ir.Node) -> None:
    """Pad with the least value where windows need it, and take the largest of each window."""
    dtype = dtype_of(node.outputs[0])
    lowest = LIMITS[dtype][0] if dtype in LIMITS else -math.inf
    channels = shape_of(node.outputs[0])[3]
    x, height, width = staged(assembly, node, channels, 1, dtype, lowest)
    shape = _pool_shape(node, height, width)
    name = assembly.kernel("max_pool", pool.max_pool, shape, assembly.isa, dtype)
    assembly.call(name, [x], assembly.declare(node.outputs[0]), node.name or name)


def call_average_pool(assembly: Assembly, node: ir.Node) -> None:
    """Pad with what stands for zero where windows need it, and average each window."""
    epilogue = epilogue_of(node)
    zero_point = integer_of(node, "x_zero_point") if isinstance(epilogue, Requantise) else 0
    dtype = dtype_of(operand_of(node.inputs[0]))
    channels = shape_of(node.outputs[0])[3]
    x, height, width = staged(assembly, node, channels, 1, dtype, zero_point)
    shape = _pool_shape(node, height, width)
    places = integer_of(node, "shift") if isinstance(epilogue, Shift) else 0
    options = (shape, assembly.isa, dtype, zero_point, epilogue, places)
    name = assembly.kernel("average_pool", pool.average_pool, *options)
    packed = {"factors": constant_of(node, 1).ravel()}
    call_window(assembly, node, name, x, node.name or name, packed)
