"""Depthwise convolution: every channel has its own window.

NHWC, and the input is not padded. A tile is `columns` neighbouring output pixels of one block of
channels. It walks over its input columns from left to right; each is loaded once (and interleaved,
where lanes multiply several taps: `schedules.depthwise_taps`) and goes to every output pixel whose
window covers it, so that no more accumulators are alive than windows overlap. A pixel is finished
and stored as soon as its last column has come.

Borders cost no copy of the input. Rows above and below the image are read from a row of zero
points instead, by a pointer that is chosen once per tile; columns beside it are known when the
kernel is generated, since the tiles at both ends of a line have code of their own.

Channels are handled in blocks: `schedules.depthwise_layout`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx

from edgepress.targets.isa.base import Isa, widened_dot
from edgepress.targets.schedules.depthwise_layout import (
    Block,
    DepthwiseShape,
    beyond,
    border_size,
    channel_blocks,
    order_of,
    taps_of,
    tile_columns,
    weights_dtype,
)
from edgepress.targets.schedules.depthwise_taps import Rows, Source, Weights
from edgepress.targets.schedules.emit import Buffer, Expr, Kernel, cast, lanes_of, load, splat
from edgepress.targets.schedules.epilogue import Epilogue, Requantise, factor_dtype, finish
from edgepress.targets.schedules.interleave import interleaved
from edgepress.targets.schedules.lane_outputs import outputs_of
from edgepress.targets.schedules.pointers import chosen

# Below so many multiply-accumulates, handing over a part costs more than it saves.
_PARALLEL_MACS = 100_000
_PARALLEL_MACS_OF_64_BYTES = 300_000  # in integers, of whole vectors
_FEW_LINES = 16  # fewer are split further, by channels


def depthwise(
    name: str,
    shape: DepthwiseShape,
    isa: Isa,
    epilogue: Epilogue,
    dtype: str,
    zero_point: int = 0,
) -> Any:
    """Generate the kernel.

    Arguments of the kernel: x, weights (packed), bias (packed, with the zero point folded in as if
    borders were there), for integers the multipliers or shifts (packed), `border_size` zero points
    if it is not 0, y `[batch, out_height, out_width, channels]`.

    `dtype` and `zero_point` are those of x.
    """
    kernel = Kernel(name)
    _Writer(kernel, shape, isa, epilogue, dtype, zero_point).lines()
    return kernel.finish()


@dataclass(frozen=True)
class _Place:
    """Where a tile is: its line, its first output pixel, and which of its columns are inside."""

    image: Expr
    row: Expr
    line: Expr
    first: Expr
    columns: int
    inside: Callable[[int], bool]


class _Writer:
    """Emits tiles; holds what every tile of one kernel has in common."""

    def __init__(
        self,
        kernel: Kernel,
        shape: DepthwiseShape,
        isa: Isa,
        epilogue: Epilogue,
        dtype: str,
        zero_point: int,
    ) -> None:
        self.kernel, self.shape, self.isa, self.epilogue = kernel, shape, isa, epilogue
        self.zero_point = zero_point
        self.quantized = isinstance(epilogue, Requantise)
        self.blocks = channel_blocks(shape.channels, isa, self.quantized)
        packed = sum(block.channels * block.count for block in self.blocks)
        weights = sum(
            block.channels * block.count * block.group * len(taps_of(shape, block).weight_sets)
            for block in self.blocks
        )
        self.stored = dtype
        self.accumulator = "int32" if self.quantized else "float32"
        size = shape.batch * shape.height * shape.width * shape.channels
        self.x = kernel.argument("x", self.stored, size)
        self.weights = kernel.argument("weights", weights_dtype(isa, self.quantized), weights)
        self.bias = kernel.argument("bias", self.accumulator, packed)
        if isinstance(epilogue, Requantise):
            self.multiplier = kernel.argument("multiplier", factor_dtype(epilogue), packed)
        if border := border_size(shape):
            self.border = kernel.argument("border", self.stored, border)
        outputs = shape.lines * shape.out_width * shape.channels
        self.y = kernel.argument("y", epilogue.dtype, outputs)

    def lines(self) -> None:
        """Emit the whole layer: lines, each split into parts of its channels where there are few.

        Threads share the lines.
        """
        kernel, shape = self.kernel, self.shape
        fast = self.quantized and self.isa.group == 4 and self.isa.vector_bytes == 64
        threaded = shape.macs >= (_PARALLEL_MACS_OF_64_BYTES if fast else _PARALLEL_MACS)
        few = threaded and shape.lines < _FEW_LINES
        parts = min(self.blocks[0].count, -(-_FEW_LINES // shape.lines)) if few else 1
        with kernel.loop("unit", shape.lines * parts, parallel=threaded) as unit:
            line = kernel.let("line", unit // parts) if parts > 1 else unit
            part = kernel.let("part", unit % parts) if parts > 1 else 0
            image = kernel.let("image", line // shape.out_height) if shape.batch > 1 else 0
            row = kernel.let("row", line % shape.out_height) if shape.batch > 1 else line
            self._tiles(image, row, line, part, parts)

    def _tiles(self, image: Expr, row: Expr, line: Expr, part: Expr, parts: int) -> None:
        """Emit the tiles of a line: those that reach beyond the image, and a loop of the others."""
        shape, size = self.shape, tile_columns(self.shape)
        window = (shape.kernel[1] - 1) * shape.dilations[1]

        def inside(first: int, column: int) -> bool:
            return 0 <= first * shape.strides[1] - shape.pads[1] + column < shape.width

        def whole(first: int) -> bool:
            last = (size - 1) * shape.strides[1] + window
            return first + size <= shape.out_width and inside(first, 0) and inside(first, last)

        tiles = list(range(0, shape.out_width, size))
        loop = [first for first in tiles if whole(first)]
        for first in tiles:
            if first in loop and first != loop[0]:
                continue
            if first in loop:
                with self.kernel.loop("tile", len(loop)) as index:
                    place = _Place(image, row, line, first + index * size, size, lambda _: True)
                    self._channels(place, part, parts)
                continue
            columns = min(size, shape.out_width - first)

            def known(column: int, first: int = first) -> bool:
                return inside(first, column)

            self._channels(_Place(image, row, line, first, columns, known), part, parts)

    def _channels(self, place: _Place, part: Expr, parts: int) -> None:
        """Emit all channels of a tile, or the part of them that this unit of work has."""
        kernel, main = self.kernel, self.blocks[0]
        each = -(-main.count // parts)
        w_size = self._weights_of(main)
        with kernel.loop("block", each) as index:
            block = kernel.let("at", part * each + index) if parts > 1 else index
            writer = _BlockWriter(self, place, main)
            start = main.channels * block
            if each * parts == main.count:
                writer.emit(start, start, w_size * block)
            else:
                with kernel.block(block < main.count):
                    writer.emit(start, start, w_size * block)
        for last in self.blocks[1:]:
            writer = _BlockWriter(self, place, last)
            packed = main.channels * main.count
            if parts == 1:
                writer.emit(last.first, packed, w_size * main.count)
            else:
                with kernel.block(part == parts - 1):
                    writer.emit(last.first, packed, w_size * main.count)

    def _weights_of(self, block: Block) -> int:
        return block.channels * block.group * len(taps_of(self.shape, block).weight_sets)


class _BlockWriter:
    """Emits one block of channels of one tile."""

    def __init__(self, writer: _Writer, place: _Place, block: Block) -> None:
        self.of, self.place, self.block = writer, place, block
        self.kernel, self.shape, self.isa = writer.kernel, writer.shape, writer.isa
        self.taps = taps_of(writer.shape, block)
        self.lanes = min(writer.isa.lanes, block.channels)
        if block.group > 1:
            self.lanes = block.channels // block.group
        self.vectors = block.channels // self.lanes
        # What is too narrow for the instructions of the set is left to LLVM.
        self.plain = block.group == 1 < writer.isa.group
        self.words = writer.quantized and writer.isa.by_pairs
        self.rows: list[tuple[Buffer, Expr]] = []
        self.sums: dict[int, list[Expr]] = {}
        self.waiting: dict[int, Expr] = {}
        self.inputs: dict[tuple[int, int], Expr] = {}
        self.sources: dict[Source, list[Expr]] = {}
        self.loaded: dict[tuple[Weights, int], Expr] = {}

    def emit(self, channel: Expr, packed: Expr, w_base: Expr) -> None:
        """Emit the block that starts at `channel`; `packed` and `w_base` index its constants."""
        kernel, shape = self.kernel, self.shape
        self.channel = kernel.let("channel", channel)
        self.packed, self.w_base = kernel.let("packed", packed), kernel.let("w_base", w_base)
        self.rows = [self._row(row) for row in range(shape.kernel[0])]
        self.bias = self._per_channel(self.of.bias, "bias")
        if isinstance(self.of.epilogue, Requantise):
            self.factors = self._per_channel(self.of.multiplier, "factor")
        pixel = (self.place.line * shape.out_width + self.place.first) * shape.channels
        y_base = kernel.let("y_base", pixel + self.channel)
        steps = self._steps()
        last = {pixel: index for index, (pixel, _, _) in enumerate(steps)}
        for index, (pixel, source, weights) in enumerate(steps):
            self.sums.setdefault(pixel, self.bias)
            if source is not None:
                self._add(pixel, source, weights, index == last[pixel])
            if index == last[pixel]:
                output = kernel.let("output", self._finish(self.sums.pop(pixel)))
                kernel.store(
                    self.of.y, y_base + pixel * shape.channels, output, self.block.channels
                )

    def _steps(self) -> list[tuple[int, Source | None, Weights]]:
        """Return (pixel, inputs, weights) of every product of the tile, in order.

        Inputs are used in the order of their columns, or where the pixel begins if that is later.
        A pixel that sees nothing of the image has one step, without inputs.
        """
        steps: list[tuple[int, int, int, Source | None, Weights]] = []
        for pixel in range(self.place.columns):
            begin = pixel * self.shape.strides[1]
            products = [
                (max(source.column, begin), source, weights)
                for source, weights in self.taps.products(pixel)
                if self._matters(source)
            ]
            for order, (column, source, weights) in enumerate(products):
                steps.append((column, order, pixel, source, weights))
            if not products:
                steps.append((begin, 0, pixel, None, Weights(None)))
        steps.sort(key=lambda step: step[:3])
        return [step[2:] for step in steps]

    def _matters(self, source: Source) -> bool:
        """Tell whether inputs are not all zeros beyond the image."""
        if self.of.zero_point:
            return True
        columns = 1 if isinstance(source, Rows) else self.block.group
        return any(self.place.inside(source.column + i) for i in range(columns))

    def _row(self, window_row: int) -> tuple[Buffer, Expr]:
        """Return a buffer and the index in it of the tile's first column in a row of the window."""
        kernel, shape, place = self.kernel, self.shape, self.place
        row = place.row * shape.strides[0] + (window_row * shape.dilations[0] - shape.pads[0])
        row = kernel.let("input_row", row)
        line = place.image * shape.height + row
        left = place.first * shape.strides[1] - shape.pads[1]
        index = (line * shape.width + left) * shape.channels + self.channel
        above, below = beyond(shape, window_row)
        if not above and not below:
            return self.of.x, kernel.let("start", index)
        conditions = [row >= 0] * above + [row < shape.height] * below
        inside = conditions[0] if len(conditions) == 1 else tirx.all(*conditions)
        if isinstance(row, int):
            if all(conditions):
                return self.of.x, kernel.let("start", index)
            return self.of.border, 0
        size = border_size(shape)
        return chosen(kernel, inside, (self.of.x, index), (self.of.border, 0), size), 0

    def _input(self, window_row: int, column: int) -> Expr:
        """Return the channels of one input pixel, as they are multiplied."""
        key, size = (window_row, column), self.block.channels
        dtype = self.isa.staged if self.of.quantized and not self.plain else self.of.stored
        if not self.place.inside(column):
            return splat(self.of.zero_point, dtype, size)
        if key not in self.inputs:
            buffer, start = self.rows[window_row]
            value = load(buffer, start + column * self.shape.channels, size)
            if dtype != self.of.stored:
                value = cast(value, dtype, size)
            self.inputs[key] = self.kernel.let("x", value)
        return self.inputs[key]

    def _source(self, source: Source) -> list[Expr]:
        """Return the inputs of all lanes of a block."""
        if source in self.sources:
            return self.sources[source]
        group, size = self.block.group, self.block.channels
        if group == 1:
            assert isinstance(source, Rows)
            whole = self._input(source.first, source.column)
            lanes = self.lanes
            vectors = [lanes_of(whole, first, lanes, size) for first in range(0, size, lanes)]
        else:
            if isinstance(source, Rows):
                end = self.shape.kernel[0]
                rows = range(source.first, min(source.first + group, end))
                inputs = [self._input(row, source.column) for row in rows]
            else:
                needed = self.place.columns - 1
                needed = needed * self.shape.strides[1] + self.shape.kernel[1]
                columns = range(source.column, min(source.column + group, needed))
                inputs = [self._input(source.row, column) for column in columns]
            # The weights of what is missing are zeros, so that any input will do.
            inputs += [inputs[-1]] * (group - len(inputs))
            element_bytes = np.dtype(self.isa.staged).itemsize
            vectors = interleaved(self.kernel, inputs, size, element_bytes)
        self.sources[source] = vectors
        return vectors

    def _add(self, pixel: int, source: Source, weights: Weights, last: bool) -> None:
        """Add the products of inputs and one set of weights to all lanes of a pixel."""
        if self.words:
            self._add_words(pixel, source, weights, last)
            return
        self.sums[pixel] = [
            self.kernel.let("sum", self._product(total, x, self._weight(weights, index)))
            for index, (total, x) in enumerate(
                zip(self.sums[pixel], self._source(source), strict=True)
            )
        ]

    def _add_words(self, pixel: int, source: Source, weights: Weights, last: bool) -> None:
        """Multiply bytes to 16 bits, where two products have room before they are added to lanes.

        Unless a weight is -128: then the set has no `all_weights` besides it.
        """
        assert isinstance(source, Rows)
        assert weights.stored is not None
        size = self.block.channels
        at = self.w_base + weights.stored * size
        if (weights, 0) not in self.loaded:
            self.loaded[weights, 0] = self.kernel.let("w", load(self.of.weights, at, size))
        x, w = self._input(source.first, source.column), self.loaded[weights, 0]
        total = cast(x, "int16", size) * cast(w, "int16", size)
        waiting = self.waiting.pop(pixel, None)
        if waiting is not None:
            total = waiting + total
        words = self.kernel.let("words", total)
        if waiting is None and not last and self.isa.all_weights is not None:
            self.waiting[pixel] = words
            return
        self.sums[pixel] = [
            self.kernel.let(
                "sum",
                total + cast(lanes_of(words, first, self.lanes, size), "int32", self.lanes),
            )
            for first, total in zip(range(0, size, self.lanes), self.sums[pixel], strict=True)
        ]

    def _product(self, total: Expr, x: Expr, w: Expr) -> Expr:
        if not self.of.quantized:
            return total + x * w
        return (widened_dot if self.plain else self.isa.lane_dot)(total, x, w)

    def _weight(self, weights: Weights, vector: int) -> Expr:
        key = (weights, vector)
        if key not in self.loaded:
            w = self._moved(weights, vector) if weights.shift else self._packed(weights, vector)
            self.loaded[key] = self.kernel.let("w", w)
        return self.loaded[key]

    def _packed(self, weights: Weights, vector: int) -> Expr:
        assert weights.stored is not None
        size = self.lanes * self.block.group
        at = weights.stored * self.block.channels * self.block.group + vector * size
        return load(self.of.weights, self.w_base + at, size)

    def _moved(self, weights: Weights, vector: int) -> Expr:
        """Return weights that have moved up in their lanes of 32 bits."""
        dtype, size = weights_dtype(self.isa, True), self.lanes * self.block.group
        bits = 8 * weights.shift * np.dtype(dtype).itemsize
        parts = []
        for index, shifted, by in (
            (weights.stored, tirx.shift_left, bits),
            (weights.before, tirx.shift_right, 32 - bits),
        ):
            if index is not None:
                w = tirx.reinterpret(f"uint32x{self.lanes}", self._weight(Weights(index), vector))
                parts.append(shifted(w, splat(by, "uint32", self.lanes)))
        joined = parts[0] if len(parts) == 1 else tirx.bitwise_or(*parts)
        return tirx.reinterpret(f"{dtype}x{size}", joined)

    def _per_channel(self, values: Buffer, name: str) -> list[Expr]:
        starts = range(0, self.block.channels, self.lanes)
        return [
            self.kernel.let(name, load(values, self.packed + start, self.lanes)) for start in starts
        ]

    def _finish(self, sums: list[Expr]) -> Expr:
        """Turn the sums of one pixel into its outputs."""
        if not isinstance(self.of.epilogue, Requantise):
            return finish(sums[0], None, self.of.epilogue, self.lanes)
        order, epilogue = order_of(self.block, self.isa), self.of.epilogue
        return outputs_of(sums, self.factors, order, self.isa, epilogue)
