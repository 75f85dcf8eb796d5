"""Products of dynamically quantized rows become calls of two kernels; rows are quantized once."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from edgepress.targets.lowering.assembly import Assembly
from edgepress.targets.lowering.dialect import array_of, shape_of
from edgepress.targets.program import Array, Call
from edgepress.targets.schedules import conv
from edgepress.targets.schedules.dynamic import Product, product, quantise_rows
from edgepress.targets.schedules.epilogue import Clip


def dynamic_gemm(assembly: Assembly, node: ir.Node) -> None:
    """Emit the calls of a `DynamicGemm` node."""
    x, isa = node.inputs[0], assembly.isa
    assert x is not None
    weights, scales, bias = (_constant(node, index) for index in (1, 2, 3))
    outputs, inputs = weights.shape
    rows = math.prod(shape_of(x)[:-1])
    channels = -(-inputs // conv.step(isa, True)) * conv.step(isa, True)
    factors = array_of(node.inputs[4]) if len(node.inputs) > 4 else None
    quantized = _quantized_rows(assembly, x, factors, (rows, inputs, channels))
    low, high = (float(node.attributes[name].as_float()) for name in ("low", "high"))
    size = Product(rows, channels, outputs, Clip(low, high))
    tile = conv.choose_tile(size.shape, isa, True)
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
    isa, source = assembly.isa, assembly.tensor(x)
    rows, _, channels = size
    scaled = factors is not None
    kernel = assembly.kernel("quantise_rows", quantise_rows, *size, isa, scaled)
    for call in assembly.program.calls:
        if call.kernel != kernel or call.arguments[0] != source:
            continue
        given = assembly.program.constants.get(call.arguments[1])
        if factors is None or (given is not None and np.array_equal(factors, given)):
            return call.outputs[0], call.outputs[1], call.outputs[2]
    made = (
        assembly.scratch(f"{x.name}_rows", isa.staged, (rows, channels)),
        assembly.scratch(f"{x.name}_steps", "float32", (rows,)),
        assembly.scratch(f"{x.name}_zero_points", "int32", (rows,)),
    )
    label = f"{x.name} (rows)"
    constants = [] if factors is None else [assembly.constant(f"{x.name}.factors", factors)]
    assembly.program.calls.append(Call(kernel, (source, *constants, *made), made, label))
    return made


def _constant(node: ir.Node, index: int) -> Array:
    array = array_of(node.inputs[index])
    assert array is not None
    return array
