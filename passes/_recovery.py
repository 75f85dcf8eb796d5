"""Makes a compressed model compute what the original did, layer by layer, without labels.

Layers are visited in order. Each one sees the samples as the layers before it, which are mended
already, hand them on, and is fitted to what the original computed at that place, so errors do not
add up from layer to layer: He, Zhang and Sun, "Channel Pruning for Accelerating Very Deep Neural
Networks", 2017, section 3.2. A layer that ends in a residual addition is fitted to the sum, and so
makes up for the error of the shortcut as well.

A scale and shift per channel, such as a BatchNormalization, gets the mean and deviation of what it
writes set right instead (`_rescale.py`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array, Samples
from edgepress.passes._constants import constant, set_input
from edgepress.passes._moments import is_layer, is_weighted, patches, spread, with_ones
from edgepress.passes._replay import Replay, held_bytes
from edgepress.passes._rescale import match_moments, rescale, scaling_nodes
from edgepress.passes._ridge import Sums, fit
from edgepress.passes._shapes import refresh_shapes, shape_of, static_shape
from edgepress.passes._taps import input_shapes
from edgepress.passes.base import Context

Method = Literal["least-squares", "bias"]
#: Per value of the original: which elements of each axis remain, None where all do.
Kept = Mapping[str, Sequence[Array | None]]

#: Activations of both models that are held at once; more samples than fit are left out.
HELD_BYTES = 2**30
#: Positions that a layer is fitted to, over all samples; and of one sample at most.
POSITIONS, SAMPLE_POSITIONS = 2**16, 512
FOLDS = 4
#: A relative error that rounding explains; there is nothing to mend.
ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class _Site:
    """A layer to mend.

    Attributes:
        nodes: one node, or a MatMul and the Add of its bias; or a scale and shift.
        source: what it reads.
        output: what it writes.
        axis: of its channels.
        target: whose value in the original is the aim.
        shortcut: what an addition adds to the output before that is comparable to the target.
        scales: whether it is a scale and shift per channel.
    """

    nodes: tuple[ir.Node, ...]
    source: str
    output: str
    axis: int
    target: str
    shortcut: str | None = None
    scales: bool = False

    @property
    def stops(self) -> list[str]:
        """Return the values of the compressed model that are looked at."""
        return [name for name in (self.source, self.output, self.shortcut) if name is not None]


def recover(
    pass_name: str,
    original: ir.Model,
    compressed: ir.Model,
    kept: Kept,
    samples: Samples,
    context: Context,
    *,
    method: Method = "least-squares",
) -> dict[str, float]:
    """Refit a compressed model in place.

    Values are paired by name: one that both models have is to be computed alike, apart from the
    elements that `kept` leaves out. Convolutions, Gemm and MatMul with a constant weight of their
    own are refitted, and scales and shifts per channel.

    Args:
        pass_name: for refusals.
        original: with fixed shapes.
        compressed: its shapes may be stale.
        kept: what remains of values that lost elements.
        samples: their order does not matter. With fewer than 4, only means are set right.
        context: for its progress.
        method: "least-squares" refits weights and biases; "bias" only sets the mean of every
            channel right.

    Returns:
        The error that is left, by value: `|original - compressed| / |original|` over the samples.

    Raises:
        PassRefused: the samples cannot be run, or a value is NaN or infinite.
    """
    refresh_shapes(compressed, pass_name)
    sites = list(_sites(original, compressed, method))
    if not sites:
        return {}
    aims = [[site.target] for site in sites]
    stops = [site.stops for site in sites]
    one = held_bytes(original.graph, aims) + held_bytes(compressed.graph, stops)
    feeds = _ordered(samples.feeds(input_shapes(pass_name, original)))
    feeds = feeds[: max(FOLDS, HELD_BYTES // max(one, 1))]
    reference = Replay(pass_name, original, feeds, aims)
    replay = Replay(pass_name, compressed, feeds, stops)
    errors: dict[str, float] = {}
    for number, site in enumerate(sites):
        context.progress("refit layers", number, len(sites))
        reference.advance()
        replay.advance()
        pairs = _Pairs(site, reference, replay, kept)
        if pairs.error() > ROUNDING and _mend(site, pairs, replay, method):
            replay.run([site.source], [site.output])
        errors[site.output] = pairs.error()
    return errors


def _mend(site: _Site, pairs: _Pairs, replay: Replay, method: Method) -> bool:
    """Change the constants of a layer; return whether there was anything to change."""
    biased = _bias(site.nodes) is not None
    if site.scales:
        scale, shift = match_moments(pairs)
        if method == "bias":
            scale, shift = np.ones_like(scale), pairs.mean_residual()
        rescale(site.nodes, scale, shift)
        return True
    if method == "bias" or len(replay.values) < FOLDS or not is_layer(site.nodes[0]):
        if biased:
            _shift(site.nodes, pairs.mean_residual())
        return biased
    basis = _basis(site, replay)
    change = fit(_folds(site, pairs, replay, basis), biased=biased)
    if change is None:
        return False
    weights = change[..., :-1]
    _add(site.nodes[0], weights if basis is None else weights @ basis.swapaxes(1, 2))
    if biased:
        _shift(site.nodes, change[..., -1].reshape(-1))
    return True


class _Pairs:
    """What a layer should have written and what it writes: `[positions, channels]` per sample."""

    def __init__(self, site: _Site, reference: Replay, replay: Replay, kept: Kept) -> None:
        self._site, self._reference, self._replay, self._kept = site, reference, replay, kept

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        """Yield a pair per sample."""
        site = self._site
        for wanted, found in zip(self._reference.values, self._replay.values, strict=True):
            target, output = wanted[site.target], found[site.output]
            for axis, elements in enumerate(self._kept.get(site.target, ())):
                if elements is not None:
                    target = np.take(target, elements, axis)
            if site.shortcut is not None:
                output = output + found[site.shortcut]
            yield _rows(target, site.axis), _rows(output, site.axis)

    def error(self) -> float:
        """Return the relative error over all samples."""
        lost = total = 0.0
        for target, output in self:
            lost += float(np.square(target - output, dtype=np.float64).sum())
            total += float(np.square(target, dtype=np.float64).sum())
        return math.sqrt(lost / (total or lost or 1.0))

    def mean_residual(self) -> Array:
        """Return what is missing on average: `[channels]` float64."""
        means = [np.mean(target - output, axis=0, dtype=np.float64) for target, output in self]
        return np.asarray(np.mean(means, axis=0))


def _rows(values: Array, axis: int) -> Array:
    return np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis])


def _limit(replay: Replay) -> int:
    """Return how many positions of a sample are looked at."""
    return min(SAMPLE_POSITIONS, max(1, POSITIONS // len(replay.values)))


def _basis(site: _Site, replay: Replay) -> Array | None:
    """Return `[groups, n, rank]`: columns that span all patches, where these are fewer than n.

    The best change lies in that span, since a penalty only shortens it; so to solve for its
    coordinates there is exact, and takes rank³ operations instead of n³.
    """
    node, limit = site.nodes[0], _limit(replay)
    first = patches(node, replay.values[0][site.source], limit)
    if first.shape[1] * len(replay.values) >= first.shape[2]:
        return None
    found = [patches(node, values[site.source], limit) for values in replay.values]
    spanned: Array = np.concatenate(found, axis=1).swapaxes(1, 2).astype(np.float64)
    return np.asarray(np.linalg.qr(spanned)[0])


def _folds(site: _Site, pairs: _Pairs, replay: Replay, basis: Array | None) -> list[Sums]:
    """Sum up what the regression needs, every fourth sample together."""
    folds: list[Sums] = []
    limit = _limit(replay)
    for index, (target, output) in enumerate(pairs):
        read = patches(site.nodes[0], replay.values[index][site.source], limit)
        folds += [Sums(size=read.shape[2])] if index < FOLDS else []
        read = read if basis is None else read @ basis
        chosen = spread(len(target), limit)
        residual = target[chosen].astype(np.float64) - output[chosen]
        grouped = residual.reshape(len(chosen), len(read), -1).transpose(1, 2, 0)
        folds[index % FOLDS].add(with_ones(read), grouped)
    return folds


def _ordered(feeds: Iterator[dict[str, Array]]) -> list[dict[str, Array]]:
    """Sort samples by content, so that their order decides nothing."""

    def digest(feed: dict[str, Array]) -> bytes:
        found = hashlib.sha256()
        for name in sorted(feed):
            found.update(np.ascontiguousarray(feed[name]).tobytes())
        return found.digest()

    return sorted(feeds, key=digest)


# Finding layers -----------------------------------------------------------------------------------


def _sites(original: ir.Model, compressed: ir.Model, method: Method) -> Iterator[_Site]:
    """Yield the layers whose outputs the original has too, in order of execution."""
    known = {value.name for node in original.graph for value in node.outputs}
    places = {node: place for place, node in enumerate(compressed.graph)}
    for node in compressed.graph:
        site = _site(node)
        if site is None or site.output not in known:
            continue
        if method == "least-squares" and not site.scales:
            site = _with_shortcut(site, known, places)
        yield site


def _site(node: ir.Node) -> _Site | None:
    """Return the layer that a node is, or None."""
    scale = scaling_nodes(node)
    if scale is not None:
        first = next(value for value in scale[0].inputs if constant(value) is None)
        return _make(scale, first, node.outputs[0], scales=True)
    weight = node.inputs[1] if is_weighted(node) else None
    if weight is None or len(weight.uses()) != 1 or weight.is_graph_output():
        return None
    output = node.outputs[0]
    reader = _only_reader(output)
    if node.op_type == "MatMul" and reader is not None and reader.op_type == "Add":
        same = static_shape(reader.outputs[0]) == static_shape(output)
        if same and any(constant(value) is not None for value in reader.inputs):
            return _make((node, reader), node.inputs[0], reader.outputs[0])
    return _make((node,), node.inputs[0], output)


def _make(
    nodes: tuple[ir.Node, ...], source: ir.Value | None, output: ir.Value, *, scales: bool = False
) -> _Site:
    first_axis = scales or nodes[0].op_type == "Conv"
    name = output.name or ""
    return _Site(
        nodes=nodes,
        source="" if source is None else source.name or "",
        output=name,
        axis=1 if first_axis else len(shape_of(output)) - 1,
        target=name,
        scales=scales,
    )


def _with_shortcut(site: _Site, known: set[str | None], places: Mapping[ir.Node, int]) -> _Site:
    """Aim at a residual sum where this layer is the last that contributes to it."""
    last = site.nodes[-1]
    add = _only_reader(last.outputs[0])
    if add is None or add.op_type != "Add" or add.outputs[0].name not in known:
        return site
    other = add.inputs[int(add.inputs[0] is last.outputs[0])]
    if other is None or other.is_initializer():
        return site
    maker = other.producer()
    earlier = maker is None or places[maker] < places[last]
    if not earlier or static_shape(other) != static_shape(last.outputs[0]):
        return site
    return replace(site, target=add.outputs[0].name or "", shortcut=other.name)


def _only_reader(value: ir.Value) -> ir.Node | None:
    readers = [use.node for use in value.uses()]
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


# Changing layers ----------------------------------------------------------------------------------


def _bias(nodes: Sequence[ir.Node]) -> tuple[ir.Node, int] | None:
    """Return where a layer has its bias, or could have one."""
    last = nodes[-1]
    if last.op_type == "Add":
        return last, next(i for i, value in enumerate(last.inputs) if constant(value) is not None)
    if last.op_type not in ("Conv", "Gemm"):
        return None
    given = last.inputs[2] if len(last.inputs) > 2 else None
    return None if given is not None and constant(given) is None else (last, 2)


def _shift(nodes: Sequence[ir.Node], delta: Array) -> None:
    """Add `[channels]` to the bias of a layer."""
    found, weight = _bias(nodes), constant(nodes[0].inputs[1])
    assert found is not None
    assert weight is not None
    node, index = found
    old = constant(node.inputs[index]) if index < len(node.inputs) else None
    if old is not None:
        delta = delta + old.astype(np.float64) * node.attributes.get_float("beta", 1.0)
    node.attributes.pop("beta", None)
    set_input(node, index, delta.astype(weight.dtype), f"{node.name}_bias")


def _add(node: ir.Node, change: Array) -> None:
    """Add `[groups, out/groups, n]` to the weight of a layer."""
    weight = constant(node.inputs[1])
    assert weight is not None
    if node.op_type == "Conv":
        change = change.reshape(weight.shape)
    else:
        change = change[0] if node.attributes.get_int("transB", 0) else change[0].T
        change = change / node.attributes.get_float("alpha", 1.0)
    set_input(node, 1, (weight + change).astype(weight.dtype), f"{node.name}_weight")
