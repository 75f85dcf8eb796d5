"""What a node reads, the values that its subgraphs capture included."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir


def reads(node: ir.Node) -> Iterator[ir.Value]:
    """Yield the inputs of a node, and at any depth what its subgraphs read or hand out.

    Values of the subgraphs themselves are among them.
    """
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            graph = attribute.as_graph()
            # a branch may hand out a value of the graph around it as it is
            yield from graph.outputs
            for inner in graph:
                yield from reads(inner)
