"""Which activations share a scale, and whose range decides it."""

from __future__ import annotations

import onnx_ir as ir

from edgepress.passes._int8_rules import Plan, activations, is_carrier, results


def sources(planned: Plan) -> dict[ir.Value, ir.Value]:
    """Map every activation to quantize to the value whose range decides its scale, in order.

    A carrier's results take the scale of what it carries, and convolutions that a Concat alone
    reads take the Concat's.
    """
    chosen = set(planned.nodes)
    provider: dict[ir.Value, ir.Value] = {}
    values: dict[ir.Value, None] = {}
    for node in planned.nodes:
        values |= dict.fromkeys((*activations(node), *results(node)))
        if is_carrier(node):
            provider |= dict.fromkeys(results(node), activations(node)[0])
        if node.op_type == "Concat":
            for value in activations(node):
                maker = value.producer()
                if maker in chosen and not is_carrier(maker) and _only_reader(value, node):
                    provider[value] = node.outputs[0]
    found: dict[ir.Value, ir.Value] = {}
    for value in values:
        if value in planned.fused:
            continue
        root = value
        while root in provider:
            root = provider[root]
        found[value] = root
    return found


def touched(
    planned: Plan, roots: dict[ir.Value, ir.Value], nodes: dict[ir.Node, str]
) -> set[ir.Value]:
    """Return the values that decide the scales of all that these nodes read or write.

    A node that a rectifier follows writes what the rectifier writes. A node may stay float: then it
    is about what its neighbours write for it and read from it.
    """
    values: set[ir.Value] = set()
    for node in nodes:
        for value in (*activations(node), *results(node)):
            written = value
            while written in planned.fused and written.consumers():
                written = written.consumers()[0].outputs[0]
            if written in roots:
                values.add(roots[written])
    return values


def _only_reader(value: ir.Value, node: ir.Node) -> bool:
    """Whether nothing but this node reads the value."""
    return set(value.consumers()) == {node} and not value.is_graph_output()
