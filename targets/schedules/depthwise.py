"""Depthwise convolution: every channel has its own window.

NHWC. A tile is `columns` neighbouring output pixels of one vector of channels; each input column is
loaded once per kernel row and used by every output pixel whose window covers it. Weights are
widened when the model is compiled and packed `[channel blocks][taps of the window][lanes]`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgepress.targets.isa.base import Isa
from edgepress.targets.schedules.emit import Buffer, Expr, Kernel, cast, chunks, load
from edgepress.targets.schedules.epilogue import Epilogue, Requantise, factor_dtype, finish
from edgepress.targets.schedules.window import WindowShape

Array = npt.NDArray[Any]
_PARALLEL_MACS = 500_000  # below this, waking a second thread costs more than it saves
_MOST_COLUMNS = 7


def pack_weights(weights: Array, isa: Isa) -> Array:
    """Pack `[channels, 1, kh, kw]` weights; integers become int16."""
    channels = weights.shape[0]
    taps = weights.reshape(channels, -1).astype(
        np.float32 if weights.dtype == np.float32 else np.int16
    )
    parts = []
    for first, lanes, count in chunks(channels, isa.lanes):
        block = taps[first : first + lanes * count].reshape(count, lanes, -1)
        parts.append(block.transpose(0, 2, 1).ravel())
    return np.concatenate(parts)


def depthwise(name: str, shape: WindowShape, isa: Isa, epilogue: Epilogue) -> Any:
    """Generate the kernel.

    Arguments of the kernel: x (padded), weights (packed), bias `[channels]`, for integers the
    multipliers or shifts `[channels]`, y `[batch, out_height, out_width, channels]`.
    """
    quantized = isinstance(epilogue, Requantise)
    kernel = Kernel(name)
    taps = shape.taps
    accumulator = "int32" if quantized else "float32"
    size = shape.batch * shape.height * shape.width * shape.channels
    x = kernel.argument("x", isa.storage if quantized else "float32", size)
    weights = kernel.argument("weights", "int16" if quantized else "float32", shape.channels * taps)
    bias = kernel.argument("bias", accumulator, shape.channels)
    multiplier = None
    if isinstance(epilogue, Requantise):
        multiplier = kernel.argument("multiplier", factor_dtype(epilogue), shape.channels)
    lines = shape.lines
    y = kernel.argument("y", epilogue.dtype, lines * shape.out_width * shape.channels)

    def tile(
        line: Expr, first: Expr, columns: int, channel: Expr, w_base: Expr, lanes: int
    ) -> None:
        top = _input_line(line, shape)
        left = kernel.let(
            "left", (top * shape.width + first * shape.strides[1]) * shape.channels + channel
        )
        start = kernel.let("start", load(bias, channel, lanes))
        held = [kernel.registers("held", accumulator, lanes) for _ in range(columns)]
        for register in held:
            kernel.store(register, 0, start, lanes)
        for window_row in range(shape.kernel[0]):
            _accumulate_row(kernel, shape, isa, held, x, weights, left, w_base, window_row, lanes)
        scale = None if multiplier is None else kernel.let("s", load(multiplier, channel, lanes))
        pixel = kernel.let("pixel", (line * shape.out_width + first) * shape.channels + channel)
        for column, register in enumerate(held):
            value = finish(load(register, 0, lanes), scale, epilogue, lanes)
            kernel.store(y, pixel + column * shape.channels, value, lanes)

    count = -(-shape.out_width // _MOST_COLUMNS)
    columns = -(-shape.out_width // count)
    full, rest = divmod(shape.out_width, columns)
    with kernel.loop("line", lines, parallel=shape.reads >= _PARALLEL_MACS) as line:
        for first, lanes, blocks in chunks(shape.channels, isa.lanes):
            with kernel.loop("block", blocks) as block:
                channel = kernel.let("channel", block * lanes + first)
                w_base = kernel.let("w_base", channel * taps)
                with kernel.loop("tile", full) as index:
                    tile(line, index * columns, columns, channel, w_base, lanes)
                if rest:
                    tile(line, full * columns, rest, channel, w_base, lanes)
    return kernel.finish()


def _input_line(line: Expr, shape: WindowShape) -> Expr:
    if shape.batch == 1:
        return line * shape.strides[0]
    image, row = line // shape.out_height, line % shape.out_height
    return image * shape.height + row * shape.strides[0]


def _accumulate_row(
    kernel: Kernel,
    shape: WindowShape,
    isa: Isa,
    held: list[Buffer],
    x: Buffer,
    weights: Buffer,
    left: Expr,
    w_base: Expr,
    window_row: int,
    lanes: int,
) -> None:
    """Add one row of the window to every accumulator of a tile."""
    stride, dilation = shape.strides[1], shape.dilations[1]
    quantized = isa.storage if held[0].dtype == "int32" else None
    taps = []
    for window_column in range(shape.kernel[1]):
        index = w_base + (window_row * shape.kernel[1] + window_column) * lanes
        tap = load(weights, index, lanes)
        taps.append(kernel.let("w", cast(tap, "int32", lanes) if quantized else tap))
    row = window_row * shape.dilations[0] * shape.width
    uses: dict[int, list[tuple[int, int]]] = {}
    for pixel in range(len(held)):
        for window_column in range(shape.kernel[1]):
            column = pixel * stride + window_column * dilation
            uses.setdefault(column, []).append((pixel, window_column))
    for column in sorted(uses):
        value = load(x, left + (row + column) * shape.channels, lanes)
        value = kernel.let("x", cast(value, "int32", lanes) if quantized else value)
        for pixel, window_column in uses[column]:
            total = load(held[pixel], 0, lanes)
            if quantized:
                total = isa.multiply_add(total, value, taps[window_column])
            else:
                total = total + value * taps[window_column]
            kernel.store(held[pixel], 0, total, lanes)
