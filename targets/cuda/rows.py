"""Softmax, in floats and in integers, and layer normalisation: calls of kernels along rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgepress.targets.cuda.assembly import CudaAssembly
from edgepress.targets.cuda.kernel import C_TYPES, CudaKernel, float_literal
from edgepress.targets.cuda.quantised_rows import declare_rows, padded_width
from edgepress.targets.cuda.row_walk import RowWalk, walk_columns, walk_rows
from edgepress.targets.lowering.dialect import dtype_of, shape_of
from edgepress.targets.lowering.dynamic_kernels import factors_of
from edgepress.targets.lowering.node_attributes import (
    integer_of,
    operand_of,
    pair_of,
    requantise_of,
)
from edgepress.targets.lowering.normalization_kernels import layer_norm_shape, quantizing_reader
from edgepress.targets.program import Call
from edgepress.targets.schedules.epilogue import Requantise
from edgepress.targets.schedules.layer_norm import LayerNormShape

_TABLE_BYTES = 4  # of an entry: softmax of integers reads one at a time

# Softmax -------------------------------------------------------------------------------------


def call_softmax(assembly: CudaAssembly, node: ir.Node) -> None:
    """Emit the call of a `Softmax` node, of floats."""
    x, (first, stop) = operand_of(node.inputs[0]), pair_of(node, "axes")
    output = assembly.declare(node.outputs[0])
    dtypes = (assembly.storage(x), assembly.storage(node.outputs[0]))
    narrowest = min(np.dtype(dtype).itemsize for dtype in dtypes)
    walk = _walk(shape_of(x), first, stop, narrowest, assembly.multiprocessors)
    kernel = assembly.kernel("softmax", softmax, walk, dtypes)
    assembly.call(kernel, [assembly.tensor(x)], output, node.name or kernel)


def softmax(name: str, walk: RowWalk, dtypes: tuple[str, str]) -> CudaKernel:
    """Generate `y = exp(x - max) / sum` along rows: arguments x and y."""
    parameters = [f"const {C_TYPES[dtypes[0]]} *x", f"{C_TYPES[dtypes[1]]} *y"]
    body = f"softmax<{walk.source}>(x, y, {walk.rows});"
    return _kernel(name, walk, parameters, body, ("softmax.cuh",))


def call_qsoftmax(assembly: CudaAssembly, node: ir.Node) -> None:
    """Emit the call of a `QSoftmax` node, of integers."""
    x, axis = operand_of(node.inputs[0]), integer_of(node, "axis")
    walk = _walk(shape_of(x), axis, axis + 1, _TABLE_BYTES, assembly.multiprocessors)
    scaling = (integer_of(node, "factor"), integer_of(node, "factor_shift"))
    kernel = assembly.kernel(
        "integer_softmax", integer_softmax, walk, dtype_of(x), *scaling, requantise_of(node)
    )
    sources = [assembly.tensor(operand_of(value)) for value in node.inputs]
    assembly.call(kernel, sources, assembly.declare(node.outputs[0]), node.name or kernel)


def integer_softmax(
    name: str, walk: RowWalk, dtype: str, factor: int, shift: int, epilogue: Requantise
) -> CudaKernel:
    """Generate the rule of docs/integer.md along rows: arguments x, table int32, and y.

    Args:
        name: of the function.
        walk: along rows.
        dtype: of x, `uint8`, `int8` or `int16`.
        factor: below 2**16; the scale of y is `factor / 2**shift`.
        shift: above 0.
        epilogue: of y.
    """
    kinds = C_TYPES[dtype], C_TYPES[epilogue.dtype]
    parameters = [f"const {kinds[0]} *x", "const int32_t *table", f"{kinds[1]} *y"]
    numbers = (walk.rows, factor, shift, epilogue.zero_point, epilogue.low, epilogue.high)
    body = f"integer_softmax<{walk.source}>(x, table, y, {', '.join(map(str, numbers))});"
    return _kernel(name, walk, parameters, body, ("softmax.cuh",))


def _walk(
    shape: Sequence[int], first: int, stop: int, narrowest_bytes: int, multiprocessors: int
) -> RowWalk:
    """Return the walk along the axes from `first` on, in front of `stop`."""
    outer, length, inner = (
        math.prod(part) for part in (shape[:first], shape[first:stop], shape[stop:])
    )
    if inner > 1:
        return walk_columns(outer, length, inner)
    return walk_rows(outer, length, narrowest_bytes, multiprocessors)


# Layer normalisation -------------------------------------------------------------------------


def call_layer_norm(assembly: CudaAssembly, node: ir.Node) -> None:
    """Normalise rows; quantize them too where a product of dynamically quantized rows is next."""
    x, output = operand_of(node.inputs[0]), node.outputs[0]
    width = math.prod(shape_of(x)[integer_of(node, "axis") :])
    scale, shift, residual = [*node.inputs[1:], None, None, None][:3]
    reader = quantizing_reader(output, width)
    factors = None if reader is None else factors_of(reader)
    padded = 0 if reader is None else padded_width(width)
    shape = layer_norm_shape(node, width, padded, quantized=factors is not None)
    written = [assembly.declare(value) for value in node.outputs]
    dtypes = tuple(assembly.storage(value) for value in (x, residual or x, *node.outputs))
    kernel = assembly.kernel("layer_norm", layer_norm, shape, dtypes, assembly.multiprocessors)
    label = node.name or kernel
    read = [assembly.tensor(v) for v in (x, residual, scale, shift) if v is not None]
    if factors is not None:
        read.append(assembly.constant(f"{label}.factors", factors))
    if reader is not None:
        written += declare_rows(assembly, output, factors, (shape.rows, width))
    assembly.program.calls.append(Call(kernel, (*read, *written), tuple(written), label))


def layer_norm(
    name: str, shape: LayerNormShape, dtypes: tuple[str, ...], multiprocessors: int
) -> CudaKernel:
    """Generate a normalisation.

    Arguments of the kernel, those that there are: x `[rows, width]`, residual, scale `[width]`,
    shift `[width]`, factors `[width]`, y, sum; then q, step and zero point as `quantise_rows` has
    them.

    Args:
        name: of the function.
        shape: what is done.
        dtypes: of x, residual, y, and the sum where it is read.
        multiprocessors: of the GPU.
    """
    narrowest = min(np.dtype(dtype).itemsize for dtype in dtypes)
    walk = walk_rows(shape.rows, shape.width, narrowest, multiprocessors)
    x, residual, y, total = (C_TYPES[dtype] for dtype in (*dtypes, dtypes[2])[:4])
    quantised = shape.padded > 0
    declared = {
        "x": (f"const {x} *", True),
        "residual": (f"const {residual} *", shape.residual),
        "scale": ("const float *", shape.scaled),
        "shift": ("const float *", shape.shifted),
        "factors": ("const float *", shape.factors),
        "y": (f"{y} *", True),
        "sum": (f"{total} *", shape.sum_read),
        "q": ("int8_t *", quantised),
        "step": ("float *", quantised),
        "zero_point": ("int32_t *", quantised),
    }
    parameters = [f"{kind}{key}" for key, (kind, there) in declared.items() if there]
    operands = [key if there else "nullptr" for key, (_, there) in declared.items()]
    operands[-3:] = [f"{{{', '.join(operands[-3:])}}}"]
    parts = (
        shape.centred,
        shape.residual,
        shape.scaled,
        shape.shifted,
        shape.sum_read,
        quantised,
        shape.factors,
    )
    flags = ", ".join(str(part).lower() for part in parts)
    types = f"{x}, {residual}, {y}, {total}, {max(shape.padded, 1)}"
    body = (
        f"LayerNormOperands<{types}> of = {{{', '.join(operands)}}};\n    "
        f"layer_norm<{walk.source}, LayerNormParts<{flags}>>"
        f"(of, {walk.rows}, {float_literal(float(np.float32(shape.epsilon)))});"
    )
    return _kernel(name, walk, parameters, body, ("layer_norm.cuh",))


def _kernel(
    name: str, walk: RowWalk, parameters: Sequence[str], body: str, headers: tuple[str, ...]
) -> CudaKernel:
    source = (
        f'extern "C" __global__ void __launch_bounds__({walk.block[0]})\n'
        f"{name}({', '.join(parameters)})\n{{\n    {body}\n}}\n"
    )
    return CudaKernel(name, source, headers, walk.grid, walk.block, overlaps=True)
