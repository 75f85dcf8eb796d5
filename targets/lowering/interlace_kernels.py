"""The phases of transposed convolutions, put together by a generated kernel."""

from __future__ import annotations

import onnx_ir as ir

from edgepress.targets.lowering.assembly import Assembly
from edgepress.targets.lowering.dialect import dtype_of, shape_of
from edgepress.targets.lowering.node_attributes import integer_of, operand_of, pair_of
from edgepress.targets.schedules.interlace import InterlaceShape, interlace


def call_interlace(assembly: Assembly, node: ir.Node) -> None:
    """Copy every phase to its place."""
    batch, height, width, channels = shape_of(node.outputs[0])
    strides, joined = pair_of(node, "strides"), integer_of(node, "joined")
    shape = InterlaceShape(batch, height, width, channels, strides, joined)
    dtype = dtype_of(node.outputs[0])
    name = assembly.kernel("interlace", interlace, shape, dtype, assembly.isa)
    sources = [assembly.tensor(operand_of(value)) for value in node.inputs]
    assembly.call(name, sources, assembly.declare(node.outputs[0]), node.name or name)
