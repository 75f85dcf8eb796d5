"""Element by element: quantize, rescale, look up, add, multiply, activate, cast."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from edgepress.targets.cuda.assembly import CudaAssembly
from edgepress.targets.cuda.cast import HEADERS, map_kernel
from edgepress.targets.cuda.epilogue import activated, finish_source
from edgepress.targets.cuda.kernel import C_TYPES, CudaKernel, float_literal
from edgepress.targets.cuda.launch import blocks_for, flat_kernel, lanes_of
from edgepress.targets.cuda.layout import expand
from edgepress.targets.cuda.quantised import quantised_output, quantised_value
from edgepress.targets.lowering.dialect import array_of, dtype_of, shape_of
from edgepress.targets.lowering.node_attributes import (
    activation_of,
    factor_of,
    float_of,
    integer_of,
    operand_of,
    requantise_of,
)
from edgepress.targets.lowering.quantization import LIMITS
from edgepress.targets.schedules.activations import Activation
from edgepress.targets.schedules.epilogue import Requantise, Shift


@dataclass(frozen=True)
class Repeated:
    """An integer operand: in every `chunk` of outputs, its next `period` elements repeat.

    Attributes:
        dtype, zero_point: as they say.
        period: elements, which divide the chunk; all of them where nothing is repeated.
        chunk: outputs.
    """

    dtype: str
    zero_point: int
    period: int
    chunk: int


# Kernels -------------------------------------------------------------------------------------


def quantise(
    name: str, size: int, storage: str, scale: float, epilogue: Requantise, processors: int
) -> CudaKernel:
    """Generate `y = zero_point + round(x / scale)`, saturating: arguments x and y."""
    value = quantised_value(scale, epilogue, C_TYPES[epilogue.dtype])
    return map_kernel(name, size, (storage, epilogue.dtype), value, processors)


def dequantise(
    name: str, size: int, dtypes: tuple[str, str], scale: float, zero_point: int, processors: int
) -> CudaKernel:
    """Generate `y = (x - zero_point) * scale`: arguments x and y."""
    product = f"multiply((float)((int32_t)x - ({zero_point})), {float_literal(scale)})"
    value = f"from_float<{C_TYPES[dtypes[1]]}>({product})"
    return map_kernel(name, size, dtypes, value, processors)


def rescale(
    name: str,
    size: int,
    dtype: str,
    zero_point: int,
    factor: float,
    epilogue: Requantise,
    processors: int,
) -> CudaKernel:
    """Generate a change of scale and zero point, with the clamp of a ReLU or Clip: x and y.

    The factor here and below is a multiplier, or for `Shift` the places to shift by.
    """
    value = _finished(_centred("x", zero_point), factor, epilogue)
    before = finish_source("Finish", _any_shift(epilogue), epilogue.dtype)
    return map_kernel(name, size, (dtype, epilogue.dtype), value, processors, before)


def activate(
    name: str, size: int, dtypes: tuple[str, str], activation: Activation, processors: int
) -> CudaKernel:
    """Generate `y = activation(x)`: arguments x and y."""
    value = f"from_float<{C_TYPES[dtypes[1]]}>({activated('to_float(x)', activation)})"
    return map_kernel(name, size, dtypes, value, processors)


def _combine(
    name: str,
    size: int,
    operands: tuple[Repeated, Repeated],
    value: str,
    epilogue: Requantise,
    processors: int,
) -> CudaKernel:
    dtypes = (operands[0].dtype, operands[1].dtype, epilogue.dtype)
    lanes = lanes_of(*dtypes)
    repeats = ", ".join(f"{operand.period}, {operand.chunk}" for operand in operands)
    kinds = [C_TYPES[dtype] for dtype in dtypes]
    function = f"[](const {kinds[0]} a, const {kinds[1]} b) -> {kinds[2]} {{ return {value}; }}"
    return flat_kernel(
        name,
        list(zip(dtypes, "aby", strict=True)),
        f"combine_each<{size}, {lanes}, {repeats}>(a, b, y, {function});",
        HEADERS,
        blocks_for(-(-size // lanes), processors),
        before=finish_source("Finish", _any_shift(epilogue), epilogue.dtype),
    )


def add(
    name: str,
    size: int,
    operands: tuple[Repeated, Repeated],
    factors: tuple[int, int],
    factor: float,
    epilogue: Requantise,
    processors: int,
) -> CudaKernel:
    """Generate `requantise(a * factors[0] + b * factors[1])` on centred values: a, b, y."""
    a, b = (
        f"{_centred(key, operand.zero_point)} * ({factor_})"
        for key, operand, factor_ in zip("ab", operands, factors, strict=True)
    )
    value = _finished(f"{a} + {b}", factor, epilogue)
    return _combine(name, size, operands, value, epilogue, processors)


def multiply(
    name: str,
    size: int,
    operands: tuple[Repeated, Repeated],
    factor: float,
    epilogue: Requantise,
    processors: int,
) -> CudaKernel:
    """Generate `requantise(a * b)` on centred values: a, b, y."""
    a, b = (_centred(key, operand.zero_point) for key, operand in zip("ab", operands, strict=True))
    value = _finished(f"{a} * {b}", factor, epilogue)
    return _combine(name, size, operands, value, epilogue, processors)


def look_up(name: str, size: int, dtypes: tuple[str, str], processors: int) -> CudaKernel:
    """Generate `y = table[x - lowest x]` for any function of one 8-bit value: x, table, y."""
    lanes = lanes_of(*dtypes)
    return flat_kernel(
        name,
        [(dtypes[0], "x"), (dtypes[1], "table"), (dtypes[1], "y")],
        f"look_up<{size}, {lanes}, {LIMITS[dtypes[0]][0]}>(x, table, y);",
        HEADERS,
        blocks_for(-(-size // lanes), processors),
    )


def interpolate(
    name: str, size: int, bits: int, fraction: int, dtype: str, processors: int
) -> CudaKernel:
    """Generate the interpolation of docs/integer.md: x int16, table int16, y of `dtype`."""
    lanes = lanes_of("int16", dtype)
    return flat_kernel(
        name,
        [("int16", "x"), ("int16", "table"), (dtype, "y")],
        f"interpolate<{size}, {lanes}, {bits}, {fraction}>(x, table, y);",
        HEADERS,
        blocks_for(-(-size // lanes), processors),
    )


def _centred(value: str, zero_point: int) -> str:
    return f"((int32_t){value} - ({zero_point}))"


def _finished(total: str, factor: float, epilogue: Requantise) -> str:
    """Return C++ of an int32 that becomes an output by one factor."""
    scale = str(int(factor)) if isinstance(epilogue, Shift) else float_literal(factor)
    return f"Finish::of({total}, {scale}, 0.0f)"


def _any_shift(epilogue: Requantise) -> Requantise:
    """Allow for a factor of the text that shifts to the left; `left` speaks of constants."""
    return replace(epilogue, left=True) if isinstance(epilogue, Shift) else epilogue


# Calls ---------------------------------------------------------------------------------------


def call_quantise(assembly: CudaAssembly, node: ir.Node) -> None:
    """Call the kernel of a `Quantize` node."""
    arguments = (float_of(node, "scale"), quantised_output(node), assembly.multiprocessors)
    storage = assembly.storage(operand_of(node.inputs[0]))
    name = assembly.kernel("quantise", quantise, _size(node), storage, *arguments)
    _call(assembly, node, name)


def call_dequantise(assembly: CudaAssembly, node: ir.Node) -> None:
    """Call the kernel of a `Dequantize` node."""
    assembly.declare(node.outputs[0])
    arguments = (float_of(node, "scale"), integer_of(node, "zero_point"), assembly.multiprocessors)
    name = assembly.kernel(
        "dequantise", dequantise, _size(node), _storages(assembly, node), *arguments
    )
    _call(assembly, node, name)


def call_rescale(assembly: CudaAssembly, node: ir.Node) -> None:
    """Call the kernel of a `Rescale` node."""
    dtype, point = dtype_of(operand_of(node.inputs[0])), integer_of(node, "x_zero_point")
    finish = (factor_of(node), requantise_of(node), assembly.multiprocessors)
    arguments = (_size(node), dtype, point, *finish)
    _call(assembly, node, assembly.kernel("rescale", rescale, *arguments))


def call_table(assembly: CudaAssembly, node: ir.Node) -> None:
    """Call the kernel of a `Table` node."""
    dtypes = (dtype_of(operand_of(node.inputs[0])), dtype_of(node.outputs[0]))
    size, processors = _size(node), assembly.multiprocessors
    if dtypes[0] == "int16":
        reading = (integer_of(node, "bits"), integer_of(node, "fraction"), dtypes[1])
        name = assembly.kernel("table", interpolate, size, *reading, processors)
    else:
        name = assembly.kernel("table", look_up, size, dtypes, processors)
    _call(assembly, node, name)


def call_activation(assembly: CudaAssembly, node: ir.Node) -> None:
    """Call the kernel of an `Activation` node."""
    activation = activation_of(node)
    assert activation is not None
    assembly.declare(node.outputs[0])
    arguments = (_size(node), _storages(assembly, node), activation, assembly.multiprocessors)
    _call(assembly, node, assembly.kernel("activation", activate, *arguments))


def call_add(assembly: CudaAssembly, node: ir.Node) -> None:
    """Call the kernel of a `QAdd` node."""
    operands, sources = _binary_operands(assembly, node)
    factors = (integer_of(node, "a_factor"), integer_of(node, "b_factor"))
    arguments = (operands, factors, factor_of(node), requantise_of(node), assembly.multiprocessors)
    name = assembly.kernel("qadd", add, _size(node), *arguments)
    assembly.call(name, sources, assembly.declare(node.outputs[0]), node.name or name)


def call_mul(assembly: CudaAssembly, node: ir.Node) -> None:
    """Call the kernel of a `QMul` node."""
    operands, sources = _binary_operands(assembly, node)
    arguments = (operands, factor_of(node), requantise_of(node), assembly.multiprocessors)
    name = assembly.kernel("qmul", multiply, _size(node), *arguments)
    assembly.call(name, sources, assembly.declare(node.outputs[0]), node.name or name)


def _binary_operands(
    assembly: CudaAssembly, node: ir.Node
) -> tuple[tuple[Repeated, Repeated], list[str]]:
    """Return both operands; one that repeats in more than one place is expanded first."""
    shape = shape_of(node.outputs[0])
    operands, sources = [], []
    for key, value in zip("ab", map(operand_of, node.inputs), strict=True):
        source, found = assembly.tensor(value), repeats(shape_of(value), shape)
        if found is None:
            source = _expanded(assembly, node, value, f"{node.outputs[0].name}_{key}")
            found = (math.prod(shape), math.prod(shape))
        operands.append(Repeated(dtype_of(value), integer_of(node, f"{key}_zero_point"), *found))
        sources.append(source)
    return (operands[0], operands[1]), sources


def repeats(given: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Return period and chunk of an operand as `Repeated` has them; None where it has no such form.

    >>> repeats((2, 1, 1, 8), (2, 3, 5, 8)), repeats((3, 1, 8), (2, 3, 5, 8))
    ((8, 120), None)
    """
    given = (1,) * (len(shape) - len(given)) + given
    inner = len(shape)
    while inner and given[inner - 1] == shape[inner - 1]:
        inner -= 1
    outer = inner
    while outer and given[outer - 1] == 1:
        outer -= 1
    if given[:outer] != shape[:outer]:
        return None
    return math.prod(shape[inner:]), math.prod(shape[outer:])


