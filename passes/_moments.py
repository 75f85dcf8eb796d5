"""Second moments of what a layer reads, in the order of its weights.

A Conv, Gemm or MatMul with constant weights is `y = W·p + b` at every position, where p is the
patch of the input that the position sees. All that a least-squares fit of W needs to know about the
samples is `Σ [p;1][p;1]ᵀ`: a matrix whose size does not depend on how many samples there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array, Samples
from edgepress.passes._constants import constant
from edgepress.passes._taps import TAPPED_BYTES, input_shapes, open_taps, size_bytes
from edgepress.passes.base import Context, PassRefused

#: Positions of one sample that are looked at; neighbours in an image say nearly the same.
POSITIONS = 512
#: Moments that are collected in one sweep over the samples.
BATCH_BYTES = 2**29
#: Moments of one layer; larger ones take minutes to factorise.
LAYER_BYTES = 2**28
#: Patches that are multiplied at once: adding to large moments takes longer than a few products.
PATCH_BYTES = 2**23
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)


@dataclass(frozen=True)
class Moments:
    """What a layer reads, on average.

    Attributes:
        second: `[groups, n+1, n+1]` float64: the mean of `[p;1][p;1]ᵀ` over positions and samples.
            The last row holds the mean of p and a 1.
        count: positions that were averaged, over all samples.
    """

    second: Array
    count: int


def is_layer(node: ir.Node) -> bool:
    """Tell whether these functions can handle a node.

    It is a Conv, Gemm or MatMul with a constant float weight, which for a MatMul is the right
    operand and has two axes, and its moments take at most LAYER_BYTES.
    """
    return is_weighted(node) and moments_bytes(node) <= LAYER_BYTES


def is_weighted(node: ir.Node) -> bool:
    """Tell whether a node is a layer of any size."""
    if node.domain or node.op_type not in ("Conv", "Gemm", "MatMul"):
        return False
    x, weight = node.inputs[:2]
    array = constant(weight)
    if x is None or weight is None or array is None or constant(x) is not None:
        return False
    # an empty weight has no moments, and a factor of 0 hides whatever the weight is
    hidden = node.attributes.get_float("alpha", 1.0) == 0
    if weight.dtype not in _FLOATS or not array.size or hidden:
        return False
    return array.ndim >= 3 if node.op_type == "Conv" else array.ndim == 2


def moments_bytes(node: ir.Node) -> int:
    """Return the bytes that the moments of a layer take."""
    groups, columns = _extents(node)
    return 8 * groups * (columns + 1) ** 2


def patches(node: ir.Node, x: Array, limit: int | None = None) -> Array:
    """Return what a layer multiplies its weights with.

    Args:
        node: for which `is_layer` holds.
        x: its input for one sample: `[batch, channels, …]` for a Conv with any number of spatial
            axes, `[m, k]` for a Gemm (`[k, m]` with transA), `[…, k]` for a MatMul.
        limit: look only at this many positions, those of `spread`; None takes all.

    Returns:
        float32 `[groups, positions, n]`. A Conv has a position for each `[batch, …]` of its output
        and `n = in/groups·kh·kw`, ordered as the weight `[out, in/groups, kh, kw]`; a depthwise
        one has as many groups as channels. Others have one group, a position for each row, `n = k`.
    """
    if node.op_type == "Conv":
        view = _windows(node, x)
    else:
        transposed = node.attributes.get_int("transA", 0)
        view = (x.T if transposed else x.reshape(-1, x.shape[-1]))[None]
    groups, columns = _extents(node)
    extents = view.shape[1 : 1 + (x.ndim - 1 if node.op_type == "Conv" else 1)]
    total = math.prod(extents)
    if limit is not None and limit < total:
        chosen = spread(total, limit)
        places: list[Any] = [slice(None), *np.unravel_index(chosen, extents)]
        view = view[tuple(places)]
        total = len(chosen)
    return np.ascontiguousarray(view, np.float32).reshape(groups, total, columns)


def with_ones(found: Array) -> Array:
    """Append the 1 that a bias is multiplied with to patches: `[groups, positions, n+1]`."""
    return np.concatenate([found, np.ones((*found.shape[:2], 1), found.dtype)], axis=2)


def spread(total: int, limit: int) -> Array:
    """Choose at most `limit` of `total` positions, evenly, in order, always the same.

    One lies in each of `limit` equal stretches. Steps of the golden ratio move it within its
    stretch, so that the positions of an image do not fall into a few of its columns.
    """
    if total <= limit:
        return np.arange(total)
    steps = np.arange(limit)
    inside = steps * ((math.sqrt(5) - 1) / 2) % 1.0
    return np.unique(((steps + inside) * (total / limit)).astype(np.int64))


def input_moments(
    pass_name: str,
    model: ir.Model,
    layers: Sequence[ir.Node],
    samples: Samples,
    context: Context,
) -> Iterator[tuple[ir.Node, Moments]]:
    """Measure the moments of layers, a few layers at a time to bound memory.

    Args:
        pass_name: for refusals.
        model: holds the layers; it runs in onnxruntime unoptimised.
        layers: nodes for which `is_layer` holds.
        samples: all are run, once for every batch of layers.
        context: for its progress.

    Yields:
        Every layer with its moments, over at most POSITIONS positions of each sample. Layers come
        in the given order.

    Raises:
        PassRefused: there are no samples, the model cannot be run on them, or a value is NaN or
            infinite.
    """
    shapes = input_shapes(pass_name, model)
    _demand_fit(pass_name, samples, shapes)
    batches = list(_batches(layers))
    done = 0
    for batch in batches:
        values = list(dict.fromkeys(x for node in batch if (x := node.inputs[0]) is not None))
        tap = open_taps(pass_name, model, values)
        sums = {node: _Sum(node) for node in batch}
        for index, feed in enumerate(samples.feeds(shapes)):
            found = tap(feed, index)
            for node in batch:
                sums[node].add(patches(node, found[_input_name(node)], POSITIONS))
            done += 1
            context.progress("measure moments", done, len(batches) * len(samples))
        for node in batch:
            yield node, sums.pop(node).moments()


class _Sum:
    """`Σ [p;1][p;1]ᵀ` of a layer in float64: a mean that is taken out later leaves few digits."""

    def __init__(self, node: ir.Node) -> None:
        groups, columns = _extents(node)
        self._second = np.zeros((groups, columns + 1, columns + 1))
        self._waiting: list[Array] = []
        self._count = 0

    def add(self, found: Array) -> None:
        """Add patches `[groups, positions, n]`."""
        self._waiting.append(found)
        self._count += found.shape[1]
        if sum(array.nbytes for array in self._waiting) >= PATCH_BYTES:
            self._multiply()

    def moments(self) -> Moments:
        """Return the mean."""
        self._multiply()
        self._second /= self._count
        return Moments(self._second, self._count)

    def _multiply(self) -> None:
        if self._waiting:
            read = with_ones(np.concatenate(self._waiting, axis=1)).astype(np.float64)
            self._second += read.swapaxes(1, 2) @ read
            self._waiting.clear()


def _demand_fit(pass_name: str, samples: Samples, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse samples that are not what the model reads."""
    if not len(samples):
        raise PassRefused(pass_name, "samples", "there are none; give some with --calib.")
    for name, shape in shapes.items():
        array = samples.inputs.get(name)
        if array is None:
            known = ", ".join(samples.inputs)
            why = f"{samples.source} has none for this input, only for {known}; add it."
            raise PassRefused(pass_name, f"input {name!r}", why)
        if array[0].size != math.prod(shape):
            why = (
                f"a sample in {samples.source} is {list(array.shape[1:])}, the model reads "
                f"{list(shape)}; make them fit."
            )
            raise PassRefused(pass_name, f"input {name!r}", why)


