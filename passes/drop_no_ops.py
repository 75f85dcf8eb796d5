"""drop-no-ops: remove what computes nothing, and what nobody reads.

After it, every value of the graph has a fixed shape and a dtype; a model where that cannot be is
refused here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from edgepress.passes._constants import constant, drop_unread, replace_output
from edgepress.passes._shapes import demand_static, refresh_shapes, static_shape
from edgepress.passes.base import Context, Outcome, Pass

_RESHAPES = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")
# The number that changes nothing, and whether it may stand on either side.
_NEUTRAL = {
    "Add": (0, True),
    "Sub": (0, False),
    "Mul": (1, True),
    "Div": (1, False),
    "Pow": (1, False),
}
_OF_ONE = ("Concat", "Max", "Mean", "Min", "Sum")


@dataclass(frozen=True, kw_only=True)
class DropNoOps(Pass):
    """Remove nodes that pass their input through, and unread nodes and weights.

    Graph inputs stay, read or not.
    Stats: `dropped` nodes, `merged` Transposes and Concats, `unread` nodes, weights and outputs.
    """

    def call(self, model: ir.Model, context: Context) -> Outcome:  # noqa: ARG002
        """Look at each node once, in execution order, until nothing changes."""
        graph = model.graph
        modified = refresh_shapes(model, self.name)
        dropped = merged = unread = 0
        changed = True
        while changed:
            changed = False
            for node in list(graph):
                source = _passed_through(node)
                if source is not None:
                    replace_output(graph, node.outputs[0], source)
                    graph.remove(node, safe=True)
                    dropped, changed = dropped + 1, True
                elif _skip_transpose(node) or _drop_empty_parts(node):
                    merged, changed = merged + 1, True
            removed = _remove_unread(graph)
            unread, changed = unread + removed, changed or removed > 0
        modified |= bool(dropped or merged or unread)
        return Outcome(
            model=model,
            modified=modified,
            stats={"dropped": dropped, "merged": merged, "unread": unread},
        )

    def ensures(self, model: ir.Model) -> None:
        """Refuse values without a fixed shape or a dtype, naming all of them."""
        demand_static(model, self.name)


def _passed_through(node: ir.Node) -> ir.Value | None:
    """Return the value that a node hands on unchanged, or None where it computes something."""
    if not node.inputs or node.inputs[0] is None:
        return None
    source, out = node.inputs[0], node.outputs[0]
    if node.op_type == "Identity":
        # An output of the model that is an input, a weight or another output needs its Identity.
        fixed = source.is_graph_input() or source.is_initializer() or source.is_graph_output()
        return None if out.is_graph_output() and fixed else source
    if node.op_type == "Dropout":
        return source if _is_inference(node) else None
    if node.op_type in ("Cast", "CastLike"):
        return source if source.dtype is not None and source.dtype == out.dtype else None
    candidate = _candidate(node)
    shape = static_shape(candidate)
    if candidate is None or shape is None or shape != static_shape(out):
        return None
    return candidate if candidate.dtype == out.dtype else None


def _candidate(node: ir.Node) -> ir.Value | None:
    """Return the value that a node hands on, if only shape and dtype are the same."""
    source, kind = node.inputs[0], node.op_type
    if kind in _RESHAPES:
        return _before_reshapes(node)
    if kind in ("Expand", "Tile"):
        return source
    if kind in _OF_ONE:
        return source if len(node.inputs) == 1 else None
    if kind == "Split":
        return source if len(node.outputs) == 1 else None
    if kind == "Transpose":
        return source if _keeps_order(node) else None
    if kind == "Slice":
        steps = constant(node.inputs[4]) if len(node.inputs) > 4 else np.ones(1)
        return source if steps is not None and np.all(steps > 0) else None
    if kind == "Pad":
        pads = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if "pads" in node.attributes:  # until opset 10
            pads = np.array(node.attributes["pads"].as_ints())
        return source if pads is not None and not np.any(pads) else None
    if kind == "Clip":
        bounded = any(node.inputs[1:]) or "min" in node.attributes or "max" in node.attributes
        return None if bounded else source
    if kind in _NEUTRAL:
        neutral, either_side = _NEUTRAL[kind]
        for index in (1, 0) if either_side else (1,):
            array = constant(node.inputs[index])
            if array is not None and np.all(array == neutral):
                return node.inputs[1 - index]
    return None


def _is_inference(node: ir.Node) -> bool:
    """Whether a Dropout hands its input on and nobody reads its mask."""
    training = constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(1)
    if len(node.inputs) > 2 and node.inputs[2] is None:
        training = np.zeros(1)
    read = any(value.uses() or value.is_graph_output() for value in node.outputs[1:])
    return training is not None and not np.any(training) and not read


def _before_reshapes(node: ir.Node) -> ir.Value | None:
    """Return the first value up a chain of reshapes that has the shape of the chain's end."""
    shape = static_shape(node.outputs[0])
    value = node.inputs[0]
    while value is not None and static_shape(value) != shape:
        before = value.producer()
        if before is None or before.op_type not in _RESHAPES:
            return None
        value = before.inputs[0]
    return value


