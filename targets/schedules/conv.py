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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx

from edgepress.targets.isa.base import Isa
from edgepress.targets.schedules.by_element import product_cost, reach, store_cost
from edgepress.targets.schedules.conv_matrix import (
    GROUP,
    by_matrices,
    copied,
    exchange,
    held_registers,
    reduce_pairs,
    step_cost,
)
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
from edgepress.targets.schedules.epilogue import (
    Added,
    Epilogue,
    Requantise,
    factor_dtype,
    first_step,
)
from edgepress.targets.schedules.outputs import Outputs

Array = npt.NDArray[Any]
_PARALLEL_MACS = 500_000  # below this, handing over a part costs more than it saves
# LLVM unrolls short reductions inside the loop over the window's rows, and then holds inputs and
# weights of several steps at once: with a full tile of accumulators, it spills some of them.
_UNROLLED_STEPS, _UNROLLED_REGISTERS = 8, 6
_UNROLLED = 800  # products in a line of code for several blocks of channels


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

    @property
    def sizes(self) -> tuple[int, int]:
        """What a file of tiles says."""
        return self.rows, self.columns


def step(isa: Isa, quantized: bool) -> int:
    """Return how many input channels one reduction step reads."""
    if not quantized:
        return 1
    return 4 if isa.group == 1 else isa.group


def choose_tile(shape: ConvShape, isa: Isa, quantized: bool) -> Tile:
    """Pick the tile whose instruction count over the whole layer is least."""
    costs = tile_costs(shape, isa, quantized)
    return min(costs, key=costs.__getitem__, default=Tile(1, 1))


