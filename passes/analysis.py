"""What passes know about a model, for those that only look: groups, layers, work, errors.

Nothing here changes a model. It is no pass; the registry leaves it out.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from edgepress.passes._channels import analyse
from edgepress.passes._layer_models import LAYERS, layer_model, signature
from edgepress.passes._macs import node_macs as node_macs
from edgepress.passes._qdq_layers import QuantizedLayer as QuantizedLayer
from edgepress.passes._shapes import static_shape
from edgepress.passes._switches import QuantizationSwitches as QuantizationSwitches
from edgepress.passes._switches import quantization_switches as quantization_switches


@dataclass(frozen=True, kw_only=True)
class ChannelGroup:
    """Channels that can only be cut together.

    Attributes:
        name: of the first layer that makes them; `prune-channels` takes it as a key of `amount`.
        channels: how many there are.
        free: how many of them may be cut.
        width: elements per channel in the widest layer; the size of a head for attention.
        layers: names of the layers that make them, in graph order.
        readers: names of the layers that sum over them, in graph order.
        why: why some or all must stay, or "".
    """

    name: str
    channels: int
    free: int
    width: int
    layers: list[str]
    readers: list[str]
    why: str


@dataclass(frozen=True, kw_only=True)
class Channels:
    """The channel groups of a model.

    Attributes:
        groups: in graph order.
        unknown: `(node, operator)` of nodes that the analysis has no rule for; they keep every
            channel that they touch.
    """

    groups: list[ChannelGroup]
    unknown: list[tuple[str, str]]


def channel_groups(model: ir.Model) -> Channels:
    """Find which channels of a canonical model must be cut together."""
    axes = analyse(model)
    groups = [
        ChannelGroup(
            name=group.name,
            channels=len(group.channels),
            free=len(group.free),
            width=group.width,
            layers=[node.name or "" for node in group.layers],
            readers=list(dict.fromkeys(member.node.name or "" for member in group.readers)),
            why=group.why,
        )
        for group in axes.groups()
    ]
    return Channels(groups=groups, unknown=axes.unknown)


def layers(model: ir.Model) -> list[tuple[str, ir.Model]]:
    """Return every Conv, Gemm and MatMul with a constant weight as `(name, model of its own)`.

    The model of a layer holds what is fused into it too, and random weights. Shapes of `model` are
    fixed and known.
    """
    found = ((node.name or "", _alone(node)) for node in model.graph)
    return [(name, alone) for name, alone in found if alone is not None]


def changed_layers(before: ir.Model, after: ir.Model) -> list[tuple[str, ir.Model, ir.Model]]:
    """Return the layers that read, hold or write another shape in `after`, as pairs of models.

    Layers are paired by their nodes' names and are what `layers` returns. One that is gone from
    `after`, or is another operator there, is left out.

    Returns:
        `(name, model in before, model in after)`, in the order of `before`.
    """
    new = {node.name: node for node in after.graph}
    pairs = []
    for node in before.graph:
        other = new.get(node.name)
        if other is None or other.op_type != node.op_type or _shapes(node) == _shapes(other):
            continue
        old_model, new_model = _alone(node), _alone(other)
        if old_model is not None and new_model is not None:
            pairs.append((node.name or "", old_model, new_model))
    return pairs


def layer_signature(model: ir.Model) -> str:
    """Describe all that the speed of a layer's model depends on."""
    return signature(model)


def _alone(node: ir.Node) -> ir.Model | None:
    """Return a layer's model; None for what is no layer or has a weight that is computed."""
    if node.op_type not in LAYERS:
        return None
    try:
        return layer_model(node)
    except ValueError:
        return None


def _shapes(node: ir.Node) -> list[tuple[int, ...] | None]:
    """Return the shapes of all that a node reads and writes."""
    return [static_shape(value) for value in (*node.inputs, *node.outputs)]
