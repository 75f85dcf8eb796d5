"""Convolutions, matrix products and pools of a lowered graph as calls of generated kernels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepress.targets.isa.base import Isa
from edgepress.targets.lowering.assembly import Assembly
from edgepress.targets.lowering.dialect import dtype_of, shape_of
from edgepress.targets.lowering.node_attributes import (
    constant_of,
    epilogue_of,
    integer_of,
    operand_of,
    pair_of,
)
from edgepress.targets.lowering.quantization import LIMITS
from edgepress.targets.schedules import conv, depthwise, pool
from edgepress.targets.schedules.epilogue import Requantise, Shift
from edgepress.targets.schedules.stage import StageShape, stage
from edgepress.targets.schedules.window import WindowShape

Array = npt.NDArray[Any]


def _staged(
    assembly: Assembly, node: ir.Node, channels: int, groups: int, dtype: str, fill: float
) -> tuple[str, int, int]:
    """Pad the input of a window if it needs it; return its name, height and width.

    `channels` per group and `dtype` are what the kernel reads.
    """
    x = operand_of(node.inputs[0])
    batch, height, width, given = shape_of(x)
    _, out_height, out_width, _ = shape_of(node.outputs[0])
    kernel, strides, dilations = (pair_of(node, n) for n in ("kernel", "strides", "dilations"))
    top, left, _, _ = (int(pad) for pad in node.attributes["pads"].as_ints())
    need_height = (out_height - 1) * strides[0] + (kernel[0] - 1) * dilations[0] + 1
    need_width = (out_width - 1) * strides[1] + (kernel[1] - 1) * dilations[1] + 1
    inside = top == left == 0 and need_height <= height and need_width <= width
    if inside and channels * groups == given and dtype == dtype_of(x):
        return assembly.tensor(x), height, width
    shape = StageShape(
        batch, height, width, given // groups, top, left, need_height, need_width, channels, groups
    )
    staged = assembly.scratch(
        f"{node.outputs[0].name}_staged", dtype, (batch, need_height, need_width, channels * groups)
    )
    kernel_name = assembly.kernel("stage", stage, shape, assembly.isa, (dtype_of(x), dtype), fill)
    assembly.call(kernel_name, [assembly.tensor(x)], staged, f"{node.name} (padding)")
    return staged, need_height, need_width


def _isa_for(assembly: Assembly, node: ir.Node) -> Isa:
    """Return the instruction set for the dtypes of a node's input and weights."""
    operands = (dtype_of(operand_of(value)) for value in node.inputs[:2])
    return assembly.isa.for_operands(*operands)


