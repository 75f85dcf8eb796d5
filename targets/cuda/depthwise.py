"""Depthwise convolutions on a GPU: `kernels/depthwise.cuh`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepress.targets.cuda.assembly import CudaAssembly
from edgepress.targets.cuda.depthwise_tile import (
    RESIDENT_THREADS,
    DepthwiseTile,
    choose_tile,
    input_rows,
    weight_vectors,
)
from edgepress.targets.cuda.epilogue import HEADERS, finish_source
from edgepress.targets.cuda.kernel import C_TYPES, CudaKernel, constants_source
from edgepress.targets.cuda.strip_operands import WORD_BYTES, Operands, operands_of
from edgepress.targets.cuda.strips import Strips, strips_of
from edgepress.targets.cuda.window import Window, window_of
from edgepress.targets.lowering.node_attributes import (
    constant_of,
    epilogue_of,
    operand_of,
)
from edgepress.targets.lowering.operands import centred_bias
from edgepress.targets.schedules.epilogue import Epilogue, Requantise

Array = npt.NDArray[Any]


def call_depthwise(assembly: CudaAssembly, node: ir.Node) -> None:
    """Convolve the input of a depthwise convolution where it lies."""
    epilogue, window = epilogue_of(node), window_of(node)
    weights, bias = constant_of(node, 1), constant_of(node, 2)
    x = assembly.tensor(operand_of(node.inputs[0]))
    y = assembly.declare(node.outputs[0])
    words = window.channels % WORD_BYTES == 0
    operands = operands_of(assembly, node, assembly.program.tensors[y].dtype, words)
    tile = choose_tile(window, operands, assembly.multiprocessors)
    strips = depthwise_strips(window, operands, tile, assembly.multiprocessors)
    label = node.name or node.outputs[0].name or "conv"
    constants = {"weights": pack_weights(weights, window, operands, tile), "bias": bias}
    if operands.quantized:
        constants["bias"] = centred_bias(bias, weights, operands.centred_at)
        constants["multipliers"] = constant_of(node, 3)
    arguments = [
        x,
        *(assembly.constant(f"{label}.{key}", array) for key, array in constants.items()),
    ]
    kind = "qdepthwise" if operands.quantized else "depthwise"
    kernel = assembly.kernel(kind, depthwise, window, operands, tile, strips, epilogue)
    assembly.call(kernel, arguments, y, label)


def depthwise_strips(
    window: Window, operands: Operands, tile: DepthwiseTile, multiprocessors: int
) -> Strips:
    """Return how threads lie in blocks."""
    parts, part_bytes = window.channels // tile.lanes, tile.lanes * operands.x_bytes
    return strips_of(window, tile.rows, tile.columns, parts, part_bytes, multiprocessors)


def pack_weights(weights: Array, window: Window, operands: Operands, tile: DepthwiseTile) -> Array:
    """Order weights `[channels, 1, kh, kw]` as `[kh, kw, channels]`, or as `packed_words`.

    float16 is given as its bits, in int16.
    """
    if operands.words:
        return packed_words(weights[:, 0], window, tile)
    taps = np.ascontiguousarray(weights[:, 0].transpose(1, 2, 0)).astype(operands.weights)
    return taps.view(np.int16) if operands.weights == "float16" else taps


def packed_words(weights: Array, window: Window, tile: DepthwiseTile) -> Array:
    """Order weights `[channels, kh, kw]` as words `[four rows, output row, kw, channels]`, int32.

    A word has a byte for each of four rows that a strip reads, where `transpose_bytes` of
    `kernels/depthwise.cuh` puts the row; it is 0 where the output row does not see the row.
    """
    channels, height, width = weights.shape
    rows = input_rows(window, tile.rows)
    groups = -(-rows // WORD_BYTES)
    words = np.zeros((groups, tile.rows, width, channels, WORD_BYTES), np.int8)
    channel = np.arange(channels)
    for group in range(groups):
        count = min(WORD_BYTES, rows - WORD_BYTES * group) if tile.unrolled else WORD_BYTES
        for out, i in np.ndindex(tile.rows, count):
            row = WORD_BYTES * group + i - out * window.strides[0]
            if not 0 <= row < height:
                continue
            byte = {1: channel % 4, 2: channel % 2 * 2 + i}.get(count, np.full(channels, i))
            words[group, out, :, channel, byte] = weights[:, row]
    return words.view(np.int32)[..., 0]


def depthwise(
    name: str,
    window: Window,
    operands: Operands,
    tile: DepthwiseTile,
    strips: Strips,
    epilogue: Epilogue,
) -> CudaKernel:
    """Return the kernel.

    Its arguments: x, weights (`pack_weights`), bias (with the zero point folded in as if borders
    were there), for integers the multipliers or shifts, y.
    """
    constants = {
        **strips.constants(window),
        "LANES": tile.lanes,
        "TAPS_AT_ONCE": tile.taps,
        "UNROLLED": int(tile.unrolled),
        "ROWS_AT_ONCE": tile.rows_at_once,
        "HELD": weight_vectors(tile, window, operands) if tile.weights_held else 0,
        "CHANNELS_PER_X": operands.per_x,
        "SIGNS": operands.signs,
    }
    quantized, finish = isinstance(epilogue, Requantise), f"{name}_finish"
    parameters = [
        f"const {C_TYPES[operands.x]} *x",
        f"const {operands.weights_type} *weights",
        f"const {'int32_t' if quantized else 'float'} *bias",
        *([f"const {finish}::Factor *factors"] if quantized else []),
        f"{finish}::Output *y",
    ]
    arguments = [
        operands.x_source,
        "weights",
        "bias",
        "factors" if quantized else "nullptr",
        "y",
        operands.fill_source,
    ]
    x, y, z = strips.block
    resident = max(RESIDENT_THREADS // (x * y * z), 1)
    source = [
        finish_source(finish, epilogue, operands.y),
        constants_source(f"{name}_shape", constants),
        f'extern "C" __global__ void __launch_bounds__({x * y * z}, {resident})',
        f"{name}({', '.join(parameters)})",
        "{",
        f"    depthwise<{name}_shape, {finish}>({', '.join(arguments)});",
        "}",
        "",
    ]
    headers = (*HEADERS, "strips.cuh", "depthwise.cuh")
    return CudaKernel(
        name, "\n".join(source), headers, strips.grid(window), strips.block, overlaps=True
    )
