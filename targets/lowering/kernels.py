"""Nodes of the `edgepress` domain become calls of generated kernels: one function per operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepress.targets.isa.base import Isa
from edgepress.targets.lowering.assembly import Assembly
from edgepress.targets.lowering.dialect import array_of, dtype_of, shape_of
from edgepress.targets.schedules import conv, depthwise, elementwise, pool
from edgepress.targets.schedules.concat import concat
from edgepress.targets.schedules.elementwise import Operand
from edgepress.targets.schedules.epilogue import Clip, Epilogue, Requantise
from edgepress.targets.schedules.stage import StageShape, stage
from edgepress.targets.schedules.transpose import transpose
from edgepress.targets.schedules.window import WindowShape

Array = npt.NDArray[Any]


# Attributes ----------------------------------------------------------------------------------


def _integer(node: ir.Node, name: str) -> int:
    return int(node.attributes[name].as_int())


def _float(node: ir.Node, name: str) -> float:
    return float(node.attributes[name].as_float())


def _pair(node: ir.Node, name: str) -> tuple[int, int]:
    first, second = node.attributes[name].as_ints()
    return int(first), int(second)


def _epilogue(node: ir.Node) -> Epilogue:
    """Return how a node's outputs leave the accumulators."""
    dtype = dtype_of(node.outputs[0])
    if dtype == "float32":
        if "low" not in node.attributes:
            return Clip()
        return Clip(_float(node, "low"), _float(node, "high"))
    return _requantise(node)


def _requantise(node: ir.Node) -> Requantise:
    values = (_integer(node, name) for name in ("zero_point", "low", "high"))
    return Requantise(dtype_of(node.outputs[0]), *values)


