"""drop-no-ops: remove what computes nothing, and what nobody reads.

After it, every value of the graph has a fixed shape and a dtype; a model where that cannot be is
refused here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepress.passes._constants import (
    Array,
    constant,
    drop_unread,
    new_initializer,
    replace_output,
)
from edgepress.passes._shapes import demand_static, refresh_shapes, static_shape
from edgepress.passes.base import Context, Outcome, Pass


@dataclass(frozen=True, kw_only=True)
class DropNoOps(Pass):
    """Remove nodes that pass their input through, and unread nodes and weights.

    Graph inputs stay, read or not. Stats: `dropped` nodes, `merged` Transposes, `unread` nodes and
    weights.
    """

    def call(self, model: ir.Model, context: Context) -> Outcome:  # noqa: ARG002
        """Look at each node once, in execution order, until nothing changes."""
        graph = model.graph
        modified = refresh_shapes(model, self.name)
        dropped = merged = 0
        before = len(graph) + len(graph.initializers)
        changed = True
        while changed:
            changed = False
            for node in list(graph):
                source = _passed_through(node)
                if source is not None:
                    _bypass(graph, node, source)
                    dropped, changed = dropped + 1, True
                elif _merge_transposes(node):
                    merged, changed = merged + 1, True
            unread = _remove_unread(graph)
            changed |= bool(unread)
        unread = before - dropped - len(graph) - len(graph.initializers)
        modified |= bool(dropped or merged or unread)
        return Outcome(
            model=model,
            modified=modified,
            stats={"dropped": dropped, "merged": merged, "unread": unread},
        )

    def ensures(self, model: ir.Model) -> None:
        """Refuse values without a fixed shape or a dtype, naming all of them."""
        demand_static(model, self.name)
