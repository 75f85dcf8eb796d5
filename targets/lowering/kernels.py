"""Nodes of the `edgepress` domain become calls of generated kernels: one function per operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from edgepress.targets.lowering.assembly import Assembly
from edgepress.targets.lowering.attention_kernels import (
    call_attention,
    call_matmul,
    call_softmax,
)
from edgepress.targets.lowering.conv_kernels import call_conv
from edgepress.targets.lowering.dialect import array_of, dtype_of, shape_of
from edgepress.targets.lowering.dynamic_kernels import dynamic_gemm
from edgepress.targets.lowering.gemm_kernels import call_gemm
from edgepress.targets.lowering.intake import call_intake
from edgepress.targets.lowering.interlace_kernels import call_interlace
from edgepress.targets.lowering.node_attributes import (
    activation_of,
    factor_of,
    float_of,
    integer_of,
    operand_of,
    requantise_of,
)
from edgepress.targets.lowering.normalization_kernels import call_layer_norm
from edgepress.targets.lowering.pool_kernels import call_average_pool, call_max_pool
from edgepress.targets.lowering.quantization import LIMITS, fixed_point_exponent
from edgepress.targets.lowering.resize import call_resize
from edgepress.targets.schedules import elementwise, float_bits
from edgepress.targets.schedules.concat import concat
from edgepress.targets.schedules.elementwise import Operand
from edgepress.targets.schedules.epilogue import Requantise
from edgepress.targets.schedules.float_elementwise import activate
from edgepress.targets.schedules.interpolate import interpolate
from edgepress.targets.schedules.softmax import SoftmaxShape, softmax
from edgepress.targets.schedules.transpose import transpose

# Element by element --------------------------------------------------------------------------


def _size(node: ir.Node) -> int:
    return math.prod(shape_of(node.outputs[0]))


def _quantise(assembly: Assembly, node: ir.Node) -> None:
    dtype, scale = dtype_of(node.outputs[0]), float_of(node, "scale")
    limits = (
        node.attributes.get_int(name, limit)
        for name, limit in zip(("low", "high"), LIMITS[dtype], strict=True)
    )
    point = integer_of(node, "zero_point")
    epilogue, power = Requantise(dtype, point, *limits), fixed_point_exponent(scale, point, dtype)
    if power is not None:
        arguments = (_size(node), assembly.isa, power, epilogue)
        name = assembly.kernel("quantise", float_bits.quantise, *arguments)
    else:
        name = assembly.kernel(
            "quantise", elementwise.quantise, _size(node), assembly.isa, scale, epilogue
        )
    _call_elementwise(assembly, node, name)


def _dequantise(assembly: Assembly, node: ir.Node) -> None:
    dtype, point = dtype_of(operand_of(node.inputs[0])), integer_of(node, "zero_point")
    scale, size, isa = float_of(node, "scale"), _size(node), assembly.isa
    power = fixed_point_exponent(scale, point, dtype)
    if power is not None:
        name = assembly.kernel("dequantise", float_bits.dequantise, size, isa, power, dtype, point)
    else:
        name = assembly.kernel("dequantise", elementwise.dequantise, size, isa, scale, dtype, point)
    _call_elementwise(assembly, node, name)


def _rescale(assembly: Assembly, node: ir.Node) -> None:
    dtype = dtype_of(operand_of(node.inputs[0]))
    operand = Operand(dtype, integer_of(node, "x_zero_point"), _size(node))
    arguments = (_size(node), assembly.isa, operand, factor_of(node), requantise_of(node))
    name = assembly.kernel("rescale", elementwise.rescale, *arguments)
    _call_elementwise(assembly, node, name)


def _table(assembly: Assembly, node: ir.Node) -> None:
    dtypes = (dtype_of(operand_of(node.inputs[0])), dtype_of(node.outputs[0]))
    if dtypes[0] == "int16":
        reading = (integer_of(node, "bits"), integer_of(node, "fraction"), dtypes[1])
        name = assembly.kernel("table", interpolate, _size(node), assembly.isa, *reading)
    else:
        name = assembly.kernel("table", elementwise.look_up, _size(node), dtypes)
    _call_elementwise(assembly, node, name)


def _activation(assembly: Assembly, node: ir.Node) -> None:
    activation = activation_of(node)
    assert activation is not None
    name = assembly.kernel("activation", activate, _size(node), assembly.isa, activation)
    _call_elementwise(assembly, node, name)


def _add(assembly: Assembly, node: ir.Node) -> None:
    operands, sources = _binary_operands(assembly, node)
    factors = (integer_of(node, "a_factor"), integer_of(node, "b_factor"))
    arguments = (operands, factors, factor_of(node), requantise_of(node))
    name = assembly.kernel("qadd", elementwise.add, _size(node), assembly.isa, *arguments)
    assembly.call(name, sources, assembly.declare(node.outputs[0]), node.name or name)


def _mul(assembly: Assembly, node: ir.Node) -> None:
    operands, sources = _binary_operands(assembly, node)
    arguments = (operands, factor_of(node), requantise_of(node))
    name = assembly.kernel("qmul", elementwise.multiply, _size(node), assembly.isa, *arguments)
    assembly.call(name, sources, assembly.declare(node.outputs[0]), node.name or name)


def _binary_operands(
    assembly: Assembly, node: ir.Node
) -> tuple[tuple[Operand, Operand], list[str]]:
    """Return both operands; one whose shape does not repeat along memory is expanded first."""
    shape = shape_of(node.outputs[0])
    operands, sources = [], []
    for key, value in zip("ab", node.inputs, strict=True):
        value = operand_of(value)
        given = shape_of(value)
        period = math.prod(given)
        point = integer_of(node, f"{key}_zero_point")
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
                sources[i] = _expand(assembly, node, operand_of(value), shape, name)
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
    sources = [assembly.tensor(operand_of(value)) for value in node.inputs]
    assembly.call(kernel, sources, assembly.declare(node.outputs[0]), node.name or kernel)


def _softmax(assembly: Assembly, node: ir.Node) -> None:
    x = operand_of(node.inputs[0])
    given, axis = shape_of(x), integer_of(node, "axis")
    shape = SoftmaxShape(math.prod(given[:axis]), given[axis], math.prod(given[axis + 1 :]))
    scaling = (integer_of(node, "factor"), integer_of(node, "factor_shift"))
    name = assembly.kernel("softmax", softmax, shape, dtype_of(x), *scaling, requantise_of(node))
    _call_elementwise(assembly, node, name)


# Layout --------------------------------------------------------------------------------------


def _concat(assembly: Assembly, node: ir.Node) -> None:
    shapes = [shape_of(operand_of(value)) for value in node.inputs]
    axis = node.attributes.get_int("axis", 0) % len(shapes[0])
    runs = tuple(math.prod(shape[axis:]) for shape in shapes)
    outer = math.prod(shapes[0][:axis])
    dtype = dtype_of(node.outputs[0])
    name = assembly.kernel("concat", concat, outer, runs, dtype, assembly.isa)
    _call_elementwise(assembly, node, name)


def _transpose(assembly: Assembly, node: ir.Node) -> None:
    sizes = [integer_of(node, name) for name in ("batch", "rows", "columns")]
    dtype = dtype_of(node.outputs[0])
    name = assembly.kernel("transpose", transpose, *sizes, dtype, assembly.isa)
    _call_elementwise(assembly, node, name)


def _view(assembly: Assembly, node: ir.Node) -> None:
    assembly.alias(node.outputs[0], operand_of(node.inputs[0]))


KERNELS: dict[str, Callable[[Assembly, ir.Node], None]] = {
    "Activation": _activation,
    "Attention": call_attention,
    "AveragePool": call_average_pool,
    "Concat": _concat,
    "Conv": call_conv,
    "Dequantize": _dequantise,
    "DynamicGemm": dynamic_gemm,
    "Gemm": call_gemm,
    "Interlace": call_interlace,
    "LayerNorm": call_layer_norm,
    "MatMul": call_matmul,
    "Intake": call_intake,
    "MaxPool": call_max_pool,
    "QAdd": _add,
    "QAveragePool": call_average_pool,
    "QConv": call_conv,
    "QGemm": call_gemm,
    "QMul": _mul,
    "QSoftmax": _softmax,
    "Quantize": _quantise,
    "Rescale": _rescale,
    "Softmax": call_softmax,
    "Resize": call_resize,
    "Table": _table,
    "Transpose": _transpose,
    "View": _view,
}
