"""fold-pad: let a Conv or a pool do the padding that a Pad node before it does.

A Conv pads with zeros, and so does an AveragePool that counts the padding; a MaxPool pads with
minus infinity. Where a Pad does the same along spatial axes, its amounts are added to the `pads` of
the node that reads it, and the padded copy of the tensor is never made.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepress.passes._constants import constant, drop_unread
from edgepress.passes._shapes import static_shape
from edgepress.passes.base import Context, Outcome, Pass

_OTHERS = "something that is no Conv and no pool reads it"


@dataclass(frozen=True, kw_only=True)
class FoldPad(Pass):
    """Merge Pad nodes into the Conv, AveragePool or MaxPool nodes that read them.

    Stats: `folded` Pad nodes.
    """

    def call(self, model: ir.Model, context: Context) -> Outcome:  # noqa: ARG002
        """Fold every Pad that all its readers can take over."""
        graph = model.graph
        folded = 0
        skipped: list[tuple[str, str]] = []
        for pad in [node for node in graph if node.op_type == "Pad"]:
            why = _fold(pad)
            if why:
                skipped.append((pad.name or "", why))
            else:
                graph.remove(pad, safe=True)
                folded += 1
        if folded:
            drop_unread(graph)
        return Outcome(
            model=model, modified=bool(folded), stats={"folded": folded}, skipped=skipped
        )


def _fold(pad: ir.Node) -> str:
    """Give a Pad's amounts to all its readers, or say why that cannot be."""
    source, out = pad.inputs[0], pad.outputs[0]
    amounts = _amounts(pad)
    if source is None or amounts is None:
        return "its amounts are not constant, or it does not pad with a constant"
    begins, ends, value = amounts
    if min(begins + ends) < 0:
        return "it crops"
    if any(begins[:2] + ends[:2]):
        return "it pads the batch or the channels"
    if out.is_graph_output() or not out.uses():
        return "its result is an output of the model"
    readers = [(user, index) for user, index in out.uses()]
    for user, index in readers:
        why = _why_not(user, index, begins[2:], ends[2:], value)
        if why:
            return why
    for user, index in readers:
        rank = len(begins) - 2
        old = list(user.attributes.get_ints("pads", (0,) * (2 * rank)))
        pads = [a + b for a, b in zip(old, begins[2:] + ends[2:], strict=True)]
        user.attributes.pop("auto_pad", None)
        user.attributes.add(ir.AttrInt64s("pads", pads))
        if user.op_type == "AveragePool":
            user.attributes.add(ir.AttrInt64("count_include_pad", 1))
        user.replace_input_with(index, source)
    return ""


def _amounts(pad: ir.Node) -> tuple[list[int], list[int], float] | None:
    """Return a Pad's amounts before and after each axis, and the value it pads with."""
    shape = static_shape(pad.inputs[0])
    if shape is None or pad.attributes.get_string("mode", "constant") != "constant":
        return None
    inputs = [*pad.inputs, None, None, None]
    rank = len(shape)
    axes = list(range(rank))
    if "pads" in pad.attributes:  # until opset 10
        pads = list(pad.attributes["pads"].as_ints())
        value = pad.attributes.get_float("value", 0.0)
    else:
        array, fill = constant(inputs[1]), constant(inputs[2])
        if array is None or (inputs[2] is not None and fill is None):
            return None
        pads = [int(amount) for amount in array]
        value = 0.0 if fill is None else float(fill.reshape(-1)[0])
        if inputs[3] is not None:
            chosen = constant(inputs[3])
            if chosen is None:
                return None
            axes = [int(axis) % rank for axis in chosen]
    begins, ends = [0] * rank, [0] * rank
    for position, axis in enumerate(axes):
        begins[axis], ends[axis] = pads[position], pads[position + len(axes)]
    return begins, ends, value


def _why_not(user: ir.Node, index: int, begins: list[int], ends: list[int], value: float) -> str:
    """Say why a reader cannot pad by itself, or nothing."""
    attributes = user.attributes
    if index != 0 or user.op_type not in ("Conv", "AveragePool", "MaxPool"):
        return _OTHERS
    if attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return f"{user.name} chooses its own padding by auto_pad"
    if user.op_type == "Conv":
        return "" if value == 0 else f"it pads with {value}, {user.name} with zeros"
    old = attributes.get_ints("pads", (0,) * (2 * len(begins)))
    kernel = attributes["kernel_shape"].as_ints()
    total = [a + b for a, b in zip(old, begins + ends, strict=True)]
    if any(amount >= extent for amount, extent in zip(total, [*kernel, *kernel], strict=True)):
        return f"{user.name} would have windows that see nothing but padding"
    if attributes.get_int("ceil_mode", 0):
        return f"{user.name} rounds its output up, where windows past the end count differently"
    if user.op_type == "MaxPool":
        if any(other.uses() or other.is_graph_output() for other in user.outputs[1:]):
            return f"{user.name} answers indices, which count the padding"
        lowest = _lowest(user.inputs[0])
        return "" if value == lowest else f"it pads with {value}, {user.name} with {lowest}"
    if any(old) and not attributes.get_int("count_include_pad", 0):
        return f"{user.name} leaves its own padding out of the average"
    return "" if value == 0 else f"it pads with {value}, {user.name} with zeros"


def _lowest(value: ir.Value | None) -> float:
    """Return what a MaxPool pads with: the lowest number of its dtype."""
    if value is None or value.dtype is None or value.dtype.is_floating_point():
        return -np.inf
    return float(np.iinfo(value.dtype.numpy()).min)