def call_conv(assembly: Assembly, node: ir.Node) -> None:
    """Pad the input of a convolution where it needs that, and convolve."""
    isa, epilogue = _isa_for(assembly, node), epilogue_of(node)
    weights, groups = constant_of(node, 1), integer_of(node, "group")
    quantized = isinstance(epilogue, Requantise)
    zero_point = integer_of(node, "x_zero_point") if quantized else 0
    bias = constant_of(node, 2)
    if quantized:
        bias = _centred_bias(bias, weights, zero_point)
    batch, _, _, in_channels = shape_of(operand_of(node.inputs[0]))
    _, out_height, out_width, out_channels = shape_of(node.outputs[0])
    kernel, strides, dilations = (pair_of(node, n) for n in ("kernel", "strides", "dilations"))
    label = node.name or node.outputs[0].name or "conv"
    if groups == in_channels == out_channels and groups > 1:
        dtype = isa.storage if quantized else "float32"
        x, height, width = _staged(assembly, node, in_channels, 1, dtype, zero_point)
        dw_shape = WindowShape(
            batch,
            height,
            width,
            in_channels,
            out_height,
            out_width,
            kernel,
            strides,
            dilations,
        )
        name = assembly.kernel(
            "qdepthwise" if quantized else "depthwise", depthwise.depthwise, dw_shape, isa, epilogue
        )
        packed = {"weights": depthwise.pack_weights(weights, isa), "bias": bias}
        if quantized:
            packed["multipliers"] = constant_of(node, 3)
    else:
        read = conv.step(isa, quantized)
        channels = -(-in_channels // groups // read) * read
        dtype = isa.staged if quantized else "float32"
        x, height, width = _staged(assembly, node, channels, groups, dtype, zero_point)
        shape = conv.ConvShape(
            batch,
            height,
            width,
            channels,
            out_height,
            out_width,
            out_channels,
            kernel,
            strides,
            dilations,
            groups,
        )
        tile = conv.choose_tile(shape, isa, quantized)
        name = assembly.kernel(
            "qconv" if quantized else "conv",
            conv.conv,
            shape,
            isa,
            epilogue,
            tile,
            str(weights.dtype),
        )
        packed = _packed_conv(node, weights, bias, shape, isa, tile, quantized)
    _call_window(assembly, node, name, x, label, packed)


def _packed_conv(
    node: ir.Node,
    weights: Array,
    bias: Array,
    shape: conv.ConvShape,
    isa: Isa,
    tile: conv.Tile,
    quantized: bool,
) -> dict[str, Array]:
    packed = {
        "weights": conv.pack_weights(weights, shape, isa, tile),
        "bias": conv.pack_channels(bias, shape, isa),
    }
    if quantized:
        packed["multipliers"] = conv.pack_channels(constant_of(node, 3), shape, isa)
    return packed


def _call_window(
    assembly: Assembly, node: ir.Node, kernel: str, x: str, label: str, packed: dict[str, Array]
) -> None:
    constants = [assembly.constant(f"{label}.{key}", array) for key, array in packed.items()]
    assembly.call(kernel, [x, *constants], assembly.declare(node.outputs[0]), label)


def _centred_bias(bias: Array, weights: Array, zero_point: int) -> Array:
    """Fold the input's zero point into the bias: the sum of w * (x - z) is one of w * x."""
    sums = weights.reshape(weights.shape[0], -1).sum(axis=1, dtype=np.int64)
    folded = bias.astype(np.int64) - zero_point * sums
    # Wrapping is exact: the final sum fits int32 and addition is modular.
    return np.asarray(folded.astype(np.uint64).astype(np.uint32).view(np.int32))


def call_gemm(assembly: Assembly, node: ir.Node) -> None:
    """Multiply rows by a matrix, widening or padding the rows where that is needed."""
    isa, epilogue = _isa_for(assembly, node), epilogue_of(node)
    quantized = isinstance(epilogue, Requantise)
    weights, bias = constant_of(node, 1), constant_of(node, 2)
    if quantized:
        bias = _centred_bias(bias, weights, integer_of(node, "x_zero_point"))
    x = operand_of(node.inputs[0])
    inputs, outputs = weights.shape[1], weights.shape[0]
    rows = math.prod(shape_of(x)) // inputs
    label = node.name or node.outputs[0].name or "gemm"
    read = conv.step(isa, quantized)
    channels = -(-inputs // read) * read
    source = assembly.tensor(x)
    dtype = isa.staged if quantized else "float32"
    if channels != inputs or dtype != dtype_of(x):
        line = StageShape(1, 1, rows, inputs, 0, 0, 1, rows, channels)
        widen = assembly.kernel("stage", stage, line, isa, (dtype_of(x), dtype), 0)
        staged = assembly.scratch(f"{node.outputs[0].name}_staged", dtype, (rows, channels))
        assembly.call(widen, [source], staged, f"{node.name} (padding)")
        source = staged
    shape = conv.ConvShape(1, 1, rows, channels, 1, rows, outputs)
    tile = conv.choose_tile(shape, isa, quantized)
    options = (shape, isa, epilogue, tile, str(weights.dtype))
    name = assembly.kernel("qgemm" if quantized else "gemm", conv.conv, *options)
    expanded = weights.reshape(outputs, inputs, 1, 1)
    packed = _packed_conv(node, expanded, bias, shape, isa, tile, quantized)
    _call_window(assembly, node, name, source, label, packed)


def _pool_shape(node: ir.Node, height: int, width: int) -> WindowShape:
    batch, out_height, out_width, channels = shape_of(node.outputs[0])
    window = [pair_of(node, name) for name in ("kernel", "strides", "dilations")]
    return WindowShape(batch, height, width, channels, out_height, out_width, *window)


def call_max_pool(assembly: Assembly, node: ir.Node) -> None:
    """Pad with the least value where windows need it, and take the largest of each window."""
    dtype = dtype_of(node.outputs[0])
    lowest = LIMITS[dtype][0] if dtype in LIMITS else -math.inf
    channels = shape_of(node.outputs[0])[3]
    x, height, width = _staged(assembly, node, channels, 1, dtype, lowest)
    shape = _pool_shape(node, height, width)
    name = assembly.kernel("max_pool", pool.max_pool, shape, assembly.isa, dtype)
    assembly.call(name, [x], assembly.declare(node.outputs[0]), node.name or name)


def call_average_pool(assembly: Assembly, node: ir.Node) -> None:
    """Pad with what stands for zero where windows need it, and average each window."""
    epilogue = epilogue_of(node)
    zero_point = integer_of(node, "x_zero_point") if isinstance(epilogue, Requantise) else 0
    dtype = dtype_of(operand_of(node.inputs[0]))
    channels = shape_of(node.outputs[0])[3]
    x, height, width = _staged(assembly, node, channels, 1, dtype, zero_point)
    shape = _pool_shape(node, height, width)
    places = integer_of(node, "shift") if isinstance(epilogue, Shift) else 0
    options = (shape, assembly.isa, dtype, zero_point, epilogue, places)
    name = assembly.kernel("average_pool", pool.average_pool, *options)
    packed = {"factors": constant_of(node, 1).ravel()}
    _call_window(assembly, node, name, x, node.name or name, packed)
