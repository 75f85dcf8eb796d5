"""A transposed convolution becomes dense convolutions, one for each phase of its strides.

Outputs whose row and column leave the same rest when divided by the strides are the outputs of an
ordinary convolution with some of the weights: no zeros are put between inputs and multiplied
(Shi et al., "Is the deconvolution layer the same as a convolutional layer?", arXiv:1609.07009,
section 3). An `Interlace` node puts the phases together. Where outputs have few channels, the
phases of one row are channels of one convolution instead, if that leaves fewer vectors to multiply.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepress.targets.isa.base import Isa
from edgepress.targets.lowering.dialect import DOMAIN, array_of, dtype_of, shape_of
from edgepress.targets.lowering.floats import clamped_by
from edgepress.targets.program import Array


@dataclass(frozen=True)
class Phase:
    """One axis of the convolution that gives every `stride`-th output.

    Attributes:
        count: how many outputs.
        first: input that the first tap of the first output reads; at most 0.
        step: inputs from one tap to the next.
        taps: places in the transposed window, None where the weight is zero.
    """

    count: int
    first: int
    step: int
    taps: tuple[int | None, ...]

    @property
    def last(self) -> int:
        """Input that the last tap of the first output reads."""
        return self.first + (len(self.taps) - 1) * self.step


def phases(out: int, kernel: int, stride: int, dilation: int, pad: int) -> list[Phase]:
    """Split one axis; output o of a transposed convolution sums `x[i] w[k]`, `s i + d k = o + pad`.

    >>> phases(8, 4, 2, 1, 1)  # doctest: +NORMALIZE_WHITESPACE
    [Phase(count=4, first=-1, step=1, taps=(3, 1)), Phase(count=4, first=0, step=1, taps=(2, 0))]
    """
    step = dilation // math.gcd(dilation, stride)
    found = []
    for rest in range(min(stride, out)):
        reads = [
            ((rest + pad - dilation * k) // stride, k)
            for k in range(kernel)
            if (rest + pad - dilation * k) % stride == 0
        ]
        reads.sort()
        first = reads[0][0] if reads else 0
        missing = max(0, -(-first // step))  # a window starts at the image or before it
        taps = (*[None] * missing, *(k for _, k in reads)) or (None,)
        found.append(Phase(-(-(out - rest) // stride), first - missing * step, step, taps))
    return found


def joined(parts: list[Phase]) -> list[Phase]:
    """Give phases the same window, so that one convolution can compute them all."""
    first, last = min(part.first for part in parts), max(part.last for part in parts)
    same = []
    for part in parts:
        taps: list[int | None] = [None] * (last - first + 1)
        taps[part.first - first : part.last - first + 1 : part.step] = part.taps
        same.append(Phase(parts[0].count, first, 1, tuple(taps)))
    return same


def split_transposed(model: ir.Model, isa: Isa) -> ir.Model:
    """Replace float transposed convolutions of images. Changes the model and returns it."""
    for node in list(model.graph):
        if node.domain == "" and node.op_type == "ConvTranspose":
            _split(node, isa, model.graph)
    return model


def _split(node: ir.Node, isa: Isa, graph: ir.Graph) -> None:
    x, y = node.inputs[0], node.outputs[0]
    weights, given = array_of(node.inputs[1]), (*node.inputs, None)[2]
    bias = array_of(given)
    assert x is not None
    if weights is None or (given is not None and bias is None):
        return
    if dtype_of(x) != "float32" or len(shape_of(x)) != 4 or math.prod(shape_of(y)) == 0:
        return
    strides = node.attributes.get_ints("strides", [1, 1])
    dilations = node.attributes.get_ints("dilations", [1, 1])
    pads = node.attributes.get_ints("pads", [0, 0, 0, 0])
    groups = node.attributes.get_int("group", 1)
    batch, channels, *sizes = shape_of(y)
    rows, columns = (
        phases(sizes[i], weights.shape[2 + i], strides[i], dilations[i], pads[i]) for i in (0, 1)
    )
    bias = np.zeros(channels, np.float32) if bias is None else bias
    last, followers, bounds = clamped_by(node)
    output = last.outputs[0]
    join = len(columns) if groups == 1 and _worth_joining(columns, channels, isa) else 1
    made: list[ir.Node] = []

    def convolution(row: Phase, parts: list[Phase], name: str, shape: tuple[int, ...]) -> ir.Value:
        dense = np.concatenate([_weights_of(weights, groups, row, part) for part in parts])
        reads = list(shape_of(x)[2:])
        attributes: dict[str, Any] = {
            "kernel": list(dense.shape[2:]),
            "strides": [1, 1],
            "dilations": [row.step, parts[0].step],
            "pads": [-row.first, -parts[0].first]
            + [
                max(0, part.count + part.last - size)
                for part, size in zip((row, parts[0]), reads, strict=True)
            ],
            "group": groups,
            **bounds,
        }
        constants = [
            _constant(f"{name}_weights", dense, graph),
            _constant(f"{name}_bias", np.tile(bias, len(parts)), graph),
        ]
        return _node("Conv", [x, *constants], attributes, name, shape, made)

    stem = output.name or "transposed"
    pieces = []
    for i, row in enumerate(rows):
        groups_of_columns = [joined(columns)] if join > 1 else [[column] for column in columns]
        for j, parts in enumerate(groups_of_columns):
            shape = (batch, channels * len(parts), row.count, parts[0].count)
            pieces.append(convolution(row, parts, f"{stem}_phase_{i}_{j}", shape))
    if len(pieces) > 1 or join > 1:
        across = 1 if join > 1 else len(columns)
        attributes = {"strides": [len(rows), across], "joined": join}
        result = _node("Interlace", pieces, attributes, stem, shape_of(y), made)
    else:
        result = pieces[0]
    result.name = output.name
    made[0].name = node.name
    ir.convenience.replace_nodes_and_values(
        graph, node, [node, *followers], made, [output], [result]
    )


def _worth_joining(columns: list[Phase], channels: int, isa: Isa) -> bool:
    """Tell whether one convolution for all columns multiplies fewer vectors than one for each."""
    apart = sum(len(column.taps) for column in columns) * -(-channels // isa.lanes)
    together = len(joined(columns)[0].taps) * -(-channels * len(columns) // isa.lanes)
    return len(columns) > 1 and together <= apart


def _weights_of(weights: Array, groups: int, row: Phase, column: Phase) -> Array:
    """Return `[out, in / groups, taps, taps]` of weights `[in, out / groups, kh, kw]`."""
    inputs, outputs = weights.shape[:2]
    grouped = weights.reshape(groups, inputs // groups, outputs, *weights.shape[2:])
    turned = grouped.transpose(0, 2, 1, 3, 4).reshape(groups * outputs, -1, *weights.shape[2:])
    dense = np.zeros((*turned.shape[:2], len(row.taps), len(column.taps)), weights.dtype)
    for i, k in enumerate(row.taps):
        for j, m in enumerate(column.taps):
            if k is not None and m is not None:
                dense[:, :, i, j] = turned[:, :, k, m]
    return dense


def _constant(name: str, array: Array, graph: ir.Graph) -> ir.Value:
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.Tensor(np.ascontiguousarray(array), name=name),
    )
    graph.register_initializer(value)
    return value


def _node(
    op_type: str,
    inputs: list[Any],
    attributes: dict[str, Any],
    name: str,
    shape: tuple[int, ...],
    made: list[ir.Node],
) -> ir.Value:
    output = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    made.append(
        ir.Node(
            DOMAIN,
            op_type,
            inputs,
            ir.convenience.convert_attributes(attributes),
            outputs=[output],
            name=name,
        )
    )
    return output
