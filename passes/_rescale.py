"""Scales and shifts per channel: finds them in a graph, and matches the moments of what they write.

A BatchNormalization at inference scales and shifts every channel, and so do a Mul and an Add with a
constant per channel, which fold-batch-norm writes for one that it cannot fold. Compression changes
the statistics of what they read, so what they write has the wrong mean and deviation. Setting both
right again restores much of a damaged network: Jordan et al., "REPAIR: REnormalizing Permuted
Activations for Interpolation Repair", 2023, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array
from edgepress.passes._constants import constant, set_input

#: A channel that deviates less than this share of its mean square is taken as constant.
CONSTANT_SHARE = 1e-10


def scaling_nodes(node: ir.Node) -> tuple[ir.Node, ...] | None:
    """Return the nodes of a constant scale and shift per channel that ends with `node`.

    That is a BatchNormalization at inference, or a Mul with a constant `[channels, 1, …]` and the
    Add of another one that alone reads it. None for anything else, and where a constant is shared.
    """
    if node.domain:
        return None
    if node.op_type == "BatchNormalization":
        trains = node.attributes.get_int("training_mode", 0) or len(node.outputs) > 1
        own = all(_own(value) for value in node.inputs[1:3])
        fixed = all(constant(value) is not None for value in node.inputs[3:5])
        return (node,) if own and fixed and not trains else None
    if node.op_type != "Add":
        return None
    for source in node.inputs:
        before = source.producer() if source is not None else None
        if source is None or before is None or before.domain or before.op_type != "Mul":
            continue
        alone = len(source.uses()) == 1 and not source.is_graph_output()
        if alone and _operand(node) is not None and _operand(before) is not None:
            return before, node
    return None


def match_moments(pairs: Iterable[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Return scale and shift that give the second of each pair the moments of the first.

    Args:
        pairs: what was written and what is written now, `[positions, channels]` each, by sample.

    Returns:
        Scale and shift, float64 `[channels]` each. A channel that is constant on either side, up to
        rounding, is only shifted.
    """
    count = 0
    sums: Array = np.zeros(())
    for pair in pairs:
        both = np.stack(pair).astype(np.float64)
        count += both.shape[1]
        sums = sums + np.stack([both.sum(axis=1), np.square(both).sum(axis=1)])
    mean, square = sums / max(count, 1)
    variance = square - mean**2
    constant_channel = (variance <= CONSTANT_SHARE * square).any(axis=0)
    safe = np.where(constant_channel, 1.0, variance)
    scale = np.sqrt(safe[0] / safe[1])
    return scale, mean[0] - scale * mean[1]


def rescale(nodes: Sequence[ir.Node], scale: Array, shift: Array) -> None:
    """Scale and shift what these nodes write, by changing their constants.

    Args:
        nodes: from `scaling_nodes`.
        scale: `[channels]`.
        shift: `[channels]`, added after scaling.
    """
    last = nodes[-1]
    factor, offset = (1, 2) if len(nodes) == 1 else (_operand(nodes[0]), _operand(last))
    assert factor is not None
    assert offset is not None
    for node, index, by, plus in ((nodes[0], factor, scale, 0.0), (last, offset, scale, shift)):
        old = constant(node.inputs[index])
        assert old is not None
        new = old.reshape(-1) * by + plus
        set_input(node, index, new.astype(old.dtype).reshape(old.shape), f"{node.name}_constant")


def _operand(node: ir.Node) -> int | None:
    """Return which input of a Mul or Add is its own constant per channel."""
    rank = len(node.outputs[0].shape or ())
    channels = (node.outputs[0].shape or (None,) * 2)[1] if rank >= 2 else None
    for index, value in enumerate(node.inputs):
        array = constant(value)
        if array is None or not _own(value) or array.size != channels:
            continue
        if (1,) * (rank - array.ndim) + array.shape == (1, channels, *(1,) * (rank - 2)):
            return index
    return None


def _own(value: ir.Value | None) -> bool:
    """Tell whether a value is a constant that a single node reads."""
    return constant(value) is not None and value is not None and len(value.uses()) == 1
