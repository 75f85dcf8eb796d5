"""DFT and STFT → products with constant matrices."""

from __future__ import annotations

import numpy as np
import onnx

from edgepress.targets.lowering.rewriting import Rewriting, attributes_of
from edgepress.targets.program import Array


def _transform(bins_in: int, parts: int, length: int, inverse: bool, onesided: bool) -> Array:
    """Matrix of a DFT of `length`, from `[parts, bins_in]` to `[bins_out, parts_out]` flattened.

    `parts` is 1 for real and 2 for complex values.
    """
    used = min(bins_in, length)
    n = np.arange(used)
    if inverse and onesided:
        k = np.arange(length)
        used = min(bins_in, length // 2 + 1)
        n = np.arange(used)
        weight = np.where((n == 0) | (2 * n == length), 1.0, 2.0) / length
        angles = 2 * np.pi * np.outer(n, k) / length
        matrix = np.zeros((2, bins_in, length, 1))
        matrix[0, :used, :, 0] = np.cos(angles) * weight[:, None]
        matrix[1, :used, :, 0] = -np.sin(angles) * weight[:, None]
        return matrix[:parts].reshape(parts * bins_in, length)
    k = np.arange(length // 2 + 1 if onesided else length)
    angles = (2 if inverse else -2) * np.pi * np.outer(n, k) / length
    cosines, sines = np.cos(angles), np.sin(angles)
    matrix = np.zeros((2, bins_in, k.size, 2))
    matrix[0, :used, :, 0], matrix[0, :used, :, 1] = cosines, sines
    matrix[1, :used, :, 0], matrix[1, :used, :, 1] = -sines, cosines
    if inverse:
        matrix /= length
    return matrix[:parts].reshape(parts * bins_in, k.size * 2)


def _emit_transform(
    graph: Rewriting,
    x: str,
    shape: tuple[int, ...],
    axis: int,
    length: int,
    inverse: bool,
    onesided: bool,
    output: str,
) -> None:
    """Transform one axis of `[…, parts]`."""
    rank, bins, parts = len(shape), shape[axis], shape[-1]
    matrix = _transform(bins, parts, length, inverse, onesided)
    parts_out = 1 if inverse and onesided else 2
    rest = [i for i in range(rank - 1) if i != axis]
    last = graph.emit("Transpose", x, perm=[*rest, rank - 1, axis])
    outer = [shape[i] for i in rest]
    flat = graph.reshape(last, [*outer, parts * bins])
    product = graph.emit("MatMul", flat, graph.add_constant(matrix, np.float32))
    split = graph.reshape(product, [*outer, matrix.shape[1] // parts_out, parts_out])
    order = [*rest, axis, rank - 1]
    graph.emit("Transpose", split, output=output, perm=[order.index(i) for i in range(rank)])


def _dft(graph: Rewriting, node: onnx.NodeProto) -> bool:
    attributes = attributes_of(node)
    inverse, onesided = bool(attributes.get("inverse", 0)), bool(attributes.get("onesided", 0))
    shape = graph.shape(node.input[0])
    axis = attributes.get("axis", 1) if graph.opset < 20 else -2
    given = [graph.constant(name) if name else None for name in node.input[1:]]
    if any(name and value is None for name, value in zip(node.input[1:], given, strict=True)):
        return False
    if len(given) > 1 and given[1] is not None:
        axis = int(given[1].item())
    axis %= len(shape)
    if given and given[0] is not None:
        length = int(given[0].item())
    else:
        length = 2 * (shape[axis] - 1) if inverse and onesided else shape[axis]
    _emit_transform(graph, node.input[0], shape, axis, length, inverse, onesided, node.output[0])
    return True


def _stft(graph: Rewriting, node: onnx.NodeProto) -> bool:
    signal, step, *optional = node.input
    hop = graph.constant(step)
    window = optional[0] if optional else ""
    if hop is None:
        return False
    if len(optional) > 1 and optional[1]:
        known = graph.constant(optional[1])
        if known is None:
            return False
        length = int(known.item())
    else:
        length = graph.shape(window)[0]
    batch, samples, parts = graph.shape(signal)
    count = 1 + (samples - length) // int(hop.item())
    places = np.arange(count)[:, None] * int(hop.item()) + np.arange(length)[None, :]
    frames = graph.emit("Gather", signal, graph.add_constant(places, np.int64), axis=1)
    if window:
        frames = graph.emit("Mul", frames, graph.reshape(window, [length, 1]))
    onesided = bool(attributes_of(node).get("onesided", 1))
    shape = (batch, count, length, parts)
    _emit_transform(graph, frames, shape, 2, length, False, onesided, node.output[0])
    return True


RULES = {"DFT": _dft, "STFT": _stft}
