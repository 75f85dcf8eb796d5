"""Channel groups: which elements of which axes of which tensors must be cut together, and the cut.

`analyse` walks a graph with a rule per operator (`_channel_rules.py`) and finds the channels; their
groups are what layers share (`_channel_axes.py`). `cut` removes channels with all that hangs on
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepress.passes._channel_axes import Axes, Kept, NoRule
from edgepress.passes._channel_rules import rule_of
from edgepress.passes._reads import reads


def analyse(model: ir.Model) -> Axes:
    """Find the channels of a canonical model, whose shapes are fixed and known.

    The nodes of `unknown` operators freeze all they touch. Raises ValueError where nodes are not in
    execution order.
    """
    axes = Axes()
    for node in model.graph:
        for value in (given for given in node.inputs if given is not None):
            if value.producer() is not None and not axes.knows(value):
                raise ValueError(f"{node.name} comes before what it reads, {value.name}")
        try:
            rule_of(node)(axes, node)
        except NoRule as form:
            operator = f"{node.op_type}{form}"
            axes.unknown.append((node.name or "", operator))
            _freeze_all(axes, node, operator)
            for value in node.outputs:
                axes.set_fixed(value)
        for value in node.outputs:
            if not axes.knows(value):
                axes.set_fixed(value)
    for value in model.graph.outputs:
        axes.freeze(*axes.of(value), why=f"{value.name} is an output of the model")
    return axes


def _freeze_all(axes: Axes, node: ir.Node, operator: str) -> None:
    """Freeze whatever a node reads, in subgraphs too."""
    article = "an" if operator[:1] in "AEIOU" else "a"
    why = f"{node.name} is {article} {operator}, which has no rule for channels"
    for value in reads(node):
        axes.freeze(*axes.of(value), why=why)


def cut(model: ir.Model, axes: Axes, channels: Iterable[int]) -> None:
    """Remove channels from a model, in place; `axes` must come from `analyse` of this very model.

    Shapes are stale afterwards: refresh them. Nothing is changed where ValueError is raised: for a
    number that is no channel, for a frozen channel, where nothing of a tensor would remain, and for
    a model that is no longer as it was analysed.
    """
    kept = axes.without(channels)
    smaller = [*_smaller(model, axes, kept)]
    axes.mend(kept)
    for value, array in smaller:
        value.const_value = ir.tensor(array, dtype=value.dtype, name=value.name)
        value.shape = ir.Shape(array.shape)


def _smaller(
    model: ir.Model, axes: Axes, kept: Kept
) -> Iterator[tuple[ir.Value, npt.NDArray[np.generic]]]:
    """Yield every initializer that loses elements, and what remains of it."""
    for value in model.graph.initializers.values():
        masks = [kept(axis) for axis in axes.channels_of(value) if axis is not None]
        if all(mask.all() for mask in masks):
            continue
        assert value.const_value is not None, "what is cut is constant"
        array = value.const_value.numpy()
        if array.shape != tuple(len(mask) for mask in masks):
            raise ValueError(f"{value.name} has another shape now than when it was analysed")
        for index, mask in enumerate(masks):
            if not mask.all():
                array = np.compress(mask, array, axis=index)
        yield value, np.ascontiguousarray(array)