def _operand(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value


def _constant(node: ir.Node, index: int) -> Array:
    array = array_of(node.inputs[index])
    assert array is not None
    return array


# Windows -------------------------------------------------------------------------------------


def _staged(
    assembly: Assembly, node: ir.Node, channels: int, groups: int, dtype: str, fill: float
) -> tuple[str, int, int]:
    """Pad the input of a window if it needs it; return its name, height and width.

    `channels` per group and `dtype` are what the kernel reads.
    """
    x = _operand(node.inputs[0])
    batch, height, width, given = shape_of(x)
    _, out_height, out_width, _ = shape_of(node.outputs[0])
    kernel, strides, dilations = (_pair(node, n) for n in ("kernel", "strides", "dilations"))
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


def _conv(assembly: Assembly, node: ir.Node) -> None:
    isa, epilogue = assembly.isa, _epilogue(node)
    weights, groups = _constant(node, 1), _integer(node, "group")
    quantized = isinstance(epilogue, Requantise)
    zero_point = _integer(node, "x_zero_point") if quantized else 0
    bias = _constant(node, 2)
    if quantized:
        bias = _centred_bias(bias, weights, zero_point)
    batch, _, _, in_channels = shape_of(_operand(node.inputs[0]))
    _, out_height, out_width, out_channels = shape_of(node.outputs[0])
    kernel, strides, dilations = (_pair(node, n) for n in ("kernel", "strides", "dilations"))
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
            packed["multipliers"] = _constant(node, 3)
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
            "qconv" if quantized else "conv", conv.conv, shape, isa, epilogue, tile
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
        packed["multipliers"] = conv.pack_channels(_constant(node, 3), shape, isa)
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


def _gemm(assembly: Assembly, node: ir.Node) -> None:
    isa, epilogue = assembly.isa, _epilogue(node)
    quantized = isinstance(epilogue, Requantise)
    weights, bias = _constant(node, 1), _constant(node, 2)
    if quantized:
        bias = _centred_bias(bias, weights, _integer(node, "x_zero_point"))
    x = _operand(node.inputs[0])
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
    name = assembly.kernel("qgemm" if quantized else "gemm", conv.conv, shape, isa, epilogue, tile)
    expanded = weights.reshape(outputs, inputs, 1, 1)
    packed = _packed_conv(node, expanded, bias, shape, isa, tile, quantized)
    _call_window(assembly, node, name, source, label, packed)


def _pool_shape(node: ir.Node, height: int, width: int) -> WindowShape:
    batch, out_height, out_width, channels = shape_of(node.outputs[0])
    window = [_pair(node, name) for name in ("kernel", "strides", "dilations")]
    return WindowShape(batch, height, width, channels, out_height, out_width, *window)


def _max_pool(assembly: Assembly, node: ir.Node) -> None:
    dtype = dtype_of(node.outputs[0])
    lowest = {"uint8": 0, "int8": -128}.get(dtype, -math.inf)
    channels = shape_of(node.outputs[0])[3]
    x, height, width = _staged(assembly, node, channels, 1, dtype, lowest)
    shape = _pool_shape(node, height, width)
    name = assembly.kernel("max_pool", pool.max_pool, shape, assembly.isa, dtype)
    assembly.call(name, [x], assembly.declare(node.outputs[0]), node.name or name)


def _average_pool(assembly: Assembly, node: ir.Node) -> None:
    epilogue = _epilogue(node)
    zero_point = _integer(node, "x_zero_point") if isinstance(epilogue, Requantise) else 0
    dtype = dtype_of(_operand(node.inputs[0]))
    channels = shape_of(node.outputs[0])[3]
    x, height, width = _staged(assembly, node, channels, 1, dtype, zero_point)
    shape = _pool_shape(node, height, width)
    name = assembly.kernel(
        "average_pool", pool.average_pool, shape, assembly.isa, dtype, zero_point, epilogue
    )
    packed = {"factors": _constant(node, 1).ravel()}
    _call_window(assembly, node, name, x, node.name or name, packed)


# Element by element --------------------------------------------------------------------------


def _size(node: ir.Node) -> int:
    return math.prod(shape_of(node.outputs[0]))


def _quantise(assembly: Assembly, node: ir.Node) -> None:
    lowest = 0 if dtype_of(node.outputs[0]) == "uint8" else -128
    epilogue = Requantise(
        dtype_of(node.outputs[0]), _integer(node, "zero_point"), lowest, lowest + 255
    )
    scale = _float(node, "scale")
    name = assembly.kernel(
        "quantise", elementwise.quantise, _size(node), assembly.isa, scale, epilogue
    )
    _call_elementwise(assembly, node, name)


def _dequantise(assembly: Assembly, node: ir.Node) -> None:
    dtype = dtype_of(_operand(node.inputs[0]))
    name = assembly.kernel(
        "dequantise",
        elementwise.dequantise,
        _size(node),
        assembly.isa,
        _float(node, "scale"),
        dtype,
        _integer(node, "zero_point"),
    )
    _call_elementwise(assembly, node, name)


def _rescale(assembly: Assembly, node: ir.Node) -> None:
    dtype = dtype_of(_operand(node.inputs[0]))
    operand = Operand(dtype, _integer(node, "x_zero_point"), _size(node))
    arguments = (_size(node), assembly.isa, operand, _float(node, "multiplier"), _requantise(node))
    name = assembly.kernel("rescale", elementwise.rescale, *arguments)
    _call_elementwise(assembly, node, name)


def _table(assembly: Assembly, node: ir.Node) -> None:
    dtypes = (dtype_of(_operand(node.inputs[0])), dtype_of(node.outputs[0]))
    name = assembly.kernel("table", elementwise.look_up, _size(node), dtypes)
    _call_elementwise(assembly, node, name)


def _add(assembly: Assembly, node: ir.Node) -> None:
    operands, sources = _binary_operands(assembly, node)
    factors = (_integer(node, "a_factor"), _integer(node, "b_factor"))
    arguments = (operands, factors, _float(node, "multiplier"), _requantise(node))
    name = assembly.kernel("qadd", elementwise.add, _size(node), assembly.isa, *arguments)
    assembly.call(name, sources, assembly.declare(node.outputs[0]), node.name or name)


def _mul(assembly: Assembly, node: ir.Node) -> None:
    operands, sources = _binary_operands(assembly, node)
    arguments = (operands, _float(node, "multiplier"), _requantise(node))
    name = assembly.kernel("qmul", elementwise.multiply, _size(node), assembly.isa, *arguments)
    assembly.call(name, sources, assembly.declare(node.outputs[0]), node.name or name)


def _binary_operands(
    assembly: Assembly, node: ir.Node
) -> tuple[tuple[Operand, Operand], list[str]]:
    """Return both operands; one whose shape does not repeat along memory is expanded first."""
    shape = shape_of(node.outputs[0])
    operands, sources = [], []
    for key, value in zip("ab", node.inputs, strict=True):
        value = _operand(value)
        given = shape_of(value)
        period = math.prod(given)
        point = _integer(node, f"{key}_zero_point")
        source = assembly.tensor(value)
        trimmed = tuple(
            dim for dim in given[next((i for i, d in enumerate(given) if d > 1), len(given)) :]
        )
        if trimmed != shape[len(shape) - len(trimmed) :]:
            source = _expand(assembly, node, value, shape, f"{node.outputs[0].name}_{key}")
            period = math.prod(shape)
        operands.append(Operand(dtype_of(value), point, period))
        sources.append(source)
    if len({o.period for o in operands} - {1, math.prod(shape)}) > 1:
        for i, (key, value) in enumerate(zip("ab", node.inputs, strict=True)):
            if operands[i].period < math.prod(shape):
                name = f"{node.outputs[0].name}_{key}_full"
                sources[i] = _expand(assembly, node, _operand(value), shape, name)
                operands[i] = replace(operands[i], period=math.prod(shape))
    return (operands[0], operands[1]), sources


def _expand(
    assembly: Assembly, node: ir.Node, value: ir.Value, shape: tuple[int, ...], name: str
) -> str:
    """Broadcast an operand to the whole shape."""
    array = array_of(value)
    if array is not None:
        return assembly.constant(name, np.broadcast_to(array, shape))
    dtype, given = dtype_of(value), shape_of(value)
    expanded = assembly.scratch(name, dtype, shape)
    kernel = assembly.kernel("expand", elementwise.expand, given, shape, dtype)
    assembly.call(kernel, [assembly.tensor(value)], expanded, f"{node.name} (broadcast)")
    return expanded


def _call_elementwise(assembly: Assembly, node: ir.Node, kernel: str) -> None:
    sources = [assembly.tensor(_operand(value)) for value in node.inputs]
    assembly.call(kernel, sources, assembly.declare(node.outputs[0]), node.name or kernel)


# Layout --------------------------------------------------------------------------------------


def _concat(assembly: Assembly, node: ir.Node) -> None:
    shapes = [shape_of(_operand(value)) for value in node.inputs]
    axis = node.attributes.get_int("axis", 0) % len(shapes[0])
    runs = tuple(math.prod(shape[axis:]) for shape in shapes)
    outer = math.prod(shapes[0][:axis])
    dtype = dtype_of(node.outputs[0])
    name = assembly.kernel("concat", concat, outer, runs, dtype, assembly.isa)
    _call_elementwise(assembly, node, name)


def _transpose(assembly: Assembly, node: ir.Node) -> None:
    sizes = [_integer(node, name) for name in ("batch", "rows", "columns")]
    name = assembly.kernel("transpose", transpose, *sizes, dtype_of(node.outputs[0]))
    _call_elementwise(assembly, node, name)


def _view(assembly: Assembly, node: ir.Node) -> None:
    assembly.alias(node.outputs[0], _operand(node.inputs[0]))


KERNELS: dict[str, Callable[[Assembly, ir.Node], None]] = {
    "AveragePool": _average_pool,
    "Concat": _concat,
    "Conv": _conv,
    "Dequantize": _dequantise,
    "Gemm": _gemm,
    "MaxPool": _max_pool,
    "QAdd": _add,
    "QAveragePool": _average_pool,
    "QConv": _conv,
    "QGemm": _gemm,
    "QMul": _mul,
    "Quantize": _quantise,
    "Rescale": _rescale,
    "Table": _table,
    "Transpose": _transpose,
    "View": _view,
}
