"""Products of two tensors, neither of them a matrix of weights, become nodes with a kernel.

Where `claim_float_operators` finds constant weights on the right it makes a Gemm, and attention is
found before (`attention`); the other MatMuls of floats become `MatMul` nodes of the `edgepress`
domain, which read their operands through transposes, slices and broadcasts from where they lie:
attributes `sizes` (batch, heads, rows, depth, width), and start and strides of `left` and `right`.
"""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir

from edgepress.targets.lowering.dialect import DOMAIN, array_of, shape_of
from edgepress.targets.lowering.views import View, is_float, origins, place_of


def fuse_products(model: ir.Model) -> ir.Model:
    """Replace every product that the kernel can compute. The model is not changed."""
    if not any(_attributes(node) for node in model.graph):
        return model
    model = model.clone()
    for node in list(model.graph):
        found = _attributes(node)
        if found is None:
            continue
        inputs, attributes = found
        old = node.outputs[0]
        new = ir.Node(
            DOMAIN,
            "MatMul",
            inputs,
            ir.convenience.convert_attributes(attributes),
            name=node.name,
            outputs=[ir.Value(name=old.name, shape=old.shape, type=old.type)],
        )
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], [new], [old], list(new.outputs)
        )
    return model


def _attributes(node: ir.Node) -> tuple[list[ir.Value], dict[str, Any]] | None:
    """Return what a MatMul's kernel reads, and the attributes; None where it has none."""
    if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx"):
        return None
    left, right = node.inputs
    output = node.outputs[0]
    if left is None or right is None or not all(is_float(v) for v in (left, right, output)):
        return None
    if array_of(right) is not None and len(shape_of(right)) == 2:
        return None
    shape = shape_of(output)
    ranks = (len(shape_of(left)), len(shape_of(right)))
    if min(ranks) < 2 or 0 in (*shape, shape_of(left)[-1]):
        return None
    choices = [
        (a[0] + b[0], a[1], b[1])
        for split in _splits(shape[:-2])
        if (a := _operand(left, shape[:-2], split, 0))
        and (b := _operand(right, shape[:-2], split, 1))
    ]
    if not choices:
        return None
    _, rows, columns = max(choices, key=lambda choice: choice[0])
    places = {"left": place_of(rows, 2, 3), "right": place_of(columns, 2, 3)}
    sources = [rows.source, columns.source]
    return sources, {"sizes": (*rows.shape, columns.shape[3]), **places}


def _splits(batch: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the ways to see batch axes as two.

    >>> _splits((2, 3, 4))
    [(1, 24), (2, 12), (6, 4), (24, 1)]
    """
    return [(math.prod(batch[:i]), math.prod(batch[i:])) for i in range(len(batch) + 1)]


def _operand(
    value: ir.Value, batch: tuple[int, ...], split: tuple[int, int], index: int
) -> tuple[int, View] | None:
    """Return the farthest view of an operand that the kernel can read, `[batch, heads, …]`.

    In front of it stands how many nodes it looks through.
    """
    found = list(enumerate(origins(value)))
    for distance, view in reversed(found):
        whole = view.broadcast((*batch, *view.shape[-2:]))
        whole = None if whole is None else whole.reshaped((*split, *view.shape[-2:]))
        if whole is None or whole.scale != 1:
            continue
        if index == 0 or whole.adjacent(2) or whole.adjacent(3):
            return distance, whole
    return None
