"""Rules for operators that move elements: by reshapes, gathers and constant tables."""

from __future__ import annotations

import math

import numpy as np
import onnx

from edgepress.targets.lowering.rewriting import Rewriting, attributes_of

_BOUNDED = "bounded_"


def _cast_like(graph: Rewriting, node: onnx.NodeProto) -> bool:
    """A Cast, because the other's type is known."""
    graph.cast(node.input[0], graph.dtype(node.input[1]), node.output[0])
    return True


def _space_to_depth(graph: Rewriting, node: onnx.NodeProto) -> bool:
    """Reshape, Transpose, Reshape."""
    block = attributes_of(node)["blocksize"]
    n, c, h, w = graph.shape(node.input[0])
    blocks = graph.reshape(node.input[0], [n, c, h // block, block, w // block, block])
    depth_first = attributes_of(node).get("mode", "DCR") == "DCR"
    order = [0, 3, 5, 1, 2, 4] if depth_first else [0, 1, 3, 5, 2, 4]
    moved = graph.emit("Transpose", blocks, perm=order)
    graph.reshape(moved, [n, c * block**2, h // block, w // block], node.output[0])
    return True


def _depth_to_space(graph: Rewriting, node: onnx.NodeProto) -> bool:
    """Reshape, Transpose, Reshape, in the order of channels that `mode` says."""
    attributes = attributes_of(node)
    block = attributes["blocksize"]
    n, c, h, w = graph.shape(node.input[0])
    inner = c // block**2
    if attributes.get("mode", "DCR") == "DCR":
        shape, order = [n, block, block, inner, h, w], [0, 3, 4, 1, 5, 2]
    else:
        shape, order = [n, inner, block, block, h, w], [0, 1, 4, 2, 5, 3]
    moved = graph.emit("Transpose", graph.reshape(node.input[0], shape), perm=order)
    graph.reshape(moved, [n, inner, h * block, w * block], node.output[0])
    return True


def _one_hot(graph: Rewriting, node: onnx.NodeProto) -> bool:
    """Where the index equals a position, the second value."""
    indices, depth, values = node.input
    size = graph.constant(depth)
    if size is None:
        return False
    shape = graph.shape(indices)
    axis = attributes_of(node).get("axis", -1) % (len(shape) + 1)
    count = int(size.item())
    positions = np.arange(count).reshape([-1] + [1] * (len(shape) - axis))
    column = graph.reshape(graph.cast(indices, np.int64), [*shape[:axis], 1, *shape[axis:]])
    negative = graph.emit("Less", column, graph.add_constant(0, np.int64))
    wrapped = graph.emit("Add", column, graph.add_constant(count, np.int64))
    place = graph.emit("Where", negative, wrapped, column)
    hot = graph.emit("Equal", place, graph.add_constant(positions, np.int64))
    off, on = (
        graph.emit("Gather", values, graph.add_constant(i, np.int64), axis=0) for i in (0, 1)
    )
    graph.emit("Where", hot, on, off, output=node.output[0])
    return True


def _reverse_sequence(graph: Rewriting, node: onnx.NodeProto) -> bool:
    """A gather of every element from a known place."""
    lengths = graph.constant(node.input[1])
    if lengths is None:
        return False
    attributes = attributes_of(node)
    shape = graph.shape(node.input[0])
    time, batch = attributes.get("time_axis", 0), attributes.get("batch_axis", 1)
    places = np.broadcast_to(np.arange(shape[time])[:, None], (shape[time], shape[batch]))
    places = np.where(places < lengths[None, :], lengths[None, :] - 1 - places, places)
    if batch < time:
        places = places.T
    wide = [shape[axis] if axis in (time, batch) else 1 for axis in range(len(shape))]
    index = np.broadcast_to(places.reshape(wide), shape)
    graph.emit(
        "GatherElements",
        node.input[0],
        graph.add_constant(np.ascontiguousarray(index), np.int64),
        output=node.output[0],
        axis=time,
    )
    return True


def _compress(graph: Rewriting, node: onnx.NodeProto) -> bool:
    """A gather, where the condition is known."""
    condition = graph.constant(node.input[1])
    if condition is None:
        return False
    axis = attributes_of(node).get("axis")
    source = node.input[0]
    if axis is None:
        source, axis = graph.reshape(source, [-1]), 0
    kept = graph.add_constant(np.flatnonzero(condition), np.int64)
    graph.emit("Gather", source, kept, output=node.output[0], axis=axis)
    return True


def _eye_like(graph: Rewriting, node: onnx.NodeProto) -> bool:
    """A constant."""
    attributes = attributes_of(node)
    rows, columns = graph.shape(node.input[0])
    kind = attributes.get("dtype")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind) if kind else graph.dtype(node.input[0])
    eye = graph.add_constant(np.eye(rows, columns, attributes.get("k", 0)), dtype)
    graph.emit("Identity", eye, output=node.output[0])
    return True


def _split(graph: Rewriting, node: onnx.NodeProto) -> bool:
    """Slices, where a piece is empty."""
    axis = attributes_of(node).get("axis", 0)
    sizes = [graph.shape(name)[axis] for name in node.output]
    if 0 not in sizes:
        return False
    ends = np.cumsum(sizes)
    for name, size, end in zip(node.output, sizes, ends, strict=True):
        bounds = (graph.add_constant([i], np.int64) for i in (end - size, end, axis))
        graph.emit("Slice", node.input[0], *bounds, output=name)
    return True


def _dropout(graph: Rewriting, node: onnx.NodeProto) -> bool:
    """Nothing happens outside training; the mask is all true."""
    graph.emit("Identity", node.input[0], output=node.output[0])
    if len(node.output) > 1 and node.output[1]:
        mask = graph.add_constant(np.ones(graph.shape(node.input[0])), np.bool_)
        graph.emit("Identity", mask, output=node.output[1])
    return True


def _col_to_im(graph: Rewriting, node: onnx.NodeProto) -> bool:
    """A ConvTranspose that puts every element of a column at its place of the block."""
    image, block = graph.constant(node.input[1]), graph.constant(node.input[2])
    if image is None or block is None:
        return False
    attributes = attributes_of(node)
    rank = len(image)
    dilations = attributes.get("dilations", [1] * rank)
    strides = attributes.get("strides", [1] * rank)
    pads = attributes.get("pads", [0] * 2 * rank)
    n, columns, _ = graph.shape(node.input[0])
    size = math.prod(map(int, block))
    steps = [
        (int(image[i]) + pads[i] + pads[rank + i] - dilations[i] * (int(block[i]) - 1) - 1)
        // strides[i]
        + 1
        for i in range(rank)
    ]
    covered = [
        (steps[i] - 1) * strides[i] + dilations[i] * (int(block[i]) - 1) + 1 for i in range(rank)
    ]
    missing = [int(image[i]) + pads[i] + pads[rank + i] - covered[i] for i in range(rank)]
    places = np.eye(size).reshape(size, 1, *map(int, block))
    channels = columns // size
    graph_in = graph.reshape(node.input[0], [n * channels, size, *steps])
    spread = graph.emit(
        "ConvTranspose",
        graph_in,
        graph.add_constant(places, np.float32),
        dilations=dilations,
        strides=strides,
    )
    whole = spread
    if any(missing):
        after = [0, 0] + [0] * rank + [0, 0] + missing
        whole = graph.emit("Pad", spread, graph.add_constant(after, np.int64))
    starts, ends = pads[:rank], [pads[i] + int(image[i]) for i in range(rank)]
    cut = graph.emit(
        "Slice",
        whole,
        graph.add_constant(starts, np.int64),
        graph.add_constant(ends, np.int64),
        graph.add_constant(np.arange(2, 2 + rank), np.int64),
    )
    graph.reshape(cut, [n, channels, *map(int, image)], node.output[0])
    return True


def _conv_transpose(graph: Rewriting, node: onnx.NodeProto) -> bool:
    """Explicit pads, computed from what the operator asks for."""
    attributes = attributes_of(node)
    automatic = attributes.pop("auto_pad", "NOTSET")
    wanted = attributes.pop("output_shape", None)
    if wanted is None and automatic in ("NOTSET", "VALID"):
        return False
    sizes = graph.shape(node.input[0])[2:]
    rank = len(sizes)
    kernel = attributes.get("kernel_shape") or graph.shape(node.input[1])[2:]
    strides = attributes.get("strides", [1] * rank)
    dilations = attributes.get("dilations", [1] * rank)
    extra = list(attributes.get("output_padding", [0] * rank))
    if wanted is None:
        wanted = [size * stride for size, stride in zip(sizes, strides, strict=True)]
    begins, ends = [], []
    for i in range(rank):
        full = strides[i] * (sizes[i] - 1) + (kernel[i] - 1) * dilations[i] + 1
        total = full + extra[i] - list(wanted)[-rank:][i]
        if total < 0:
            extra[i], total = extra[i] - total, 0
        small, large = total // 2, total - total // 2
        begins.append(large if automatic == "SAME_LOWER" else small)
        ends.append(small if automatic == "SAME_LOWER" else large)
    attributes |= {"pads": [*begins, *ends], "output_padding": extra}
    graph.emit("ConvTranspose", *node.input, output=node.output[0], **attributes)
    return True


def _bounded(node: onnx.NodeProto, bounds: tuple[int, ...], graph: Rewriting, place: int) -> bool:
    """Keep indices that only the data decides inside the tensor, whatever the data is."""
    indices = node.input[place]
    if graph.constant(indices) is not None or node.name.startswith(_BOUNDED):
        return False
    dtype = graph.dtype(indices)
    sizes = np.squeeze(np.array(bounds))
    count, last = graph.add_constant(sizes, dtype), graph.add_constant(sizes - 1, dtype)
    zero = graph.add_constant(0, dtype)
    from_end = graph.emit("Add", indices, count)
    wrapped = graph.emit("Where", graph.emit("Less", indices, zero), from_end, indices)
    inside = graph.emit("Min", graph.emit("Max", wrapped, zero), last)
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[place] = inside
    copy.name = graph.fresh(_BOUNDED + node.name)
    graph.add_node(copy)
    return True


def _bounded_along_axis(graph: Rewriting, node: onnx.NodeProto) -> bool:
    """Bounds for Gather, GatherElements and ScatterElements."""
    shape = graph.shape(node.input[0])
    axis = attributes_of(node).get("axis", 0)
    return _bounded(node, (shape[axis],), graph, 1)


def _bounded_tuples(graph: Rewriting, node: onnx.NodeProto) -> bool:
    """Bounds for GatherND and ScatterND, whose last axis holds one index per axis."""
    first = attributes_of(node).get("batch_dims", 0)
    width = graph.shape(node.input[1])[-1]
    return _bounded(node, graph.shape(node.input[0])[first : first + width], graph, 1)


def _bounded_batch(graph: Rewriting, node: onnx.NodeProto) -> bool:
    """Bounds for the image that a region of interest lies in."""
    return _bounded(node, graph.shape(node.input[0])[:1], graph, 2)


RULES = {
    "CastLike": _cast_like,
    "Col2Im": _col_to_im,
    "Compress": _compress,
    "ConvTranspose": _conv_transpose,
    "DepthToSpace": _depth_to_space,
    "Dropout": _dropout,
    "EyeLike": _eye_like,
    "Gather": _bounded_along_axis,
    "GatherElements": _bounded_along_axis,
    "GatherND": _bounded_tuples,
    "OneHot": _one_hot,
    "ReverseSequence": _reverse_sequence,
    "RoiAlign": _bounded_batch,
    "ScatterElements": _bounded_along_axis,
    "ScatterND": _bounded_tuples,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
}
