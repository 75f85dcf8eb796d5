"""Collects what an importance needs to know of every group: weights, statistics, gradients.

What is not known of all channels of a group that may be cut is not handed out: a channel without a
figure would look like one that does nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array
from edgepress.calibration.importance.base import GroupEvidence, Importance
from edgepress.passes._channel_axes import Group, Member
from edgepress.passes._constants import constant
from edgepress.passes._gradients import open_gradients
from edgepress.passes._moments import Moments, input_moments, is_layer, is_weighted, patches
from edgepress.passes._taps import input_shapes
from edgepress.passes.base import Context
from edgepress.passes.fold_batch_norm import GAMMA

#: The index of a group, and a layer's weight that reads it.
_Reader = tuple[int, Member]


def collect(
    pass_name: str,
    model: ir.Model,
    groups: Sequence[Group],
    importance: Importance,
    context: Context,
    seed: int,
) -> list[GroupEvidence]:
    """Return the evidence of every group, as much of it as this importance needs.

    Raises PassRefused where the samples do not fit or an operator has no gradient.
    """
    contributions: list[Array | None] = [None] * len(groups)
    first_order: list[Array | None] = [None] * len(groups)
    if "contributions" in importance.needs:
        contributions = _contributions(pass_name, model, groups, context)
    if "first_order" in importance.needs:
        first_order = _first_order(pass_name, model, groups, context, seed)
    return [
        GroupEvidence(
            channels=len(group.channels),
            producers=[_rows(member, group) for member in group.producers],
            gammas=_gammas(group) if "gammas" in importance.needs else [],
            contributions=contributions[index],
            first_order=first_order[index],
            seed=seed + index,
        )
        for index, group in enumerate(groups)
    ]


def _rows(member: Member, group: Group) -> Array:
    """Return a weight as `[channels, parameters]`; zeros where the layer has not that channel."""
    array = np.moveaxis(_real(member.weight), member.axis, 0)
    array = array.reshape(len(array), -1)
    places = group.places(member.channels)
    known = np.flatnonzero(places >= 0)
    order = known[np.argsort(places[known], kind="stable")]
    counts = np.bincount(places[known], minlength=len(group.channels))
    # a channel may have several rows, such as a head: number them from 0 in every channel
    slots = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    shape = (len(group.channels), int(counts.max(initial=0)), array.shape[1])
    result = np.zeros(shape, array.dtype)
    result[places[order], slots] = array[order]
    return result.reshape(len(group.channels), -1)


def _real(weight: ir.Value) -> Array:
    """Return a weight in floats that NumPy knows, whether or not the graph stores it quantized."""
    array = constant(weight)
    assert array is not None, "members are constants"
    for user in weight.consumers():
        if user.op_type == "DequantizeLinear" and user.inputs[0] is weight:
            scale, zero = (constant(value) for value in [*user.inputs, None][1:3])
            if scale is not None:
                axis = user.attributes.get_int("axis", 1)
                real = array.astype(np.float32)
                if zero is not None:
                    real -= _along(zero.astype(np.float32), axis, array.ndim)
                return np.asarray(real * _along(scale.astype(np.float32), axis, array.ndim))
    return array if array.dtype.kind == "f" else array.astype(np.float32)


def _along(parameters: Array, axis: int, rank: int) -> Array:
    """Shape parameters of quantization to broadcast: one of all elements, or one per position."""
    if parameters.size == 1:
        return parameters.reshape(())
    return parameters.reshape([-1 if place == axis % rank else 1 for place in range(rank)])


def _gammas(group: Group) -> list[Array]:
    """Return the BatchNorm scales that were folded into the producers: `[channels]` each."""
    found: list[Array] = []
    seen = group.frozen.copy()
    for member in group.producers:
        text = member.node.metadata_props.get(GAMMA)
        gamma = np.asarray(json.loads(text or "[]"), np.float64)
        places = group.places(member.elements)
        if len(gamma) != len(places):
            continue
        known = places >= 0
        seen[places[known]] = True
        found.append(np.bincount(places[known], gamma[known], len(group.channels)))
    return found if seen.all() else []


def _by_layer(
    groups: Sequence[Group], usable: Callable[[ir.Node], bool]
) -> dict[ir.Node, list[_Reader]]:
    """Return the readers of all groups, by layer."""
    readers: dict[ir.Node, list[_Reader]] = {}
    for index, group in enumerate(groups):
        for member in group.readers:
            if usable(member.node):
                readers.setdefault(member.node, []).append((index, member))
    return readers


def _if_all_are_read(
    groups: Sequence[Group], readers: dict[ir.Node, list[_Reader]], found: Sequence[Array]
) -> list[Array | None]:
    """Return what was found of groups of which a layer reads every channel that may be cut."""
    seen = [group.frozen.copy() for group in groups]
    for index, member in (reader for listed in readers.values() for reader in listed):
        places = groups[index].places(member.channels)
        seen[index][places[places >= 0]] = True
    return [array if known.all() else None for array, known in zip(found, seen, strict=True)]


def _contributions(
    pass_name: str, model: ir.Model, groups: Sequence[Group], context: Context
) -> list[Array | None]:
    """Sum the Gram matrix of what each channel adds to the outputs of its readers."""
    assert context.samples is not None, "whoever collects has asked for samples"
    grams = [np.zeros((len(group.channels),) * 2) for group in groups]
    readers = _by_layer(groups, is_layer)
    for node, moments in input_moments(pass_name, model, list(readers), context.samples, context):
        for index, member in readers[node]:
            grams[index] += _gram(node, member, moments, groups[index])
    return _if_all_are_read(groups, readers, grams)


def _gram(node: ir.Node, member: Member, moments: Moments, group: Group) -> Array:
    """Return `z_c·z_d`, summed over the outputs of a reader: `[channels, channels]`.

    That is the second moment of the inputs, weighed by the weights: `(WᵀW) ∘ E[ppᵀ]`, summed over
    the inputs of a channel. It is divided by the energy of the outputs, the sum of it all, since
    readers whose outputs happen to be large would decide alone otherwise.
    """
    weights = _matrices(node, len(moments.second))
    inputs = len(member.channels)
    sums = np.zeros((inputs, inputs))
    for weight, second in zip(weights, moments.second, strict=True):
        terms = (weight.T @ weight) * second[:-1, :-1]
        sums += terms.reshape(inputs, -1, inputs, terms.shape[1] // inputs).sum(axis=(1, 3))
    picked = _picked(member, group)
    return np.asarray(picked.T @ sums @ picked / (float(sums.sum()) or 1.0))


def _picked(member: Member, group: Group) -> Array:
    """Return `[inputs, channels]` float64: 1 where an input of a layer belongs to a channel."""
    places = group.places(member.channels)
    return np.asarray(places[:, None] == np.arange(len(group.channels)), np.float64)


def _matrices(node: ir.Node, groups: int) -> Array:
    """Return what a layer multiplies patches with: `[groups, out/groups, in/groups·taps]`."""
    weight = constant(node.inputs[1])
    assert weight is not None, "layers have constant weights"
    weight = weight.astype(np.float64)
    if node.op_type == "Conv":
        return weight.reshape(groups, weight.shape[0] // groups, -1)
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    factor = node.attributes.get_float("alpha", 1.0)
    return np.asarray(factor * (weight if transposed else weight.T)[None])


def _first_order(
    pass_name: str, model: ir.Model, groups: Sequence[Group], context: Context, seed: int
) -> list[Array | None]:
    """Measure the first-order change of randomly projected outputs when a channel is removed.

    A channel adds `W_c·x_c` to the outputs of a layer that reads it, so to first order its removal
    changes a projection `v·y` of the model's outputs by `-Σ W_c·∂(v·y)/∂W_c`.
    """
    samples = context.samples
    assert samples is not None, "whoever collects has asked for samples"
    readers = _by_layer(groups, is_weighted)
    picked = {
        node: [(index, _picked(member, groups[index])) for index, member in listed]
        for node, listed in readers.items()
    }
    values = [value for node in readers for value in (node.inputs[0], node.outputs[0]) if value]
    shapes = input_shapes(pass_name, model)
    gradients = open_gradients(pass_name, model, list(dict.fromkeys(values)))
    changes = [np.zeros((len(samples), len(group.channels))) for group in groups]
    for sample, feed in enumerate(samples.feeds(shapes)):
        rng = np.random.default_rng([seed, sample])
        directions = {
            value.name or "": rng.choice([-1.0, 1.0], value.shape.numpy()).astype(np.float32)
            for value in model.graph.outputs
            if value.shape is not None
        }
        found = gradients(feed, directions)
        for node, listed in picked.items():
            x, y = node.inputs[0], node.outputs[0]
            assert x is not None, "layers have inputs"
            change = _change(node, found[x.name or ""][0], found[y.name or ""][1])
            for index, inputs in listed:
                changes[index][sample] -= change.reshape(len(inputs), -1).sum(axis=1) @ inputs
        context.progress("gradients", sample + 1, len(samples))
    return _if_all_are_read(groups, readers, changes)


def _change(node: ir.Node, x: Array, gradient: Array) -> Array:
    """Return `Σ W·∂/∂W` over outputs and groups: `[in/groups·taps]` float64.

    `x` is the layer's input and `gradient` that of its output, for one sample.
    """
    rows = patches(node, x)
    if node.op_type == "Conv":
        outputs = np.moveaxis(gradient, 1, -1).reshape(rows.shape[1], rows.shape[0], -1)
        outputs = outputs.transpose(1, 0, 2)
    else:
        outputs = gradient.reshape(1, rows.shape[1], -1)
    slopes = outputs.transpose(0, 2, 1) @ rows
    return np.asarray((slopes * _matrices(node, len(rows))).sum(axis=(0, 1)))
