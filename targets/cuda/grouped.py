"""Convolutions in groups, and products that tensor cores do not suit: `kernels/grouped.cuh`."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepress.targets.cuda.assembly import CudaAssembly
from edgepress.targets.cuda.epilogue import HEADERS, finish_source
from edgepress.targets.cuda.grouped_tile import RESIDENT_THREADS, GroupedTile, choose_tile
from edgepress.targets.cuda.kernel import C_TYPES, CudaKernel, constants_source
from edgepress.targets.cuda.strip_operands import WORD_BYTES, Operands, operands_of
from edgepress.targets.cuda.strips import Strips, strips_of
from edgepress.targets.cuda.window import Window, window_of
from edgepress.targets.lowering.dialect import shape_of
from edgepress.targets.lowering.node_attributes import (
    constant_of,
    epilogue_of,
    integer_of,
    operand_of,
    residual_of,
)
from edgepress.targets.lowering.operands import centred_bias
from edgepress.targets.schedules.epilogue import Added, Epilogue, Requantise, first_step

Array = npt.NDArray[Any]


def call_grouped(assembly: CudaAssembly, node: ir.Node) -> None:
    """Convolve in any number of groups, any dtypes."""
    weights = constant_of(node, 1)
    _call(assembly, node, flattened(window_of(node)), integer_of(node, "group"), weights)


def call_grouped_gemm(assembly: CudaAssembly, node: ir.Node) -> None:
    """Multiply rows by a matrix `[outputs, inputs]`, any dtypes."""
    weights = constant_of(node, 1)
    outputs, inputs = weights.shape
    rows = math.prod(shape_of(operand_of(node.inputs[0]))) // inputs
    window = Window(1, 1, rows, inputs, 1, rows, outputs)
    _call(assembly, node, window, 1, weights[:, :, None, None])


def flattened(window: Window) -> Window:
    """Return a window of one pixel as one line of pixels, others as they are."""
    size, out = (window.height, window.width), (window.out_height, window.out_width)
    if window.kernel != (1, 1) or window.strides != (1, 1) or any(window.pads) or size != out:
        return window
    pixels = window.batch * math.prod(size)
    return Window(1, 1, pixels, window.channels, 1, pixels, window.out_channels)


def _call(
    assembly: CudaAssembly, node: ir.Node, window: Window, groups: int, weights: Array
) -> None:
    """Call the kernel of a convolution whose weights are `[out, in / groups, kh, kw]`."""
    epilogue, residual = epilogue_of(node), residual_of(node)
    label = node.name or node.outputs[0].name or "conv"
    x = assembly.tensor(operand_of(node.inputs[0]))
    added = [] if residual is None else [assembly.tensor(residual)]
    y = assembly.declare(node.outputs[0])
    words = weights.shape[1] % WORD_BYTES == 0
    operands = operands_of(assembly, node, assembly.program.tensors[y].dtype, words)
    if residual is not None:
        operands = replace(operands, residual=assembly.storage(residual))
    tile = choose_tile(window, groups, operands, assembly.multiprocessors)
    strips = grouped_strips(window, operands, tile, assembly.multiprocessors)
    constants = {"weights": pack_weights(weights, operands), "bias": constant_of(node, 2)}
    if operands.quantized:
        constants["bias"] = centred_bias(constants["bias"], weights, operands.centred_at)
        constants["multipliers"] = constant_of(node, 3)
    arguments = [
        x,
        *(assembly.constant(f"{label}.{key}", array) for key, array in constants.items()),
        *added,
    ]
    options = (window, groups, operands, tile, strips, epilogue)
    kind = "qgrouped" if operands.quantized else "grouped"
    assembly.call(assembly.kernel(kind, grouped, *options), arguments, y, label)


def grouped_strips(
    window: Window, operands: Operands, tile: GroupedTile, multiprocessors: int
) -> Strips:
    """Return how threads lie in blocks."""
    return strips_of(
        window,
        1,
        tile.columns,
        window.out_channels // tile.outputs,
        tile.outputs * operands.weight_bytes * operands.per_x,
        multiprocessors,
        tile.sharing,
    )


def pack_weights(weights: Array, operands: Operands) -> Array:
    """Order weights `[out, in / groups, kh, kw]` as `[kh, kw, in / groups, out]`.

    Words are int32, `[kh, kw, in / groups / 4, out]`; float16 is given as its bits, in int16.
    """
    ordered = weights.transpose(2, 3, 1, 0).astype(operands.weights)
    if operands.words:
        height, width, inputs, outputs = ordered.shape
        fours = ordered.reshape(height, width, inputs // WORD_BYTES, WORD_BYTES, outputs)
        return np.ascontiguousarray(fours.swapaxes(3, 4)).view(np.int32)[..., 0]
    ordered = np.ascontiguousarray(ordered)
    return ordered.view(np.int16) if operands.weights == "float16" else ordered


def grouped(
    name: str,
    window: Window,
    groups: int,
    operands: Operands,
    tile: GroupedTile,
    strips: Strips,
    epilogue: Epilogue,
) -> CudaKernel:
    """Return the kernel.

    Its arguments: x, weights (`pack_weights`), bias (with the zero point folded in as if borders
    were there), for integers the multipliers or shifts, the residual where one is added, y.
    """
    constants = {
        **strips.constants(window),
        "OUTPUTS": tile.outputs,
        "INPUTS": tile.inputs,
        "GROUP_INPUTS": window.channels // groups // operands.per_x,
        "GROUP_OUTPUTS": window.out_channels // groups,
        "PIXEL": window.channels // operands.per_x,
        "TAPS_AT_ONCE": tile.taps,
        "UNROLL": tile.unroll,
        "SIGNS": operands.signs,
    }
    quantized = isinstance(first_step(epilogue), Requantise)
    added, finish = isinstance(epilogue, Added), f"{name}_finish"
    parameters = [
        f"const {C_TYPES[operands.x]} *x",
        f"const {operands.weights_type} *__restrict__ weights",
        f"const {'int32_t' if quantized else 'float'} *bias",
        *([f"const {finish}::Factor *factors"] if quantized else []),
        *([f"const {finish}::Residual *residual"] if added else []),
        f"{finish}::Output *y",
    ]
    arguments = [
        operands.x_source,
        "weights",
        "bias",
        "factors" if quantized else "nullptr",
        "residual" if added else "nullptr",
        "y",
        operands.fill_source,
    ]
    x, y, z = strips.block
    resident = max(RESIDENT_THREADS // (x * y * z), 1)
    source = [
        finish_source(finish, epilogue, operands.y, operands.residual),
        constants_source(f"{name}_shape", constants),
        f'extern "C" __global__ void __launch_bounds__({x * y * z}, {resident})',
        f"{name}({', '.join(parameters)})",
        "{",
        f"    grouped<{name}_shape, {finish}>({', '.join(arguments)});",
        "}",
        "",
    ]
    headers = (*HEADERS, "strips.cuh", "grouped.cuh")
    return CudaKernel(
        name, "\n".join(source), headers, strips.grid(window), strips.block, overlaps=True
    )
