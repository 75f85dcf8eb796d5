"""3×3 convolutions with stride 1 by Winograd's minimal filtering, F(2×2, 3×3) and F(4×4, 3×3).

NHWC, float32, one group. The output is cut into tiles of m × m pixels, each of which reads
(m + 2)² inputs. Channel by channel, inputs and weights of a tile are transformed
(`winograd_transforms.py`), so that for each of the (m + 2)² positions of a transformed tile there
is a small matrix product, tiles × input channels × output channels; its results are transformed
back. Products fall from 9 per output to 4 or 2.25.

**Padding** is never in memory: at generation, tiles fall into a few classes by which of their rows
and columns lie inside the image, and what lies outside is left out of their transforms.

**Weights** are transformed while the layer runs. Transformed in advance they would be 1.8 or 4
times as large, and reading that from memory takes longer than making it again from what lies in the
bundle. There are two orders of loops:

- *Tiles first*, for few tiles, as in deep layers. All inputs are transformed. Then, for a block of
  output channels, `depth` input channels at a time, weights are transformed, one row of positions
  after the other, into a buffer that stays in the L1 cache, and multiplied with all tiles. Threads
  share the blocks.
- *Weights first*, for many tiles. All weights are transformed. Then, for `lines` rows of tiles at a
  time, inputs are transformed, multiplied and transformed back, in buffers that stay in the L2
  cache. Threads share the rows.

**Registers** of a matrix product: `tile.rows` tiles × `tile.columns` vectors of output channels are
accumulators. Each step loads `columns` vectors of weights and repeats one input per tile. Bias,
residual and clamping come with the transform of the results.

Weights in the bundle: `[blocks][input channels][columns][9][lanes]`, the last block with as many
columns as it has vectors. Where the number of channels is no multiple of the vector, the last
vector overlaps the one before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from edgepress.targets.isa.base import Isa
from edgepress.targets.lowering.plain import BOUND
from edgepress.targets.schedules.emit import Buffer, Expr, Kernel, load, repeat, splat
from edgepress.targets.schedules.epilogue import Added, Clip, finish
from edgepress.targets.schedules.winograd_layout import (
    Span,
    WinogradPlan,
    WinogradShape,
    blocks_of,
    inputs_size,
    scratch_size,
    spans,
    weights_size,
)
from edgepress.targets.schedules.winograd_transforms import Arithmetic

_CACHE_LINE = 16  # float32
_PARALLEL_PRODUCTS = 300_000  # below this, handing over a part costs more than it saves


def winograd(
    name: str, shape: WinogradShape, isa: Isa, epilogue: Clip | Added, plan: WinogradPlan
) -> Any:
    """Generate the kernel.

    Arguments of the kernel: x, weights (packed), bias `[out_channels]`, the residual where one is
    added, scratch memory of `scratch_size` float32, y; x and y as `WinogradShape` says.
    """
    kernel = Kernel(name)
    _Writer(kernel, shape, isa, epilogue, plan).layer()
    return kernel.finish().with_attr(BOUND, True)


@dataclass(frozen=True)
class _Block:
    """Output channels that are computed together: `channels` from `first` on, in `vectors`."""

    first: Expr
    vectors: int
    channels: int


class _Writer:
    """Emits one layer."""

    def __init__(
        self,
        kernel: Kernel,
        shape: WinogradShape,
        isa: Isa,
        epilogue: Clip | Added,
        plan: WinogradPlan,
    ) -> None:
        self.kernel, self.shape, self.isa = kernel, shape, isa
        self.epilogue, self.plan, self.transform = epilogue, plan, plan.transform
        self.rows, self.columns = shape.tiles(plan.transform)
        self.tiles = plan.lines * self.columns
        self.input_pitch = self.tiles * shape.channels + isa.lanes
        self.width = plan.tile.columns * isa.lanes
        self.full, self.last = blocks_of(shape.out_channels, isa, plan.tile.columns)
        padded = self.full * self.width + self.last * isa.lanes
        outputs = shape.batch * shape.out_height * shape.out_width * shape.out_channels
        inputs = shape.batch * shape.height * shape.width * shape.channels
        self.x = kernel.argument("x", "float32", inputs)
        self.weights = kernel.argument("weights", "float32", padded * shape.channels * 9)
        self.bias = kernel.argument("bias", "float32", shape.out_channels)
        self.residual = None
        if isinstance(epilogue, Added):
            self.residual = kernel.argument("residual", "float32", outputs)
        self.scratch = kernel.argument("scratch", "float32", scratch_size(shape, isa, plan))
        self.y = kernel.argument("y", "float32", outputs)
        self.threaded = shape.products(plan.transform) >= _PARALLEL_PRODUCTS

    # Loops --------------------------------------------------------------------------------------

    def layer(self) -> None:
        """Emit the whole layer."""
        kernel = self.kernel
        groups = -(-self.rows // self.plan.lines)
        if not self.plan.weights_first:
            with kernel.loop("group", groups) as group:
                self.transform_inputs(self.scratch, group, self.threaded)
                self.each_block(
                    self.threaded, lambda block: self.weights_and_products(group, block)
                )
            return
        whole = weights_size(self.plan.tile.columns, self.isa, self.plan)
        channels = self.shape.channels

        def base(block: _Block) -> Expr:
            return block.first // self.width * whole

        def weights(block: _Block) -> None:
            for row in range(self.transform.inputs):
                at = base(block) + row * self.transform.inputs * self.weights_pitch(block)
                self.transform_weights(self.scratch, at, block, row, 0, channels)

        self.each_block(self.threaded, weights)
        with kernel.loop("group", groups, self.threaded) as group:
            size = inputs_size(self.shape, self.isa, self.plan)
            inputs = kernel.workspace("inputs", "float32", size)
            self.transform_inputs(inputs, group, False)

            def products(block: _Block) -> None:
                results = self.results()
                with kernel.loop("position", self.transform.products) as position:
                    at = base(block) + position * self.weights_pitch(block)
                    places = (results, inputs, self.scratch)
                    self.multiply(places, at, block, position, 0, channels)
                self.transform_results(results, group, block)

            self.each_block(False, products)

    def weights_and_products(self, group: Expr, block: _Block) -> None:
        """Transform the weights of a block, a part at a time, and multiply all tiles with them."""
        depth, results = self.plan.depth, self.results()
        size = weights_size(block.vectors, self.isa, self.plan)
        transformed = self.kernel.workspace("transformed", "float32", size)
        whole, rest = divmod(self.shape.channels, depth)
        with self.kernel.loop("part", whole) as part:
            self.part(results, transformed, block, part * depth, depth)
        if rest:
            self.part(results, transformed, block, whole * depth, rest)
        self.transform_results(results, group, block)

    def part(
        self, results: Buffer, transformed: Buffer, block: _Block, first: Expr, depth: int
    ) -> None:
        """Transform some input channels of a block's weights and multiply all tiles with them.

        One row of positions at a time, so that its weights stay in the L1 cache.
        """
        kernel, size = self.kernel, self.transform.inputs
        with kernel.loop("position_row", size) as row:
            for known in range(size):
                with kernel.block(row == known):
                    self.transform_weights(transformed, 0, block, known, first, depth)
            with kernel.loop("position_column", size) as column:
                position = kernel.let("position", row * size + column)
                self.prefetch(block, first, depth, position)
                places = (results, self.scratch, transformed)
                at = column * self.weights_pitch(block)
                self.multiply(places, at, block, position, first, depth)

    def each_block(self, parallel: bool, emit: Callable[[_Block], None]) -> None:
        """Loop over the blocks of output channels; the last may be narrower."""
        count, rest = self.full + (self.last > 0), self.shape.out_channels - self.full * self.width
        with self.kernel.loop("block", count, parallel) as index:
            whole = _Block(index * self.width, self.plan.tile.columns, self.width)
            narrow = _Block(self.full * self.width, self.last, rest)
            if not self.last or not self.full:
                emit(whole if self.full else narrow)
                return
            with self.kernel.block(index < self.full):
                emit(whole)
            with self.kernel.block(index >= self.full):
                emit(narrow)

    @contextmanager
    def vectors(self, channels: int) -> Iterator[tuple[Expr, int]]:
        """Loop over vectors that cover some channels: the first channel of each, and its lanes."""
        lanes = self.isa.lanes
        while lanes > channels:
            lanes //= 2
        with self.kernel.loop("vector", -(-channels // lanes)) as vector:
            first = vector * lanes
            if channels % lanes:
                first = self.kernel.let("first", tirx.Min(first, channels - lanes))
            yield first, lanes

    @contextmanager
    def lines(self, group: Expr, parallel: bool, guarded: bool) -> Iterator[tuple[Expr, ...]]:
        """Loop over the rows of tiles of a group: the row's number in it, image, row in the image.

        The last group may have fewer rows. Where not `guarded`, its last row stands for the others.
        """
        with self.kernel.loop("line", self.plan.lines, parallel) as line:
            at = group * self.plan.lines + line
            rows = self.rows // self.shape.batch
            if self.rows % self.plan.lines == 0:
                yield line, at // rows, at % rows
            elif guarded:
                with self.kernel.block(at < self.rows):
                    yield line, at // rows, at % rows
            else:
                at = self.kernel.let("at", tirx.Min(at, self.rows - 1))
                yield line, at // rows, at % rows

    def arithmetic(self, lanes: int) -> Arithmetic:
        """Return how vectors of the kernel are computed."""
        return Arithmetic(
            lambda factor, value: splat(factor, "float32", lanes) * value,
            lambda value: self.kernel.let("sum", value),
        )

    def along_both(
        self, values: list[list[Expr]], along: Callable[[list[Expr]], list[Expr]]
    ) -> list[list[Expr]]:
        """Transform the columns of a tile and then its rows."""
        columns = [along(list(column)) for column in zip(*values, strict=True)]
        return [along(list(row)) for row in zip(*columns, strict=True)]

    # Inputs -------------------------------------------------------------------------------------

    def transform_inputs(self, inputs: Buffer, group: Expr, parallel: bool) -> None:
        """Emit Bᵀ d B for all tiles of a group, into `inputs[position][tile][channel]`."""
        kernel, shape, size = self.kernel, self.shape, self.transform.inputs
        pitch = self.transform.outputs
        rows = self.rows // shape.batch
        row_spans = spans(rows, pitch, size, shape.top, shape.height)
        column_spans = spans(self.columns, pitch, size, shape.left, shape.width)
        with self.lines(group, parallel, guarded=False) as (line, image, row):
            row = kernel.let("row", row)
            top = kernel.let("top", image * shape.height + row * pitch - shape.top)
            for rows_inside in row_spans:
                inside = tirx.all(row >= rows_inside.first, row < rows_inside.stop)
                with kernel.block(inside):
                    for columns_inside in column_spans:
                        self.transform_span(inputs, line, top, rows_inside, columns_inside)

    def transform_span(
        self, inputs: Buffer, line: Expr, top: Expr, rows: Span, columns: Span
    ) -> None:
        """Emit the tiles of a row of tiles of which the same elements exist."""
        kernel, shape, size = self.kernel, self.shape, self.transform.inputs
        with kernel.loop("column", columns.stop - columns.first) as column:
            column = column + columns.first
            left = column * self.transform.outputs - shape.left
            x_base = kernel.let("x_base", (top * shape.width + left) * shape.channels)
            base = kernel.let("base", (line * self.columns + column) * shape.channels)
            with self.vectors(shape.channels) as (first, lanes):
                arithmetic = self.arithmetic(lanes)

                def element(i: int, j: int) -> Expr | None:
                    if not (rows.low <= i < rows.high and columns.low <= j < columns.high):
                        return None
                    index = x_base + (i * shape.width + j) * shape.channels + first
                    return kernel.let("d", load(self.x, index, lanes))

                tile = [[element(i, j) for j in range(size)] for i in range(size)]
                values = self.along_both(tile, lambda d: self.transform.data(d, arithmetic))
                for i, line_of_values in enumerate(values):
                    for j, value in enumerate(line_of_values):
                        value = splat(0.0, "float32", lanes) if value is None else value
                        at = (i * size + j) * self.input_pitch + base + first
                        kernel.store(inputs, at, value, lanes)

    # Weights ------------------------------------------------------------------------------------

    def transform_weights(
        self, target: Buffer, base: Expr, block: _Block, row: int, first: Expr, depth: int
    ) -> None:
        """Emit a row of G g Gᵀ for some input channels: `target[position][input channel][lane]`."""
        kernel, lanes, width = self.kernel, self.isa.lanes, block.vectors * self.isa.lanes
        arithmetic, pitch = self.arithmetic(lanes), self.weights_pitch(block)
        source = block.first * (9 * self.shape.channels) + first * (9 * width)
        source, base = kernel.let("source", source), kernel.let("base", base)
        with kernel.loop("channel_vector", depth * block.vectors) as index:
            at = kernel.let("at", source + index * (9 * lanes))
            to = kernel.let("to", base + index * lanes)
            columns = []
            for j in range(3):
                taps = [load(self.weights, at + (3 * i + j) * lanes, lanes) for i in range(3)]
                taps = [kernel.let("g", tap) for tap in taps]
                columns.append(self.transform.weights(taps, arithmetic)[row])
            for j, value in enumerate(self.transform.weights(columns, arithmetic)):
                kernel.store(target, to + j * pitch, value, lanes)

    def weights_pitch(self, block: _Block) -> int:
        """Return the distance between positions of transformed weights."""
        return (self.plan.depth * block.vectors + 1) * self.isa.lanes

    # Products -----------------------------------------------------------------------------------

    def results(self) -> Buffer:
        """Allocate the results of one block: `[position][tile][lane]`."""
        size = self.transform.products * (self.tiles * self.width + self.isa.lanes)
        return self.kernel.workspace("results", "float32", size)

    def results_pitch(self, block: _Block) -> int:
        """Return the distance between positions of results."""
        return (self.tiles * block.vectors + 1) * self.isa.lanes

    def multiply(
        self,
        places: tuple[Buffer, Buffer, Buffer],
        base: Expr,
        block: _Block,
        position: Expr,
        first: Expr,
        depth: int,
    ) -> None:
        """Emit the matrix product of a position over `depth` input channels from `first` on.

        `places` hold results, inputs and weights; the weights start at `base`.
        """
        kernel, rows = self.kernel, self.plan.tile.rows
        results, inputs, weights = places
        u_base = kernel.let("u_base", base)
        v_base = kernel.let("v_base", position * self.input_pitch + first)
        m_base = kernel.let("m_base", position * self.results_pitch(block))
        full, rest = divmod(self.tiles, rows)
        for begin, count, height in ((0, full, rows), (full * rows, 1, rest)):
            if not count or not height:
                continue
            with kernel.loop("tiles", count) as index:
                tile = begin + index * height
                v_at = kernel.let("v_at", v_base + tile * self.shape.channels)
                m_at = kernel.let("m_at", m_base + tile * (block.vectors * self.isa.lanes))
                self.product(
                    (results, m_at), (inputs, v_at), (weights, u_base), height, block.vectors,
                    depth, first,
                )  # fmt: skip

    def prefetch(self, block: _Block, first: Expr, depth: int, position: Expr) -> None:
        """Ask for this position's share of the weights that are transformed next."""
        kernel, channel = self.kernel, 9 * block.vectors * self.isa.lanes
        following = block.first * (9 * self.shape.channels) + (first + depth) * channel
        lines = -(-depth * channel // (self.transform.products * _CACHE_LINE))
        with kernel.loop("cache_line", lines) as line:
            at = following + (position * lines + line) * _CACHE_LINE
            kernel.prefetch(self.weights, at)

    def product(
        self,
        results: tuple[Buffer, Expr],
        inputs: tuple[Buffer, Expr],
        weights: tuple[Buffer, Expr],
        rows: int,
        columns: int,
        depth: int,
        first: Expr,
    ) -> None:
        """Emit one set of accumulators; it goes on where the input channels before it ended."""
        kernel, lanes = self.kernel, self.isa.lanes
        (m, m_base), (v, v_base), (u, u_base) = results, inputs, weights
        places = [(row, column) for row in range(rows) for column in range(columns)]
        held = {place: kernel.registers("held", "float32", lanes) for place in places}

        def address(row: int, column: int) -> Expr:
            return m_base + (row * columns + column) * lanes

        def begin(anew: bool) -> None:
            for place in places:
                old = splat(0.0, "float32", lanes) if anew else load(m, address(*place), lanes)
                kernel.store(held[place], 0, old, lanes)

        if isinstance(first, int) and first == 0:
            begin(anew=True)
        elif isinstance(first, int):
            begin(anew=False)
        else:
            with kernel.block(first == 0):
                begin(anew=True)
            with kernel.block(first > 0):
                begin(anew=False)
        with kernel.loop("k", depth) as k:
            factors = [
                kernel.let("u", load(u, u_base + (k * columns + column) * lanes, lanes))
                for column in range(columns)
            ]
            for row in range(rows):
                value = kernel.let("v", load(v, v_base + row * self.shape.channels + k))
                for column in range(columns):
                    total = (
                        load(held[row, column], 0, lanes) + repeat(value, lanes) * factors[column]
                    )
                    kernel.store(held[row, column], 0, total, lanes)
        for place in places:
            kernel.store(m, address(*place), load(held[place], 0, lanes), lanes)

    # Results ------------------------------------------------------------------------------------

    def transform_results(self, results: Buffer, group: Expr, block: _Block) -> None:
        """Emit Aᵀ m A of every tile of a group, and the epilogue, into y."""
        kernel, shape, pitch = self.kernel, self.shape, self.transform.outputs
        rows = self.rows // shape.batch
        row_spans = spans(rows, pitch, pitch, 0, shape.out_height)
        column_spans = spans(self.columns, pitch, pitch, 0, shape.out_width)
        with self.lines(group, False, guarded=True) as (line, image, row):
            row = kernel.let("row", row)
            top = kernel.let("top", image * shape.out_height + row * pitch)
            for rows_inside in row_spans:
                inside = tirx.all(row >= rows_inside.first, row < rows_inside.stop)
                with kernel.block(inside):
                    for columns_inside in column_spans:
                        self.results_of_span(results, line, top, block, rows_inside, columns_inside)

    def results_of_span(
        self,
        results: Buffer,
        line: Expr,
        top: Expr,
        block: _Block,
        rows: Span,
        columns: Span,
    ) -> None:
        """Emit the tiles of a row of tiles of which the same outputs exist."""
        kernel, shape, size = self.kernel, self.shape, self.transform.inputs
        pitch, width = self.results_pitch(block), block.vectors * self.isa.lanes
        with kernel.loop("column", columns.stop - columns.first) as column:
            column = column + columns.first
            pixel = top * shape.out_width + column * self.transform.outputs
            y_base = kernel.let("y_base", pixel * shape.out_channels + block.first)
            base = kernel.let("base", (line * self.columns + column) * width)
            with self.vectors(block.channels) as (first, lanes):
                arithmetic = self.arithmetic(lanes)
                bias = kernel.let("bias", load(self.bias, block.first + first, lanes))
                products = [
                    [
                        load(results, (i * size + j) * pitch + base + first, lanes)
                        for j in range(size)
                    ]
                    for i in range(size)
                ]
                products = [[kernel.let("m", value) for value in row] for row in products]
                part = [
                    self.transform.result(list(column_of), arithmetic, rows.high)
                    for column_of in zip(*products, strict=True)
                ]
                for i, row_of in enumerate(zip(*part, strict=True)):
                    values = self.transform.result(list(row_of), arithmetic, columns.high)
                    for j, value in enumerate(values):
                        index = y_base + (i * shape.out_width + j) * shape.out_channels + first
                        self.finish(index, value + bias, lanes)

    def finish(self, index: Expr, value: Expr, lanes: int) -> None:
        """Store outputs."""
        residual = None
        if self.residual is not None:
            residual = load(self.residual, index, lanes)
        value = finish(self.kernel.let("value", value), None, self.epilogue, lanes, residual)
        self.kernel.store(self.y, index, value, lanes)
