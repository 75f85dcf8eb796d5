"""Rows quantized at run time: where they are kept, and the kernel that makes them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepress.targets.cuda.assembly import CudaAssembly
from edgepress.targets.cuda.kernel import C_TYPES, CudaKernel
from edgepress.targets.cuda.row_walk import walk_rows
from edgepress.targets.program import Array, Call

_STEP = 64  # a product reads rows in pieces of so many


def quantised_rows(
    assembly: CudaAssembly, x: ir.Value, factors: Array | None, size: tuple[int, int]
) -> tuple[str, str, str]:
    """Return the tensors of a value's quantized rows, of their steps and zero points.

    They are made where nothing has made them before. `factors` multiply the rows first; `size` is
    rows and width.
    """
    source = assembly.tensor(x)
    key = _key(source, factors, size)
    if key not in assembly.quantized_rows:
        kernel = assembly.kernel(
            "quantise_rows",
            quantise_rows,
            *size,
            assembly.storage(x),
            factors is not None,
            assembly.multiprocessors,
        )
        constants = [] if factors is None else [assembly.constant(f"{x.name}.factors", factors)]
        made = declare_rows(assembly, x, factors, size)
        label = f"{x.name} (rows)"
        assembly.program.calls.append(Call(kernel, (source, *constants, *made), made, label))
    return assembly.quantized_rows[key]


def declare_rows(
    assembly: CudaAssembly, x: ir.Value, factors: Array | None, size: tuple[int, int]
) -> tuple[str, str, str]:
    """Add the tensors of a value's quantized rows, which products of it find from now on.

    What is called next must fill them.
    """
    rows, width = size
    made = (
        assembly.scratch(f"{x.name}_rows", "int8", (rows, padded_width(width))),
        assembly.scratch(f"{x.name}_steps", "float32", (rows,)),
        assembly.scratch(f"{x.name}_zero_points", "int32", (rows,)),
    )
    assembly.quantized_rows[_key(assembly.tensor(x), factors, size)] = made
    return made


def padded_width(width: int) -> int:
    """Return the width of quantized rows: whole pieces of a product.

    >>> padded_width(65)
    128
    """
    return -(-width // _STEP) * _STEP


def quantise_rows(
    name: str, rows: int, width: int, dtype: str, scaled: bool, multiprocessors: int
) -> CudaKernel:
    """Generate the quantization of every row of x `[rows, width]`.

    Arguments of the kernel: x, where `scaled` the factors `[width]` float32 that multiply it first,
    q `[rows, padded width]` int8, zeros behind `width`, step `[rows]` float32, zero point `[rows]`
    int32. Steps and zero points are those of docs/integer.md less 128.
    """
    walk = walk_rows(rows, width, np.dtype(dtype).itemsize, multiprocessors)
    factors = "const float *factors, " if scaled else ""
    given, padded = "factors" if scaled else "nullptr", padded_width(width)
    source = (
        f'extern "C" __global__ void __launch_bounds__({walk.block[0]})\n'
        f"{name}(const {C_TYPES[dtype]} *x, {factors}int8_t *q, float *step, "
        "int32_t *zero_point)\n{\n"
        f"    QuantisedRows<{padded}> made = {{q, step, zero_point}};\n"
        f"    quantise_rows<{walk.source}, {str(scaled).lower()}>(x, {given}, made, {rows});\n}}\n"
    )
    headers = ("quantised_rows.cuh",)
    return CudaKernel(name, source, headers, walk.grid, walk.block, overlaps=True)


def _key(source: str, factors: Array | None, size: tuple[int, int]) -> tuple[object, ...]:
    """Tell quantized rows apart by the tensor, what multiplies it first, and their size."""
    return source, None if factors is None else factors.tobytes(), size
