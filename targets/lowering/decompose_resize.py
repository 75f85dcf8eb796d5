"""Resize → gathers and weighted sums, one axis after another.

Every mode of Resize is separable: along an axis, each output element is a weighted sum of a few
input elements at places that only the shapes decide. Coordinates and weights follow the operator's
definition, antialiasing included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from edgepress.targets.lowering.rewriting import Rewriting, UnknownValue, attributes_of
from edgepress.targets.program import Array


@dataclass(frozen=True)
class Axis:
    """How one axis is resized: from `before` to `after` elements, by `scale`."""

    before: int
    after: int
    scale: float
    start: float  # of the region of interest, as a part of the axis
    end: float


def axes_of(
    shape: Sequence[int],
    attributes: Mapping[str, Any],
    roi: Array | None,
    scales: Array | None,
    sizes: Array | None,
) -> dict[int, Axis] | None:
    """Work out what a Resize does to each axis; None where the inputs that say so are not known."""
    axes = [axis % len(shape) for axis in attributes.get("axes", range(len(shape)))]
    if sizes is not None:
        factors = [size / shape[axis] for size, axis in zip(sizes, axes, strict=True)]
        policy = attributes.get("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            same = min(factors) if policy == "not_larger" else max(factors)
            factors = [same] * len(axes)
            sizes = np.array([math.floor(same * shape[axis] + 0.5) for axis in axes])
    elif scales is not None:
        factors = [float(scale) for scale in scales]
        sizes = np.array([math.floor(shape[a] * f) for a, f in zip(axes, factors, strict=True)])
    else:
        return None
    region = [0.0] * len(axes) + [1.0] * len(axes)
    if attributes.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        if roi is None:
            return None
        region = [float(value) for value in roi]
    return {
        axis: Axis(shape[axis], int(size), factor, region[i], region[len(axes) + i])
        for i, (axis, size, factor) in enumerate(zip(axes, sizes, factors, strict=True))
    }


def _known(graph: Rewriting, node: onnx.NodeProto, place: int) -> Array | None:
    if len(node.input) <= place or not node.input[place]:
        return None
    array = graph.constant(node.input[place])
    return array if array is not None and array.size else None


def taps(axis: Axis, attributes: Mapping[str, Any]) -> tuple[Array, Array, Array]:
    """Find what each output element is made of.

    Returns:
        places and weights, `[after, taps]` each, and whether the element lies outside the region
        of interest, `[after]`.
    """
    x = _coordinates(axis, attributes.get("coordinate_transformation_mode", "half_pixel"))
    left = np.ceil(x) - 1  # a whole coordinate counts as the right neighbour of the one before
    ratio = x - left
    mode = attributes.get("mode", "nearest")
    if mode == "nearest":
        rounding = attributes.get("nearest_mode", "round_prefer_floor")
        offsets, weights = np.array([0, 1]), _nearest(ratio, rounding)
    else:
        shrink = min(axis.scale, 1.0) if attributes.get("antialias", 0) else 1.0
        reach = 1 if mode == "linear" else 2
        first = math.floor(-reach / shrink) + 1
        offsets = np.arange(first, 2 - first)
        distance = np.abs((offsets[None, :] - ratio[:, None]) * shrink)
        bend = attributes.get("cubic_coeff_a", -0.75)
        weights = 1 - distance if mode == "linear" else _cubic(distance, bend)
        weights = np.where(distance < reach, weights, 0)
        weights /= weights.sum(axis=1, keepdims=True)
    places = (left[:, None] + offsets[None, :]).astype(np.int64)
    outside = (places < 0) | (places >= axis.before)
    if attributes.get("exclude_outside", 0):
        weights = np.where(outside, 0, weights)
        weights /= weights.sum(axis=1, keepdims=True)
    beyond = (x < 0) | (x > axis.before - 1)
    return np.clip(places, 0, axis.before - 1), weights, beyond


def _coordinates(axis: Axis, mode: str) -> Array:
    """Where the centres of the output elements lie in the input. Raises ValueError."""
    y = np.arange(axis.after, dtype=np.float64)
    length = axis.scale * axis.before
    last = axis.before - 1
    match mode:
        case "half_pixel":
            return (y + 0.5) / axis.scale - 0.5
        case "pytorch_half_pixel":
            return (y + 0.5) / axis.scale - 0.5 if length != 1 else np.full_like(y, -0.5)
        case "half_pixel_symmetric":
            margin = axis.before / 2 * (1 - axis.after / length)
            return margin + (y + 0.5) / axis.scale - 0.5
        case "align_corners":
            return y * last / (length - 1) if length != 1 else np.zeros_like(y)
        case "asymmetric":
            return y / axis.scale
        case "tf_crop_and_resize":
            step = (axis.end - axis.start) * last / (length - 1 if length != 1 else 2)
            return axis.start * last + (y if length != 1 else 1) * step + 0 * y
    raise ValueError(f"the coordinate_transformation_mode {mode!r} is unknown")


def _nearest(ratio: Array, rounding: str) -> Array:
    whole = ratio == 1
    match rounding:
        case "round_prefer_floor":
            right = ratio > 0.5
        case "round_prefer_ceil":
            right = ratio >= 0.5
        case "floor":
            right = whole
        case "ceil":
            right = np.ones_like(whole)
        case _:
            raise ValueError(f"the nearest_mode {rounding!r} is unknown")
    right = right | whole
    return np.stack([~right, right], axis=1).astype(np.float64)


def _cubic(distance: Array, a: float) -> Array:
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return np.where(distance <= 1, near, far)


def _resize(graph: Rewriting, node: onnx.NodeProto) -> bool:
    attributes = attributes_of(node)
    inputs = (_known(graph, node, place) for place in (1, 2, 3))
    axes = axes_of(graph.shape(node.input[0]), attributes, *inputs)
    dtype = graph.dtype(node.input[0])
    if axes is None or (dtype.kind != "f" and attributes.get("mode", "nearest") != "nearest"):
        return False
    rank = len(graph.shape(node.input[0]))
    crops = attributes.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    value, outside = node.input[0], np.zeros([1] * rank, np.bool_)
    for place, axis in axes.items():
        places, weights, beyond = taps(axis, attributes)
        wide = [-1 if i == place else 1 for i in range(rank)]
        value = _weighted_sum(graph, value, place, places, weights, wide, dtype)
        if crops:
            outside = outside | beyond.reshape(wide)
    if outside.any():
        filler = graph.add_constant(attributes.get("extrapolation_value", 0.0), dtype)
        value = graph.emit("Where", graph.add_constant(outside), filler, value)
    graph.emit("Identity", value, output=node.output[0])
    return True


def _weighted_sum(
    graph: Rewriting,
    x: str,
    axis: int,
    places: Array,
    weights: Array,
    wide: list[int],
    dtype: Any,
) -> str:
    """Add what combines the elements of one axis."""
    if (np.sort(weights, axis=1)[:, :-1] == 0).all():  # one element each, of weight 1
        chosen = np.take_along_axis(places, weights.argmax(axis=1)[:, None], 1)[:, 0]
        if np.array_equal(chosen, np.arange(chosen.size)) and chosen.size == _size(graph, x, axis):
            return x
        return graph.emit("Gather", x, graph.add_constant(chosen, np.int64), axis=axis)
    total = ""
    for tap in range(places.shape[1]):
        picked = graph.emit("Gather", x, graph.add_constant(places[:, tap], np.int64), axis=axis)
        factor = graph.add_constant(weights[:, tap].reshape(wide), dtype)
        term = graph.emit("Mul", picked, factor)
        total = graph.emit("Add", total, term) if total else term
    return total


def _size(graph: Rewriting, x: str, axis: int) -> int | None:
    """Size of an axis; None for a value that was only just added."""
    try:
        return graph.shape(x)[axis]
    except UnknownValue:
        return None


RULES = {"Resize": _resize}
