"""Gradients of operators that reduce along axes, or move elements without computing new ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgepress.passes._gradient_tape import NoGradient, Tape, fixed, given
from edgepress.passes._shapes import shape_of

#: Attributes of Resize that say along which axes and how far, not how.
_RESIZE_EXTENTS = ("axes", "keep_aspect_ratio_policy")


def reduce_sum(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    """Every element has the gradient of the sum that it went into."""
    _, kept = _reduction(node)
    return [t.op("Expand", t.reshape(dy, kept), t.ints(shape_of(node.inputs[0])))]


def reduce_mean(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    """As for a sum, over the number of elements."""
    axes, _ = _reduction(node)
    count = math.prod(shape_of(node.inputs[0])[axis] for axis in axes)
    return reduce_sum(t, node, t.op("Div", dy, count))


def reduce_l2(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    """For y = √(Σ x²), dx = x dy / y."""
    _, kept = _reduction(node)
    return [t.op("Mul", given(node.inputs[0]), t.reshape(t.op("Div", dy, node.outputs[0]), kept))]


def reduce_extreme(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    """The maximum or minimum has the gradient; several equal ones share it."""
    x, (axes, kept) = given(node.inputs[0]), _reduction(node)
    chosen = t.op("Equal", x, t.reshape(node.outputs[0], kept))
    ones = t.op("Cast", chosen, to=given(x.dtype).value)
    return [t.op("Mul", ones, t.op("Div", t.reshape(dy, kept), t.total(ones, axes)))]


def _reduction(node: ir.Node) -> tuple[list[int], list[int]]:
    """Return the axes that are reduced, and the result's shape if they stay with extent 1."""
    shape = shape_of(node.inputs[0])
    if node.op_type.startswith("Global"):
        axes = list(range(2, len(shape)))
    else:
        array = fixed(node, 1)
        axes = list(node.attributes.get_ints("axes", ()) if array is None else array.tolist())
        if not axes and not node.attributes.get_int("noop_with_empty_axes", 0):
            axes = list(range(len(shape)))
    axes = [axis % len(shape) for axis in axes]
    return axes, [1 if axis in axes else extent for axis, extent in enumerate(shape)]


def reshape(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    """Return to the shape before: for Reshape, Flatten, Squeeze and Unsqueeze."""
    return [t.reshape(dy, shape_of(node.inputs[0]))]


def transpose(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    """Transpose back."""
    reverse = range(len(shape_of(node.inputs[0])))[::-1]
    order = node.attributes.get_ints("perm", tuple(reverse))
    return [t.op("Transpose", dy, perm=np.argsort(order).tolist())]


def depth_to_space(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    """Put blocks of pixels back into channels, which come before or after the pixels in a block."""
    n, channels, height, width = shape_of(node.inputs[0])
    block = node.attributes["blocksize"].as_int()
    split = t.reshape(dy, (n, channels // block**2, height, block, width, block))
    before = node.attributes.get_string("mode", "DCR") == "CRD"
    blocks = t.op("Transpose", split, perm=[0, 1, 3, 5, 2, 4] if before else [0, 3, 5, 1, 2, 4])
    return [t.reshape(blocks, (n, channels, height, width))]


def space_to_depth(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    """DepthToSpace, as it is by default, undoes it."""
    return [t.op("DepthToSpace", dy, blocksize=node.attributes["blocksize"].as_int())]


def concat(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    """Give every input its part."""
    axis = node.attributes["axis"].as_int()
    return t.split(dy, [shape_of(value)[axis] for value in node.inputs], axis)


def split(t: Tape, node: ir.Node, *dy: ir.Value) -> list[ir.Value]:
    """Put the parts together."""
    return [t.op("Concat", *dy, axis=node.attributes.get_int("axis", 0))]


def moved(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    """Add up what went from one place to several: for Gather, Slice and Tile.

    The operator tells what went where: it is applied to the places of all elements.
    """
    return [_returned(t, node, dy, node.inputs[1:])]


def pad(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    """Cut off constants that were added, by the opposite padding; return copies to their places."""
    _, amounts, _, axes = [*node.inputs, None, None][:4]
    if node.attributes.get_string("mode", "constant") == "constant":
        return [t.op("Pad", dy, t.op("Neg", given(amounts)), None, axes)]
    return [_returned(t, node, dy, [amounts, None, axes])]


def _returned(t: Tape, node: ir.Node, dy: ir.Value, others: Sequence[ir.Value | None]) -> ir.Value:
    shape = shape_of(node.inputs[0])
    start, limit, step = (t.ints(np.array(number)) for number in (0, math.prod(shape), 1))
    places = t.reshape(t.op("Range", start, limit, step), shape)
    moved_places = t.op(node.op_type, places, *others, **node.attributes)
    return t.add_up(dy, moved_places, shape)


def expand(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    """Sum over what was repeated."""
    return [t.unbroadcast(dy, shape_of(node.outputs[0]), shape_of(node.inputs[0]))]


def resize(t: Tape, node: ir.Node, dy: ir.Value) -> list[ir.Value]:
    """Apply the transposed interpolation, which works along one axis after the other.

    The operator tells its matrix `[after, before]` for an axis: it is applied to the columns of an
    identity matrix.
    """
    attributes = node.attributes
    if attributes.get_string("coordinate_transformation_mode", "") == "tf_crop_and_resize":
        raise NoGradient("it crops")
    if attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise NoGradient("it keeps the aspect ratio")
    how = {name: value for name, value in attributes.items() if name not in _RESIZE_EXTENTS}
    before, after = shape_of(node.inputs[0]), shape_of(node.outputs[0])
    for axis, (old, new) in enumerate(zip(before, after, strict=True)):
        scale = _scale(node, axis)
        if scale == 1 or (scale is None and old == new):
            continue
        scales = None if scale is None else t.constant([scale, 1], ir.DataType.FLOAT)
        sizes = t.ints([new, old]) if scale is None else None
        identity = t.constant(np.eye(old), given(dy.dtype))
        matrix = t.op("Resize", identity, None, scales, sizes, **how)
        # all axes before this one have their old extents again
        shape = (math.prod(before[:axis]), new, math.prod(after[axis + 1 :]))
        spread = t.op("MatMul", t.op("Transpose", matrix, perm=[1, 0]), t.reshape(dy, shape))
        dy = t.reshape(spread, (*before[: axis + 1], *after[axis + 1 :]))
    return [dy]


def _scale(node: ir.Node, axis: int) -> float | None:
    """Return how many times longer a Resize makes an axis, or None where it is told the size."""
    scales = fixed(node, 2)
    if scales is None or not scales.size:
        return None
    rank = len(shape_of(node.inputs[0]))
    axes = [a % rank for a in node.attributes.get_ints("axes", tuple(range(rank)))]
    return float(scales[axes.index(axis)]) if axis in axes else 1.0
