"""Rounds weights up or down so that outputs change least, from unlabelled samples.

Rounding every weight to the nearest step is best for the weights, not for what the layer writes:
its mean squared error over samples is `(ŵ-w)·H·(ŵ-w)ᵀ`, where H holds the second moments of what
the layer reads. Choosing up or down for every weight so as to minimise this is the problem of Nagel
et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020, section 3. Coordinate
descent solves it without gradients or random numbers: one weight of every output at a time takes
the step that is best while all others stay, until a sweep changes none.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array, Samples
from edgepress.calibration.qparams import weight_qparams
from edgepress.passes._constants import constant
from edgepress.passes._moments import Moments, input_moments, is_layer
from edgepress.passes._quantized_layer import channel_axis
from edgepress.passes._sample_order import in_canonical_order
from edgepress.passes.base import Context

#: Steps of a weight on either side of 0.
MOST = 127
_SWEEPS = 8
_BLOCK = 64  # weights whose changes reach all others in one product


def adaptive_steps(
    pass_name: str,
    model: ir.Model,
    layers: list[ir.Node],
    samples: Samples,
    context: Context,
    *,
    per_channel: bool,
    corrected: bool,
) -> dict[ir.Node, Array]:
    """Round the weights of layers.

    Args:
        pass_name: for refusals.
        model: not yet quantized.
        layers: those that are not Conv, Gemm or MatMul with a constant weight of a bearable size
            are left out.
        samples: all are run; their order does not matter.
        context: for its progress.
        per_channel: one scale per output channel, as `weight_qparams` chooses it.
        corrected: whether the bias of a Conv or Gemm takes the mean error back afterwards.

    Returns:
        int8 steps by layer, in the weight's shape.
    """
    chosen = [node for node in layers if is_layer(node)]
    ordered = in_canonical_order(samples)
    found = {}
    for node, moments in input_moments(pass_name, model, chosen, ordered, context):
        weight = constant(node.inputs[1])
        assert weight is not None, "a layer has a constant weight"
        axis = channel_axis(node, weight)
        scales, _ = weight_qparams(weight, axis if per_channel else None)
        rows = weight if axis == 0 else weight.T
        groups = len(moments.second)
        shape = (groups, len(rows) // groups, -1)
        steps = np.broadcast_to(scales, len(rows)).reshape(*shape[:2], 1)
        importance = error_weights(moments, centred=corrected and node.op_type != "MatMul")
        rounded = round_rows(rows.reshape(shape), steps, importance).reshape(rows.shape)
        found[node] = np.ascontiguousarray(rounded if axis == 0 else rounded.T)
    return found


def error_weights(moments: Moments, *, centred: bool) -> Array:
    """Return `[groups, n, n]`: what an error of the weights costs, `e·H·eᵀ`.

    Args:
        moments: what the layer reads.
        centred: leave the mean error out: the bias takes it back.

    Few positions say little about pairs of inputs. H is drawn towards its diagonal, for which
    the nearest step is best, by as much as there are more inputs than positions.
    """
    second = moments.second[:, :-1, :-1]
    if centred:
        mean = moments.second[:, -1, :-1]
        second = second - mean[:, :, None] * mean[:, None, :]
    count = second.shape[-1]
    share = moments.count / (moments.count + count)
    diagonal = np.arange(count)
    drawn: Array = second * share
    drawn[:, diagonal, diagonal] = np.maximum(second[:, diagonal, diagonal], 0.0)
    return drawn


def round_rows(weights: Array, scales: Array, importance: Array) -> Array:
    """Round every weight up or down so that `e·H·eᵀ` of its row becomes small.

    Args:
        weights: `[groups, rows, n]`.
        scales: size of a step, `[groups, rows, 1]`.
        importance: H, `[groups, n, n]`, positive semidefinite.

    Returns:
        int8 `[groups, rows, n]` in [-127, 127], within one step of the weight.
    """
    scales = scales.astype(np.float64)
    real = weights / scales
    low, high = np.clip(np.floor(real), -MOST, MOST), np.clip(np.ceil(real), -MOST, MOST)
    steps = np.clip(np.rint(real), -MOST, MOST)
    gradient = (scales * steps - weights) @ importance
    curvature = np.einsum("gii->gi", importance)
    count = weights.shape[-1]
    for _ in range(_SWEEPS):
        changed = False
        for start in range(0, count, _BLOCK):
            stop = min(start + _BLOCK, count)
            moved = np.zeros((*weights.shape[:2], stop - start))
            local = gradient[:, :, start:stop].copy()
            for i in range(start, stop):
                bend = scales[:, :, 0] * curvature[:, None, i]
                best = -local[:, :, i - start] / np.where(bend > 0, bend, np.inf)
                new = np.clip(steps[:, :, i] + np.rint(best), low[:, :, i], high[:, :, i])
                move = (new - steps[:, :, i]) * scales[:, :, 0]
                if not move.any():
                    continue
                steps[:, :, i], moved[:, :, i - start] = new, move
                local += move[:, :, None] * importance[:, i, None, start:stop]
            if moved.any():
                changed = True
                gradient += moved @ importance[:, start:stop]
        if not changed:
            break
    return steps.astype(np.int8)