def _expanded(assembly: CudaAssembly, node: ir.Node, value: ir.Value, name: str) -> str:
    """Broadcast an operand to the whole shape of the output."""
    array, shape = array_of(value), shape_of(node.outputs[0])
    if array is not None:
        return assembly.constant(name, np.broadcast_to(array, shape))
    dtype = dtype_of(value)
    target = assembly.scratch(name, dtype, shape)
    arguments = (shape_of(value), shape, dtype, assembly.multiprocessors)
    kernel = assembly.kernel("expand", expand, *arguments)
    assembly.call(kernel, [assembly.tensor(value)], target, f"{node.name} (broadcast)")
    return target


def _size(node: ir.Node) -> int:
    return math.prod(shape_of(node.outputs[0]))


def _dtype(assembly: CudaAssembly, name: str) -> str:
    return assembly.program.tensors[name].dtype


def _storages(assembly: CudaAssembly, node: ir.Node) -> tuple[str, str]:
    """Return what memory holds of the first input and of the output, which is declared."""
    return assembly.storage(operand_of(node.inputs[0])), assembly.storage(node.outputs[0])


def _call(assembly: CudaAssembly, node: ir.Node, kernel: str) -> None:
    sources = [assembly.tensor(operand_of(value)) for value in node.inputs]
    assembly.call(kernel, sources, assembly.declare(node.outputs[0]), node.name or kernel)