def _batches(layers: Sequence[ir.Node]) -> Iterator[list[ir.Node]]:
    """Split layers so that neither the moments nor the inputs of a batch take too much memory."""
    batch: list[ir.Node] = []
    moments = tapped = 0
    for node in layers:
        more, value = moments_bytes(node), node.inputs[0]
        assert value is not None
        read = size_bytes(value)
        if batch and (moments + more > BATCH_BYTES or tapped + read > TAPPED_BYTES):
            yield batch
            batch, moments, tapped = [], 0, 0
        batch.append(node)
        moments, tapped = moments + more, tapped + read
    if batch:
        yield batch


def _extents(node: ir.Node) -> tuple[int, int]:
    """Return groups and n, the weights of one output."""
    weight = constant(node.inputs[1])
    assert weight is not None
    if node.op_type == "Conv":
        return node.attributes.get_int("group", 1), math.prod(weight.shape[1:])
    return 1, weight.shape[1 if node.attributes.get_int("transB", 0) else 0]


def _input_name(node: ir.Node) -> str:
    value = node.inputs[0]
    assert value is not None
    return value.name or ""


def _windows(node: ir.Node, x: Array) -> Array:
    """View an input as `[groups, batch, *positions, channels/groups, *kernel]`."""
    weight = constant(node.inputs[1])
    assert weight is not None
    kernel, rank = weight.shape[2:], weight.ndim - 2
    strides = node.attributes.get_ints("strides", [1] * rank)
    dilations = node.attributes.get_ints("dilations", [1] * rank)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    pads = _pads(node, x.shape[2:], reach, strides)
    padded = np.pad(x, [(0, 0), (0, 0), *pads])
    axes = tuple(range(2, 2 + rank))
    view = np.lib.stride_tricks.sliding_window_view(padded, reach, axes)
    steps = [slice(None, None, step) for step in (*strides, *dilations)]
    view = view[:, :, *steps]
    groups = node.attributes.get_int("group", 1)
    # splitting the channels before all else is a view: no window is copied yet
    view = view.reshape(view.shape[0], groups, -1, *view.shape[2:])
    return view.transpose(1, 0, *range(3, 3 + rank), 2, *range(3 + rank, 3 + 2 * rank))


def _pads(
    node: ir.Node, sizes: Sequence[int], reach: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """Return the zeros before and after each spatial axis."""
    automatic = node.attributes.get_string("auto_pad", "NOTSET")
    rank = len(sizes)
    if automatic == "NOTSET":
        pads = node.attributes.get_ints("pads", [0] * (2 * rank))
        return list(zip(pads[:rank], pads[rank:], strict=True))
    if automatic == "VALID":
        return [(0, 0)] * rank
    totals = [
        max((math.ceil(size / s) - 1) * s + r - size, 0)
        for size, r, s in zip(sizes, reach, strides, strict=True)
    ]
    halves = [(total // 2, total - total // 2) for total in totals]
    return halves if automatic == "SAME_UPPER" else [(after, before) for before, after in halves]
