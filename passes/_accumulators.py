"""Keeps int32 accumulators from overflowing where activations have 16 bits.

The products of an int8 weight and an int16 activation have up to 23 bits, so that a sum over more
than a few hundred of them may leave int32. Such an activation gets coarser steps, and its values
are clamped to as many of them as every sum that reads it can hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from edgepress.passes._quantized_layer import QuantizedLayer
from edgepress.passes._shapes import static_shape

#: A sum in int32 stays below this.
ACCUMULATOR = 2**31
#: The largest int16; the least is one further from zero.
LARGEST = 2**15 - 1
_ROOM = 0.999  # a coarser scale moves the rounding of weights and bias


def reach(node: ir.Node, layer: QuantizedLayer, largest: int) -> int:
    """Return the largest magnitude that a sum can have: `Σ|w|·max|x| + |b|`, over all channels.

    Args:
        node: Conv, Gemm or MatMul.
        layer: its integers.
        largest: `max|x|`.
    """
    magnitude = np.abs(layer.weight.astype(np.int64))
    if node.op_type == "MatMul":
        sums = magnitude.sum(axis=-2 if magnitude.ndim > 1 else 0)
    else:
        transposed = node.op_type == "Conv" or node.attributes.get_int("transB", 0) == 1
        channels = 0 if transposed else 1
        sums = magnitude.sum(axis=tuple(i for i in range(magnitude.ndim) if i != channels))
    bias = 0 if layer.bias is None else np.abs(layer.bias.astype(np.int64))
    return int((sums * largest + bias).max(initial=0))


def window(node: ir.Node) -> int:
    """Return how many values an average pool sums up; 1 for another operator."""
    if node.op_type == "AveragePool":
        return math.prod(node.attributes.get_ints("kernel_shape", []))
    shape = static_shape(node.inputs[0])
    if node.op_type in ("GlobalAveragePool", "ReduceMean") and shape is not None:
        return math.prod(shape[2:])
    return 1


def fitting_limit(
    readers: Sequence[ir.Node], layer: Callable[[ir.Node, int], QuantizedLayer]
) -> int:
    """Return the largest `max|x|` of an int16 activation that no sum overflows with.

    Args:
        readers: nodes that read the activation; layers and average pools sum it up.
        layer: quantizes a Conv, Gemm or MatMul for an activation of this many steps per side.
    """
    limit = LARGEST
    while True:
        # -32768 exists where nothing clamps
        largest = limit + (limit == LARGEST)
        worst = 0
        for node in readers:
            if node.op_type in ("Conv", "Gemm", "MatMul"):
                worst = max(worst, reach(node, layer(node, limit), largest))
            else:
                worst = max(worst, largest * window(node))
        if worst < ACCUMULATOR or limit == 1:
            return limit
        limit = max(int(limit * (ACCUMULATOR / worst) * _ROOM), 1)