def _permutation(node: ir.Node) -> tuple[int, ...] | None:
    """Return a Transpose's axes; by default they are reversed."""
    shape = static_shape(node.inputs[0])
    if shape is None:
        return None
    return tuple(node.attributes.get_ints("perm", range(len(shape))[::-1]))


def _keeps_order(node: ir.Node) -> bool:
    """Whether a Transpose moves nothing but axes of extent 1."""
    axes, shape = _permutation(node), static_shape(node.inputs[0])
    if axes is None or shape is None:
        return False
    moved = [axis for axis in axes if shape[axis] != 1]
    return moved == sorted(moved)


def _skip_transpose(node: ir.Node) -> bool:
    """Let a Transpose of a Transpose read what the first one reads."""
    first = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    if first is None or node.op_type != "Transpose" or first.op_type != "Transpose":
        return False
    inner, outer = _permutation(first), _permutation(node)
    if inner is None or outer is None:
        return False
    node.attributes.add(ir.AttrInt64s("perm", [inner[axis] for axis in outer]))
    node.replace_input_with(0, first.inputs[0])
    return True


def _drop_empty_parts(node: ir.Node) -> bool:
    """Take inputs without elements off a Concat, as when a slice takes nothing of a tensor."""
    if node.op_type != "Concat" or 0 in (static_shape(node.outputs[0]) or (0,)):
        return False
    parts = [value for value in node.inputs if 0 not in (static_shape(value) or ())]
    if len(parts) == len(node.inputs):
        return False
    for index, value in enumerate(parts):
        node.replace_input_with(index, value)
    node.resize_inputs(len(parts))
    return True


def _remove_unread(graph: ir.Graph) -> int:
    """Remove nodes, weights and last outputs that nobody reads; return how many."""
    removed = 0
    for node in reversed(list(graph)):
        unread = [not (value.uses() or value.is_graph_output()) for value in node.outputs]
        if all(unread):
            graph.remove(node, safe=True)
            removed += 1
            continue
        needed = max(index for index, nobody in enumerate(unread) if not nobody) + 1
        surplus = len(unread) - max(needed, _required_outputs(graph, node))
        if surplus > 0:
            node.resize_outputs(len(unread) - surplus)
            removed += surplus
    return removed + drop_unread(graph)


def _required_outputs(graph: ir.Graph, node: ir.Node) -> int:
    """Return how many outputs a node must list, whether or not they are read."""
    if node.op_type == "BatchNormalization":  # before opset 14, more outputs meant training
        return len(node.outputs)
    schema = onnx.defs.get_schema(node.op_type, graph.opset_imports[""], "")
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    required = sum(1 for output in schema.outputs if output.option != optional)
    variadic = any(
        output.option == onnx.defs.OpSchema.FormalParameterOption.Variadic
        for output in schema.outputs
    )
    return len(node.outputs) if variadic else required
