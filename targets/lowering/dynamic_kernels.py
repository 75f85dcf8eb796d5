"""Products of dynamically quantized rows become calls of two kernels; rows are quantized once."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from edgepress.targets.isa.base import Isa
from edgepress.targets.lowering.assembly import Assembly
from edgepress.targets.lowering.dialect import array_of, shape_of
from edgepress.targets.lowering.node_attributes import clip_of
from edgepress.targets.program import Array, Call
from edgepress.targets.schedules import conv
from edgepress.targets.schedules.dynamic import Product, product, quantise_rows


def dynamic_gemm(assembly: Assembly, node: ir.Node) -> None:
    """Emit the calls of a `DynamicGemm` node."""
    x = node.inputs[0]
    assert x is not None
    weights, scales, bias = (_constant(node, index) for index in (1, 2, 3))
    isa = assembly.isa.for_weights(weights)
    outputs, inputs = weights.shape
    rows = math.prod(shape_of(x)[:-1])
    channels = padded_width(inputs, isa)
    quantized = _quantized_rows(assembly, x, factors_of(node), (rows, inputs, channels))
    size = Product(rows, channels, outputs, clip_of(node))
    tile = assembly.tiles.choose("rows", size.shape, isa, True)
    kernel = assembly.kernel("dynamic_gemm", product, size, isa, tile)
    packed = {
        "weights": conv.pack_weights(weights.reshape(outputs, inputs, 1, 1), size.shape, isa, tile),
        "sums": weights.astype(np.int64).sum(axis=1).astype(np.int32),
        "scales": scales,
        "bias": bias,
    }
    label = node.name or kernel
    names = [
        assembly.constant(
            f"{label}.{key}",
            array if key == "weights" else conv.pack_channels(array, size.shape, isa),
        )
        for key, array in packed.items()
    ]
    steps, step, zero_point = quantized
    arguments = [steps, names[0], step, zero_point, *names[1:]]
    assembly.call(kernel, arguments, assembly.declare(node.outputs[0]), label)


def _quantized_rows(
    assembly: Assembly, x: ir.Value, factors: Array | None, size: tuple[int, int, int]
) -> tuple[str, str, str]:
    """Return the tensors of a value's quantized rows, of their steps and zero points."""
    source = assembly.tensor(x)
    key = _key(source, factors, size)
    if key not in assembly.quantized_rows:
        kernel = assembly.kernel(
            "quantise_rows", quantise_rows, *size, assembly.isa, factors is not None
        )
        constants = [] if factors is None else [assembly.constant(f"{x.name}.factors", factors)]
        made = declare_rows(assembly, x, factors, size)
        label = f"{x.name} (rows)"
        assembly.program.calls.append(Call(kernel, (source, *constants, *made), made, label))
    return assembly.quantized_rows[key]


def declare_rows(
    assembly: Assembly, x: ir.Value, factors: Array | None, size: tuple[int, int, int]
) -> tuple[str, str, str]:
    """Add the tensors of a value's quantized rows, which products of it find from now on.

    `factors` multiply the rows first; `size` is rows, width, padded width. What is called next must
    fill them.
    """
    rows, _, padded = size
    made = (
        assembly.scratch(f"{x.name}_rows", assembly.isa.staged, (rows, padded)),
        assembly.scratch(f"{x.name}_steps", "float32", (rows,)),
        assembly.scratch(f"{x.name}_zero_points", "int32", (rows,)),
    )
    assembly.quantized_rows[_key(assembly.tensor(x), factors, size)] = made
    return made


def _key(source: str, factors: Array | None, size: tuple[int, int, int]) -> tuple[object, ...]:
    """Tell quantized rows apart by the tensor, what multiplies it first, and their size."""
    return source, None if factors is None else factors.tobytes(), size


def padded_width(width: int, isa: Isa) -> int:
    """Return the width of quantized rows: whole steps of the product."""
    step = conv.step(isa, True)
    return -(-width // step) * step


def factors_of(node: ir.Node) -> Array | None:
    """Return what multiplies the rows of a `DynamicGemm` node before they are quantized."""
    return array_of(node.inputs[4]) if len(node.inputs) > 4 else None


def _constant(node: ir.Node, index: int) -> Array:
    array = array_of(node.inputs[index])
    assert array is not None
    return array
