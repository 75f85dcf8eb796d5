"""lift-constants: turn Constant nodes into initializers, the one place for weights."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from edgepress.passes._constants import free_name
from edgepress.passes.base import Context, Outcome, Pass, PassRefused


@dataclass(frozen=True, kw_only=True)
class LiftConstants(Pass):
    """Turn every Constant node into an initializer of the same name.

    A Constant that is a graph output becomes an Identity of an initializer.
    Stats: `lifted` constants.
    """

    def call(self, model: ir.Model, context: Context) -> Outcome:  # noqa: ARG002
        """Lift all constants, whichever attribute holds their value."""
        constants = [node for node in model.graph if node.op_type == "Constant"]
        for node in constants:
            if node.outputs[0].is_graph_output():
                _stand_before_output(model.graph, node)
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        return Outcome(model=model, modified=bool(constants), stats={"lifted": len(constants)})

    def ensures(self, model: ir.Model) -> None:
        """Refuse a Constant that holds no dense numeric tensor."""
        left = [node for node in model.graph if node.op_type == "Constant"]
        if left:
            raise PassRefused(
                self.name,
                ", ".join(node.name or "" for node in left),
                "such a Constant cannot be read; give it exactly one dense numeric value",
            )


def _stand_before_output(graph: ir.Graph, constant: ir.Node) -> None:
    """Put an Identity between a Constant and the output it writes, which keeps its name."""
    value = constant.outputs[0]
    written = ir.Value(shape=value.shape, type=value.type)
    identity = ir.node("Identity", [value], outputs=[written], name=f"{constant.name}_output")
    graph.insert_after(constant, identity)
    graph.outputs[:] = [written if output is value else output for output in graph.outputs]
    name, value.name = value.name, free_name(graph, f"{value.name}_value")
    written.name = name
