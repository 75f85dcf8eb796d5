"""Convolution as tiles of output pixels × output channels held in registers.

NHWC. One tile is `rows` neighbouring pixels of one output row and `columns` vectors of output
channels: `rows * columns` accumulators that never leave registers while the reduction over
kernel height and (kernel width × input channels) runs. Each step loads `columns` weight vectors
and, per pixel, one group of inputs that is repeated to all lanes. The epilogue adds nothing to
memory traffic: bias is where accumulators start, and requantisation or clipping happens on the way
out. A 1×1 convolution with stride 1 and a fully connected layer are the same kernel on one long
row.

Weights are packed `[groups][blocks][kernel height][steps][columns * lanes][group]` (`steps` is
kernel width × channels / group), padded with zeros to whole vectors of output channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepress.targets.isa.base import Isa
from edgepress.targets.schedules.emit import (
    Buffer,
    Expr,
    Kernel,
    cast,
    chunks,
    lanes_of,
    load,
    repeat,
)
from edgepress.targets.schedules.epilogue import Epilogue, Requantise, factor_dtype, finish

Array = npt.NDArray[Any]
_PARALLEL_MACS = 2_000_000  # below this, waking a second thread costs more than it saves


@dataclass(frozen=True)
class ConvShape:
    """Geometry of a convolution whose input is already padded.

    Attributes:
        batch, height, width: of the staged input.
        channels: staged input channels of one group, a multiple of `step(isa)` where quantized.
        out_height, out_width, out_channels: of the output; `out_channels` counts all groups.
        kernel, strides, dilations: `(height, width)`.
        groups: how many independent convolutions share the channels.
    """

    batch: int
    height: int
    width: int
    channels: int
    out_height: int
    out_width: int
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        pixels = self.batch * self.out_height * self.out_width
        return pixels * self.out_channels * self.channels * self.kernel[0] * self.kernel[1]

    def flattened(self) -> ConvShape:
        """Return the shape as one long row where every output pixel reads one input pixel."""
        same = (self.out_height, self.out_width) == (self.height, self.width)
        if self.kernel != (1, 1) or self.strides != (1, 1) or not same:
            return self
        pixels = self.batch * self.height * self.width
        return replace(self, batch=1, height=1, width=pixels, out_height=1, out_width=pixels)


@dataclass(frozen=True)
class Tile:
    """Pixels and channel vectors that one set of accumulators covers."""

    rows: int
    columns: int


def step(isa: Isa, quantized: bool) -> int:
    """Return how many input channels one reduction step reads."""
    if not quantized:
        return 1
    return 4 if isa.group == 1 else isa.group


def choose_tile(shape: ConvShape, isa: Isa, quantized: bool) -> Tile:
    """Pick the tile whose instruction count over the whole layer is least."""
    shape = shape.flattened()
    vectors = -(-shape.out_channels // shape.groups // isa.lanes)
    widening = quantized and isa.staged == "int16"
    products = 2 if quantized and isa.group == 2 else 1
    best, best_cost = Tile(1, 1), float("inf")
    for columns in range(1, min(vectors, 4) + 1):
        for most_rows in range(1, 29):
            held = most_rows * columns + columns + (most_rows if isa.group == 1 else 1) + widening
            if held > isa.vector_registers:
                break
            count = -(-shape.out_width // most_rows)
            rows = -(-shape.out_width // count)
            cost = 0.0
            for height, tiles in ((rows, shape.out_width // rows), (shape.out_width % rows, 1)):
                for width, blocks in ((columns, vectors // columns), (vectors % columns, 1)):
                    if height and width:
                        loads = 0.55 * (height + width * (2 if widening else 1))
                        work = max(height * width * products, loads, 5)
                        cost += tiles * blocks * (work + 0.1 * loads)
            if cost < best_cost:
                best, best_cost = Tile(rows, columns), cost
    return best


def _blocks(shape: ConvShape, isa: Isa, tile: Tile) -> tuple[int, int, int]:
    """Return (full blocks, vectors of the last block, valid lanes of its last vector)."""
    channels = shape.out_channels // shape.groups
    full = channels // isa.lanes // tile.columns
    rest = channels - full * tile.columns * isa.lanes
    vectors = -(-rest // isa.lanes)
    return full, vectors, rest - (vectors - 1) * isa.lanes if vectors else 0


def pack_weights(weights: Array, shape: ConvShape, isa: Isa, tile: Tile) -> Array:
    """Pack `[out, in / groups, kh, kw]` weights for the kernel of the same shape and tile.

    Where `shape.channels` exceeds `in / groups`, the missing input channels are zeros.
    """
    out, given, height, width = weights.shape
    group = 1 if weights.dtype == np.float32 else isa.group
    per_group = out // shape.groups
    padded = np.zeros((out, height, width, shape.channels), weights.dtype)
    padded[..., :given] = weights.transpose(0, 2, 3, 1)
    full, last, _ = _blocks(shape, isa, tile)
    widths = [tile.columns * isa.lanes] * full + ([last * isa.lanes] if last else [])
    parts = []
    for first_of_group in range(0, out, per_group):
        first = first_of_group
        for lanes in widths:
            block = np.zeros((lanes, height, width * shape.channels // group, group), weights.dtype)
            stop = min(first + lanes, first_of_group + per_group)
            block[: stop - first] = padded[first:stop].reshape(-1, *block.shape[1:])
            parts.append(block.transpose(1, 2, 0, 3).ravel())
            first = stop
    return np.concatenate(parts)


def pack_channels(values: Array, shape: ConvShape, isa: Isa) -> Array:
    """Pad per-channel values `[out]` to whole vectors in every group."""
    per_group = shape.out_channels // shape.groups
    vectors = -(-per_group // isa.lanes)
    packed = np.zeros((shape.groups, vectors * isa.lanes), values.dtype)
    packed[:, :per_group] = values.reshape(shape.groups, per_group)
    return packed.ravel()


def conv(
    name: str,
    shape: ConvShape,
    isa: Isa,
    epilogue: Epilogue,
    tile: Tile,
    weights_dtype: str = "int8",
) -> Any:
    """Generate the kernel.

    Arguments of the kernel: x (staged), weights (packed; int8 or int16 for integers), bias
    (packed), for integers the multipliers or shifts (packed), y `[batch, out_height, out_width,
    out_channels]`.
    """
    shape = shape.flattened()
    quantized = isinstance(epilogue, Requantise)
    kernel = Kernel(name)
    TileWriter(kernel, shape, isa, epilogue, tile, weights_dtype if quantized else "float32").tiles(
        tile
    )
    return kernel.finish()


class TileWriter:
    """Emits tiles; holds what every tile of one kernel has in common."""

    def __init__(
        self,
        kernel: Kernel,
        shape: ConvShape,
        isa: Isa,
        epilogue: Epilogue,
        tile: Tile,
        weights_dtype: str,
    ) -> None:
        self.kernel, self.shape, self.isa, self.epilogue = kernel, shape, isa, epilogue
        self.quantized, self.columns = weights_dtype != "float32", tile.columns
        quantized = self.quantized
        self.group = isa.group if quantized else 1
        self.step = step(isa, quantized)
        self.pitch = shape.channels * shape.groups
        vectors = -(-(shape.out_channels // shape.groups) // isa.lanes)
        self.packed = vectors * isa.lanes
        self.full, self.last, self.last_lanes = _blocks(shape, isa, tile)
        # Neighbouring columns of the kernel window lie next to each other in memory, so that both
        # reductions are one.
        joined = shape.dilations[1] == 1 and shape.groups == 1
        kernel_height, kernel_width = shape.kernel
        self.window_columns = 1 if joined else kernel_width
        self.steps = (kernel_width if joined else 1) * shape.channels // self.step
        self.weights_per_lane = kernel_height * kernel_width * shape.channels
        staged = isa.staged if quantized else "float32"
        size = shape.batch * shape.height * shape.width * self.pitch
        channels = self.packed * shape.groups
        self.x = kernel.argument("x", staged, size)
        self.weights_dtype = weights_dtype
        self.weights = kernel.argument("weights", weights_dtype, channels * self.weights_per_lane)
        self.accumulator = "int32" if quantized else "float32"
        self.declare(channels)
        outputs = shape.batch * shape.out_height * shape.out_width * shape.out_channels
        self.y = kernel.argument("y", epilogue.dtype, outputs)

    def declare(self, channels: int) -> None:
        """Declare the arguments between the weights and the outputs."""
        self.bias = self.kernel.argument("bias", self.accumulator, channels)
        self.multiplier = None
        if isinstance(self.epilogue, Requantise):
            dtype = factor_dtype(self.epilogue)
            self.multiplier = self.kernel.argument("multiplier", dtype, channels)

    def tiles(self, tile: Tile) -> None:
        """Emit the whole layer."""
        kernel, shape = self.kernel, self.shape
        full_tiles, last_rows = divmod(shape.out_width, tile.rows)
        lines = shape.batch * shape.out_height
        threaded = shape.macs >= _PARALLEL_MACS
        by_line = threaded and lines > 1
        with kernel.loop("line", lines, parallel=by_line) as line:
            many = threaded and not by_line and full_tiles > 1
            if full_tiles:
                with kernel.loop("tile", full_tiles, parallel=many) as index:
                    self.tile(
                        line, index * tile.rows, tile.rows, threaded and lines * full_tiles == 1
                    )
            if last_rows:
                self.tile(line, full_tiles * tile.rows, last_rows, False)

    def tile(self, line: Expr, first: Expr, rows: int, parallel: bool) -> None:
        """Emit all output channels of `rows` pixels that start at column `first` of a line."""
        shape = self.shape
        image = line // shape.out_height if shape.batch > 1 else 0
        row = line % shape.out_height if shape.batch > 1 else line
        top = (image * shape.height + row * shape.strides[0]) * shape.width
        corner = self.kernel.let("corner", (top + first * shape.strides[1]) * self.pitch)
        pixel = self.kernel.let("pixel", (line * shape.out_width + first) * shape.out_channels)
        with self.kernel.loop("group", shape.groups) as group:
            if self.full:
                with self.kernel.loop("block", self.full, parallel) as block:
                    self.block(corner, pixel, group, block, rows, self.columns, self.isa.lanes)
            if self.last:
                self.block(corner, pixel, group, self.full, rows, self.last, self.last_lanes)

    def block(
        self,
        corner: Expr,
        pixel: Expr,
        group: Expr,
        block: Expr,
        rows: int,
        columns: int,
        last_lanes: int,
    ) -> None:
        """Emit one set of accumulators: start at the bias, reduce, finish and store."""
        kernel, shape, lanes = self.kernel, self.shape, self.isa.lanes
        channel = kernel.let("channel", group * self.packed + block * (self.columns * lanes))
        x_base = kernel.let("x_base", corner + group * shape.channels)
        w_base = kernel.let("w_base", channel * self.weights_per_lane)
        held = [
            [kernel.registers("held", self.accumulator, lanes) for _ in range(columns)]
            for _ in range(rows)
        ]
        self.begin(held, channel)
        with (
            kernel.loop("window_row", shape.kernel[0]) as window_row,
            kernel.loop("window_column", self.window_columns) as window_column,
            kernel.loop("k", self.steps) as k,
        ):
            offset = window_row * (shape.dilations[0] * shape.width * self.pitch)
            offset += window_column * (shape.dilations[1] * self.pitch) + k * self.step
            done = (window_row * self.window_columns + window_column) * self.steps + k
            width = self.step * columns * lanes
            self.reduce(held, x_base + offset, w_base + done * width)
        out_channel = group * (shape.out_channels // shape.groups) + block * (self.columns * lanes)
        y_base = kernel.let("y_base", pixel + out_channel)
        self.end(held, channel, y_base, last_lanes)

    def begin(self, held: list[list[Buffer]], channel: Expr) -> None:
        """Start all accumulators at the bias."""
        lanes = self.isa.lanes
        for column in range(len(held[0])):
            bias = load(self.bias, channel + column * lanes, lanes)
            start = self.kernel.let("start", bias)
            for accumulators in held:
                self.kernel.store(accumulators[column], 0, start, lanes)

    def end(self, held: list[list[Buffer]], channel: Expr, y_base: Expr, last_lanes: int) -> None:
        """Turn all accumulators into outputs; the last vector has `last_lanes` of them."""
        kernel, lanes, columns = self.kernel, self.isa.lanes, len(held[0])
        for column in range(columns):
            valid = last_lanes if column == columns - 1 else lanes
            scale = None
            if self.multiplier is not None:
                scale = kernel.let("scale", load(self.multiplier, channel + column * lanes, lanes))
            for row, accumulators in enumerate(held):
                accumulator = load(accumulators[column], 0, lanes)
                value = kernel.let("value", finish(accumulator, scale, self.epilogue, lanes))
                self.store(y_base + row * self.shape.out_channels + column * lanes, value, valid)

    def reduce(self, held: list[list[Buffer]], x_index: Expr, w_index: Expr) -> None:
        """Emit one reduction step: every input of the step times every weight vector."""
        kernel, lanes, group = self.kernel, self.isa.lanes, self.group
        rows, columns = len(held), len(held[0])
        stride = self.shape.strides[1] * self.pitch
        x_index, w_index = kernel.let("x_at", x_index), kernel.let("w_at", w_index)
        inputs = []
        if self.step > group:
            inputs = [
                kernel.let("x", load(self.x, x_index + row * stride, self.step))
                for row in range(rows)
            ]
        for part in range(self.step // group):
            weights = self.weight_vectors(w_index + part * columns * lanes * group, columns)
            for row in range(rows):
                if inputs:
                    x = lanes_of(inputs[row], part * group, group, self.step)
                else:
                    x = kernel.let("x", load(self.x, x_index + row * stride, group))
                for column in range(columns):
                    total = load(held[row][column], 0, lanes)
                    if self.quantized:
                        total = self.isa.dot(total, x, weights[column])
                    else:
                        total = total + repeat(x, lanes) * weights[column]
                    kernel.store(held[row][column], 0, total, lanes)

    def weight_vectors(self, index: Expr, columns: int) -> list[Expr]:
        """Load one weight vector per column."""
        kernel, width = self.kernel, self.isa.lanes * self.group
        if self.weights_dtype != "int8" or width >= 16 or self.isa.lanes == 1:
            parts = (load(self.weights, index + c * width, width) for c in range(columns))
            return [kernel.let("w", part) for part in parts]
        # Eight bytes a load, widened to the two halves of one register: less would mean more
        # loads than products.
        weights = []
        for column in range(0, columns, 2):
            pair = min(2, columns - column) * width
            narrow = load(self.weights, index + column * width, pair)
            wide = kernel.let("wide", cast(narrow, "int16", pair))
            for half in range(0, pair, width):
                weights.append(kernel.let("w", lanes_of(wide, half, width, pair)))
        return weights

    def store(self, index: Expr, value: Expr, valid: int) -> None:
        """Store the first `valid` lanes."""
        for first, lanes, count in chunks(valid, self.isa.lanes):
            for i in range(count):
                at = first + i * lanes
                self.kernel.store(
                    self.y, index + at, lanes_of(value, at, lanes, self.isa.lanes), lanes
                )