def tile_costs(shape: ConvShape, isa: Isa, quantized: bool) -> dict[Tile, float]:
    """Estimate the instructions of the whole layer for every tile that fits the registers."""
    shape = shape.flattened()
    vectors = -(-shape.out_channels // shape.groups // isa.lanes)
    spared = 1 - last_width(shape, isa) / isa.lanes  # of the last vector
    widening = quantized and isa.staged == "int16"
    short = shape.kernel[1] * shape.channels // step(isa, quantized) <= _UNROLLED_STEPS
    spread = quantized and isa.vector_bytes == 64 and shape.kernel[0] > 1 and short
    products = 2 if quantized and isa.group == 2 else 1
    costs: dict[Tile, float] = {}
    inputs_held = isa.group == 1 or isa.by_element
    steps = shape.kernel[0] * shape.kernel[1] * shape.channels / (isa.group if quantized else 1)
    matrices = by_matrices(shape.channels, shape.flattened().out_width, isa, quantized)
    for columns in range(1, min(vectors, 4) + 1):
        for most_rows in range(1, 29):
            held = most_rows * columns + columns + (most_rows if inputs_held else 1) + widening
            held += isa.temporaries if quantized else 0
            if matrices:
                held = held_registers(most_rows, columns)
            held += _UNROLLED_REGISTERS if spread else 0
            if held > isa.vector_registers:
                break
            count = -(-shape.out_width // most_rows)
            rows = -(-shape.out_width // count)
            cost = 0.0
            for height, tiles in ((rows, shape.out_width // rows), (shape.out_width % rows, 1)):
                for width, blocks in _parts(vectors, columns, spared):
                    if height and width:
                        if isa.by_element:
                            work = product_cost(height, width, isa, quantized, step(isa, quantized))
                            if matrices:
                                work = step_cost(height, width)
                            if quantized:
                                work += height * store_cost(width) / steps
                            cost += tiles * blocks * work
                            continue
                        loads = 0.55 * (height + width * (2 if widening else 1))
                        work = max(height * width * products, loads, 5)
                        cost += tiles * blocks * (work + 0.1 * loads)
            costs.setdefault(Tile(rows, columns), cost)
    return costs


def _parts(vectors: int, columns: int, spared: float) -> list[tuple[float, int]]:
    """Split vectors of channels into blocks: `(vectors, how many such blocks)`."""
    full, rest = divmod(vectors, columns)
    if spared and not rest:
        full, rest = full - 1, columns
    return [(columns, full), (rest - spared if rest else 0, 1)]


def _blocks(shape: ConvShape, isa: Isa, tile: Tile) -> tuple[int, int, int]:
    """Return (full blocks, vectors of the last block, valid lanes of its last vector)."""
    channels = shape.out_channels // shape.groups
    full = channels // isa.lanes // tile.columns
    rest = channels - full * tile.columns * isa.lanes
    vectors = -(-rest // isa.lanes)
    return full, vectors, rest - (vectors - 1) * isa.lanes if vectors else 0


def last_width(shape: ConvShape, isa: Isa) -> int:
    """Return the lanes of the last vector of channels.

    512 bits run as two halves on many cores: where half a vector is enough, it takes half the time.
    """
    half, rest = isa.lanes // 2, shape.out_channels % isa.lanes
    return half if isa.vector_bytes == 64 and shape.groups == 1 and 0 < rest <= half else isa.lanes


def pack_weights(weights: Array, shape: ConvShape, isa: Isa, tile: Tile) -> Array:
    """Pack `[out, in / groups, kh, kw]` weights for the kernel of the same shape and tile.

    Where `shape.channels` exceeds `in / groups`, the missing input channels are zeros.
    """
    out, given, height, width = weights.shape
    group = 1 if weights.dtype == np.float32 else isa.group
    group = (
        GROUP if by_matrices(shape.channels, shape.flattened().out_width, isa, group > 1) else group
    )
    per_group = out // shape.groups
    padded = np.zeros((out, height, width, shape.channels), weights.dtype)
    padded[..., :given] = weights.transpose(0, 2, 3, 1)
    full, last, _ = _blocks(shape, isa, tile)
    widths = [tile.columns * isa.lanes] * full
    if last:
        widths.append((last - 1) * isa.lanes + last_width(shape, isa))
    parts = []
    for first_of_group in range(0, out, per_group):
        first = first_of_group
        for lanes in widths:
            block = np.zeros((lanes, height, width * shape.channels // group, group), weights.dtype)
            stop = min(first + lanes, first_of_group + per_group)
            block[: stop - first] = padded[first:stop].reshape(-1, *block.shape[1:])
            packed = block.transpose(1, 2, 0, 3)
            if group == 4 and isa.by_pairs:
                by_lane = packed.reshape(*packed.shape[:2], -1, isa.lanes, 2, 2)
                packed = by_lane.swapaxes(-2, -3)
            parts.append(packed.ravel())
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
    (packed), for integers the multipliers or shifts (packed), the residual where one is added, y
    `[batch, out_height, out_width, out_channels]`.
    """
    shape = shape.flattened()
    quantized = isinstance(first_step(epilogue), Requantise)
    kernel = Kernel(name)
    TileWriter(kernel, shape, isa, epilogue, tile, weights_dtype if quantized else "float32").tiles(
        tile
    )
    return kernel.finish()


def widths_of(held: Sequence[Sequence[Buffer]]) -> list[int]:
    """Return the lanes of each vector of accumulators."""
    return [int(register.shape[0]) for register in held[0]]


class TileWriter:
    """Emits tiles; holds what every tile of one kernel has in common."""

    narrows_last = True  # whether it can make the last vector of channels half as wide

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
        self.matrices = by_matrices(shape.channels, shape.flattened().out_width, isa, quantized)
        if self.matrices:
            self.group = self.step = GROUP
        self.pitch = shape.channels * shape.groups
        vectors = -(-(shape.out_channels // shape.groups) // isa.lanes)
        self.packed = vectors * isa.lanes
        self.full, self.last, self.last_lanes = _blocks(shape, isa, tile)
        self.last_width = last_width(shape, isa) if self.narrows_last else isa.lanes
        # Neighbouring columns of the kernel window lie next to each other in memory, so that both
        # reductions are one.
        joined = shape.dilations[1] == 1 and shape.groups == 1
        kernel_height, kernel_width = shape.kernel
        self.window_columns = 1 if joined else kernel_width
        self.steps = (kernel_width if joined else 1) * shape.channels // self.step
        self.reach = (
            isa.vector_bytes // GROUP if self.matrices else reach(isa, quantized, self.step)
        )
        self.steps_per_block = kernel_height * self.window_columns * self.steps
        self.weights_per_lane = kernel_height * kernel_width * self.inputs_per_lane()
        staged = isa.staged if quantized else "float32"
        size = shape.batch * shape.height * shape.width * self.pitch
        channels = self.packed * shape.groups
        self.x = kernel.argument("x", staged, size)
        self.weights_dtype = weights_dtype
        narrower = isa.lanes - self.last_width
        lanes = channels - narrower
        self.weights = kernel.argument("weights", weights_dtype, lanes * self.weights_per_lane)
        self.accumulator = "int32" if quantized else "float32"
        self.declare(channels)
        outputs = shape.batch * shape.out_height * shape.out_width * shape.out_channels
        residual = None
        if isinstance(epilogue, Added):
            residual = kernel.argument("residual", epilogue.residual_dtype, outputs)
        y = kernel.argument("y", epilogue.dtype, outputs)
        self.outputs = Outputs(kernel, isa, epilogue, y, shape.out_channels, residual)

    def inputs_per_lane(self) -> int:
        """Return how many input channels each output channel multiplies."""
        return self.shape.channels

    def declare(self, channels: int) -> None:
        """Declare the arguments between the weights and the outputs."""
        self.bias = self.kernel.argument("bias", self.accumulator, channels)
        self.multiplier = None
        first = first_step(self.epilogue)
        if isinstance(first, Requantise):
            dtype = factor_dtype(first)
            self.multiplier = self.kernel.argument("multiplier", dtype, channels)

    def tiles(self, tile: Tile) -> None:
        """Emit the whole layer."""
        kernel, shape = self.kernel, self.shape
        full_tiles, last_rows = divmod(shape.out_width, tile.rows)
        lines = shape.batch * shape.out_height
        macs = shape.macs // shape.channels * self.inputs_per_lane()
        threaded = macs >= _PARALLEL_MACS
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
            # Where LLVM unrolls the reduction, a loop over blocks would make it keep the inputs of
            # the whole tile on the stack.
            products = self.full * self.steps_per_block * rows * self.columns
            if self.full and products <= (0 if self.isa.by_element else _UNROLLED):
                for block in range(self.full):
                    self.block(corner, pixel, group, block, rows, self.columns, self.isa.lanes)
            elif self.full:
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
        widths = [lanes] * columns
        if last_lanes < lanes:
            widths[-1] = self.last_width
        held = [
            [kernel.registers("held", self.accumulator, width) for width in widths]
            for _ in range(rows)
        ]
        self.begin(held, channel)
        self.rows = rows
        if self.matrices:
            held += [copied(kernel, held[-1])] if rows % 2 else []
            exchange(kernel, held)
        with (
            kernel.loop("window_row", shape.kernel[0]) as window_row,
            kernel.loop("window_column", self.window_columns) as window_column,
        ):
            offset = window_row * (shape.dilations[0] * shape.width * self.pitch)
            offset += window_column * (shape.dilations[1] * self.pitch)
            done = (window_row * self.window_columns + window_column) * self.steps
            width = self.step * sum(widths)
            for first, steps, count in chunks(self.steps, self.reach):
                with kernel.loop("k", count) as k:
                    at = first + k * steps
                    x_index = x_base + offset + at * self.step
                    self.reduce(held, x_index, w_base + (done + at) * width, steps)
        out_channel = group * (shape.out_channels // shape.groups) + block * (self.columns * lanes)
        y_base = kernel.let("y_base", pixel + out_channel)
        if self.matrices:
            exchange(kernel, held)
        self.end(held[:rows], channel, y_base, last_lanes)

    def begin(self, held: list[list[Buffer]], channel: Expr) -> None:
        """Start all accumulators at the bias."""
        for column, width in enumerate(widths_of(held)):
            bias = load(self.bias, channel + column * self.isa.lanes, width)
            start = self.kernel.let("start", bias)
            for accumulators in held:
                self.kernel.store(accumulators[column], 0, start, width)

    def end(self, held: list[list[Buffer]], channel: Expr, y_base: Expr, last_lanes: int) -> None:
        """Turn all accumulators into outputs; the last vector has `last_lanes` of them."""
        scales = []
        for column, width in enumerate(widths_of(held)):
            scale = None
            if self.multiplier is not None:
                scale = load(self.multiplier, channel + column * self.isa.lanes, width)
                scale = self.kernel.let("scale", scale)
            scales.append(scale)
        self.outputs.tile(held, scales, y_base, last_lanes)

    def reduce(self, held: list[list[Buffer]], x_index: Expr, w_index: Expr, steps: int) -> None:
        """Emit reduction steps: every input of theirs times every weight vector."""
        kernel, group, widths = self.kernel, self.group, widths_of(held)
        rows, size = len(held), self.step * steps
        stride = self.shape.strides[1] * self.pitch
        x_index, w_index = kernel.let("x_at", x_index), kernel.let("w_at", w_index)
        inputs = []
        if size > group or self.matrices:
            inputs = [
                kernel.let("x", load(self.x, x_index + row * stride, size))
                for row in range(self.rows)
            ]
        if self.matrices:
            inputs += inputs[-1:] * (rows - self.rows)
            reduce_pairs(kernel, self.isa, held, inputs, (self.weights, w_index), steps)
            return
        for part in range(size // group):
            weights = self.weight_vectors(w_index + part * sum(widths) * group, widths)
            for row in range(rows):
                if inputs:
                    x = lanes_of(inputs[row], part * group, group, size)
                else:
                    x = kernel.let("x", load(self.x, x_index + row * stride, group))
                for column, width in enumerate(widths):
                    total = load(held[row][column], 0, width)
                    total = self.multiplied(total, x, weights[column], width)
                    kernel.store(held[row][column], 0, total, width)

    def multiplied(self, total: Expr, x: Expr, weights: Expr, width: int) -> Expr:
        """Add to every lane its weights times the inputs of one pixel."""
        if not self.quantized:
            return total + repeat(x, width) * weights
        if width == self.isa.lanes:
            return self.isa.dot(total, x, weights)
        repeated = tirx.Broadcast(tirx.reinterpret("int32", x), width)
        inputs = tirx.reinterpret(f"{self.isa.staged}x{self.group * width}", repeated)
        if self.group == 2:
            weights = cast(weights, "int16", 2 * width)
        return self.isa.lane_dot(total, inputs, weights)

    def weight_vectors(self, index: Expr, widths: Sequence[int]) -> list[Expr]:
        """Load one weight vector per column."""
        kernel, columns, width = self.kernel, len(widths), self.isa.lanes * self.group
        if self.weights_dtype != "int8" or width >= 16 or self.isa.lanes == 1:
            return [
                kernel.let("w", load(self.weights, index + column * width, lanes * self.group))
                for column, lanes in enumerate(widths)
            ]
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
