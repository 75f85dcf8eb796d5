"""Layer normalisations of a lowered graph as calls of generated kernels."""

from __future__ import annotations

import math

import onnx_ir as ir

from edgepress.targets.lowering.assembly import Assembly
from edgepress.targets.lowering.dialect import DOMAIN, shape_of
from edgepress.targets.lowering.dynamic_kernels import (
    declare_rows,
    factors_of,
    padded_width,
)
from edgepress.targets.lowering.node_attributes import float_of, integer_of, operand_of
from edgepress.targets.program import Call
from edgepress.targets.schedules.layer_norm import LayerNormShape, layer_norm


def call_layer_norm(assembly: Assembly, node: ir.Node) -> None:
    """Normalise rows; quantize them too where a product of dynamically quantized rows is next."""
    x, output = operand_of(node.inputs[0]), node.outputs[0]
    width = math.prod(shape_of(x)[integer_of(node, "axis") :])
    scale, shift, residual = [*node.inputs[1:], None, None, None][:3]
    reader = quantizing_reader(output, width)
    factors = None if reader is None else factors_of(reader)
    padded = 0 if reader is None else padded_width(width, assembly.isa)
    shape = layer_norm_shape(node, width, padded, quantized=factors is not None)
    kernel = assembly.kernel("layer_norm", layer_norm, shape, assembly.isa)
    label = node.name or kernel
    read = [assembly.tensor(v) for v in (x, residual, scale, shift) if v is not None]
    if factors is not None:
        read.append(assembly.constant(f"{label}.factors", factors))
    written = [assembly.declare(value) for value in node.outputs]
    if reader is not None:
        written += declare_rows(assembly, output, factors, (shape.rows, width, shape.padded))
    assembly.program.calls.append(Call(kernel, (*read, *written), tuple(written), label))


def layer_norm_shape(node: ir.Node, width: int, padded: int, *, quantized: bool) -> LayerNormShape:
    """Return what a `LayerNorm` node does to rows of `width`.

    `padded` is the width of its quantized rows, 0 where there are none; `quantized` tells whether
    they have factors.
    """
    scale, shift, residual = [*node.inputs[1:], None, None, None][:3]
    return LayerNormShape(
        rows=math.prod(shape_of(operand_of(node.inputs[0]))) // width,
        width=width,
        epsilon=float_of(node, "epsilon"),
        centred=bool(integer_of(node, "centred")),
        scaled=scale is not None,
        shifted=shift is not None,
        residual=residual is not None,
        sum_read=len(node.outputs) > 1,
        padded=padded,
        factors=quantized,
    )


def quantizing_reader(value: ir.Value, width: int) -> ir.Node | None:
    """Return the first product that reads a value's rows quantized."""
    for user, index in value.uses():
        dynamic = user.domain == DOMAIN and user.op_type == "DynamicGemm" and index == 0
        if dynamic and shape_of(value)[-1] == width:
            return user
    return None
