"""Attention, products of two tensors and softmax of floats as calls of generated kernels."""

from __future__ import annotations

import math

import onnx_ir as ir

from edgepress.targets.lowering.assembly import Assembly
from edgepress.targets.lowering.dialect import shape_of
from edgepress.targets.lowering.node_attributes import float_of, integer_of, operand_of
from edgepress.targets.schedules.attention import AttentionShape, attention
from edgepress.targets.schedules.matmul import MatMulShape, matmul
from edgepress.targets.schedules.panel import Place
from edgepress.targets.schedules.softmax import SoftmaxShape
from edgepress.targets.schedules.softmax_float import softmax_float


def call_attention(assembly: Assembly, node: ir.Node) -> None:
    """Emit the call of an `Attention` node."""
    batch, heads, queries, width, keys, value_width = _integers(node, "sizes")
    operands = [operand_of(value) for value in node.inputs]
    names = ("query", "key", "value", "mask")[: len(operands)]
    places = [_place(node, name, value) for name, value in zip(names, operands, strict=True)]
    output = node.outputs[0]
    by_batch, by_head, by_query = _integers(node, "output")
    shape = AttentionShape(
        batch=batch,
        heads=heads,
        queries=queries,
        keys=keys,
        width=width,
        value_width=value_width,
        query=places[0],
        key=places[1],
        value=places[2],
        mask=places[3] if len(places) > 3 else None,
        output=Place(math.prod(shape_of(output)), 0, by_batch, by_head, by_query),
        scale=float_of(node, "scale"),
        zero_rows=bool(integer_of(node, "zero_rows")),
    )
    kernel = assembly.kernel("attention", attention, shape, assembly.isa)
    sources = [assembly.tensor(value) for value in operands]
    assembly.call(kernel, sources, assembly.declare(output), node.name or kernel)


def call_matmul(assembly: Assembly, node: ir.Node) -> None:
    """Emit the call of a `MatMul` node."""
    batch, heads, rows, depth, width = _integers(node, "sizes")
    left, right = (operand_of(value) for value in node.inputs)
    places = _place(node, "left", left), _place(node, "right", right)
    shape = MatMulShape(batch, heads, rows, depth, width, *places)
    kernel = assembly.kernel("matmul", matmul, shape, assembly.isa)
    sources = [assembly.tensor(left), assembly.tensor(right)]
    assembly.call(kernel, sources, assembly.declare(node.outputs[0]), node.name or kernel)


def call_softmax(assembly: Assembly, node: ir.Node) -> None:
    """Emit the call of a `Softmax` node, of floats."""
    x, (first, stop) = operand_of(node.inputs[0]), _integers(node, "axes")
    outer, length, inner = (
        math.prod(part)
        for part in (shape_of(x)[:first], shape_of(x)[first:stop], shape_of(x)[stop:])
    )
    shape = SoftmaxShape(outer, length, inner)
    kernel = assembly.kernel("softmax", softmax_float, shape, assembly.isa)
    output = assembly.declare(node.outputs[0])
    assembly.call(kernel, [assembly.tensor(x)], output, node.name or kernel)


def _place(node: ir.Node, name: str, value: ir.Value) -> Place:
    start, batch, head, row, column = _integers(node, name)
    return Place(math.prod(shape_of(value)), start, batch, head, row, column)


def _integers(node: ir.Node, name: str) -> list[int]:
    return [int(number) for number in node.attributes[name].as_ints()]
