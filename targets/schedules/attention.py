"""Attention in one kernel: softmax(scale * Q K^T + mask) V without the scores in memory.

Per head: K is packed transposed and V as it is (`panel`), into the workspace of the thread. Then,
for one tile of query rows after the other, the scores of all keys go to a buffer of `rows` lines
that stays in the first-level cache, become exponentials there, and are multiplied with V; the
results are divided by the sums of the rows on their way out. Nothing of size queries × keys exists,
and heads need no transposes: every operand says by strides where it lies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from edgepress.targets.isa.base import Isa
from edgepress.targets.schedules.elementary import LOG2_E, exp2_below_zero
from edgepress.targets.schedules.emit import (
    Buffer,
    Expr,
    Kernel,
    folded,
    load,
    repeat,
    splat,
)
from edgepress.targets.schedules.panel import (
    Matrix,
    Panel,
    Place,
    copy_vector,
    multiply,
    pack,
    store_vector,
    tile_for,
)

_PARALLEL_MACS = 500_000  # below this, handing over a part costs more than it saves
_FEWEST_TASKS = 4  # where there are fewer heads, their queries are split


@dataclass(frozen=True)
class AttentionShape:
    """Sizes, and where everything lies.

    Attributes:
        batch, heads, queries, keys: how many there are.
        width: of a query and a key.
        value_width: of a value.
        query, key, value, mask, output: their places; V and the mask have neighbouring columns, K
            has either neighbouring columns or neighbouring rows.
        scale: of the scores, before the mask is added.
        zero_rows: whether rows all of whose scores are -inf are zeros, not NaN.
    """

    batch: int
    heads: int
    queries: int
    keys: int
    width: int
    value_width: int
    query: Place
    key: Place
    value: Place
    mask: Place | None
    output: Place
    scale: float
    zero_rows: bool = False

    @property
    def macs(self) -> int:
        """Multiply-accumulates of both products."""
        scores = self.batch * self.heads * self.queries * self.keys
        return scores * (self.width + self.value_width)


def attention(name: str, shape: AttentionShape, isa: Isa) -> Any:
    """Generate the kernel: arguments q, k, v, the mask where there is one, and y, all float32."""
    return _Writer(name, shape, isa).write()


class _Writer:
    """Emits one kernel."""

    def __init__(self, name: str, shape: AttentionShape, isa: Isa) -> None:
        self.kernel, self.shape, self.isa = Kernel(name), shape, isa
        kernel, lanes = self.kernel, isa.lanes
        self.q = kernel.argument("q", "float32", shape.query.size)
        self.k = kernel.argument("k", "float32", shape.key.size)
        self.v = kernel.argument("v", "float32", shape.value.size)
        self.mask = None
        if shape.mask is not None:
            self.mask = kernel.argument("mask", "float32", shape.mask.size)
        self.y = kernel.argument("y", "float32", shape.output.size)
        tile = tile_for(shape.queries, shape.width, shape.keys, isa)
        self.rows = tile.rows
        self.key_panel = Panel(shape.width, shape.keys, tile.columns, lanes)
        self.value_panel = Panel(shape.keys, shape.value_width, tile.columns, lanes)
        # A row of scores is followed by what else is known of it: a value per lane, the ragged end
        # of its mask, one value. In buffers of their own LLVM would make registers of these, of
        # which the products need all.
        self.by_lane = self.key_panel.padded
        self.mask_end = self.by_lane + lanes
        self.by_row = self.mask_end + lanes
        self.pitch = self.by_row + lanes
        # without a mask, the exponential does the scaling
        self.scaled = shape.mask is not None or shape.scale <= 0

    def write(self) -> Any:
        """Emit all tasks: one head each, or a part of its queries."""
        kernel, shape = self.kernel, self.shape
        threaded, heads = shape.macs >= _PARALLEL_MACS, shape.batch * shape.heads
        full, rest = divmod(shape.queries, self.rows)
        tiles = full + (rest > 0)
        parts = min(tiles, -(-_FEWEST_TASKS // heads)) if threaded else 1
        each = -(-tiles // parts)
        with kernel.loop("task", heads * parts, parallel=threaded) as task:
            task = tirx.const(0, "int32") + task
            head = kernel.let("head", tirx.floordiv(task, parts))
            self.begin(head)
            with kernel.loop("tile", each) as tile:
                index = kernel.let("index", tirx.floormod(task, parts) * each + tile)
                if full:
                    with kernel.block(index < full):
                        self.tile(index * self.rows, self.rows)
                if rest:
                    with kernel.block(index.equal(full)):
                        self.tile(index * self.rows, rest)
        return kernel.finish()

    def begin(self, head: Expr) -> None:
        """Emit what all tiles of a head share: where its operands are, the panels of K and V."""
        kernel, shape = self.kernel, self.shape
        batch = kernel.let("batch", tirx.floordiv(head, shape.heads))
        head = kernel.let("of_batch", tirx.floormod(head, shape.heads))

        def place(where: Place, buffer: Buffer) -> Matrix:
            return where.matrix(kernel, buffer, batch, head)

        self.queries, self.results = place(shape.query, self.q), place(shape.output, self.y)
        self.masked = None
        if shape.mask is not None and self.mask is not None:
            self.masked = place(shape.mask, self.mask)
        self.keys = kernel.workspace("keys", "float32", self.key_panel.size)
        self.values = kernel.workspace("values", "float32", self.value_panel.size)
        self.scores = kernel.workspace("scores", "float32", self.rows * self.pitch)
        keys = place(shape.key, self.k)
        # the panel holds K transposed: its rows are the columns of K
        turned = Matrix(keys.buffer, keys.start, keys.column, keys.row)
        pack(kernel, self.keys, self.key_panel, turned)
        pack(kernel, self.values, self.value_panel, place(shape.value, self.v))

    def tile(self, first: Expr, rows: int) -> None:
        """Emit `rows` query rows: scores, exponentials, results."""
        kernel = self.kernel
        first = kernel.let("first", first)
        queries = self.queries
        start = kernel.let("start", queries.at(first, 0))
        left = Matrix(queries.buffer, start, queries.row, queries.column)

        def keep(column: Expr, results: list[list[Expr]], last_lanes: int) -> None:
            self.keep_scores(first, column, results, last_lanes)

        lanes, masked, rest = self.isa.lanes, self.masked, self.shape.keys % self.isa.lanes
        with kernel.loop("row", rows) as row:
            if masked is not None and rest:
                origin = kernel.let("origin", masked.at(first + row, self.shape.keys - rest))
                end = row * self.pitch + self.mask_end
                copy_vector(kernel, self.scores, end, masked.buffer, origin, rest, lanes)
            at = row * self.pitch + self.by_lane
            kernel.store(self.scores, at, splat(-math.inf, "float32", lanes), lanes)
        multiply(kernel, self.isa, left, rows, self.key_panel, self.keys, keep)
        self.exponentials(rows)
        shares = Matrix(self.scores, 0, self.pitch)

        def finish(column: Expr, results: list[list[Expr]], last_lanes: int) -> None:
            self.store_results(first, column, results, last_lanes)

        multiply(kernel, self.isa, shares, rows, self.value_panel, self.values, finish)

    def keep_scores(
        self, query: Expr, key: Expr, results: list[list[Expr]], last_lanes: int
    ) -> None:
        """Keep scores, scaled and masked where there is a mask; -inf behind the last key."""
        kernel, lanes, masked = self.kernel, self.isa.lanes, self.masked
        scale = splat(self.shape.scale, "float32", lanes)
        for row, values in enumerate(results):
            largest = load(self.scores, row * self.pitch + self.by_lane, lanes)
            for column, value in enumerate(values):
                at = key + column * lanes
                valid = last_lanes if column == len(values) - 1 else lanes
                if self.scaled:
                    value = value * scale
                if masked is not None and valid == lanes:
                    value = value + load(masked.buffer, masked.at(query + row, at), lanes)
                elif masked is not None:
                    value = value + load(self.scores, row * self.pitch + self.mask_end, lanes)
                if valid < lanes:
                    exists = tirx.Ramp(0, 1, lanes) < tirx.Broadcast(valid, lanes)
                    value = tirx.Select(exists, value, splat(-math.inf, "float32", lanes))
                value = kernel.let("score", value)
                kernel.store(self.scores, row * self.pitch + at, value, lanes)
                largest = tirx.Max(largest, value)
            kernel.store(self.scores, row * self.pitch + self.by_lane, largest, lanes)

    def exponentials(self, rows: int) -> None:
        """Replace scores by exponentials, and keep one divided by the sums of the rows.

        Reducing the lanes has loops of its own: its chains of dependent instructions would keep
        the exponentials of the row waiting.
        """
        kernel, lanes, zero = self.kernel, self.isa.lanes, splat(0.0, "float32", 1)
        factor = splat(self.shape.scale * LOG2_E, "float32", lanes)
        with kernel.loop("row", rows) as row:
            largest = load(self.scores, row * self.pitch + self.by_lane, lanes)
            top = folded(kernel, largest, lanes, tirx.Max)
            if self.shape.zero_rows:
                top = tirx.Select(top > splat(-math.inf, "float32", 1), top, zero)
            kernel.store(self.scores, row * self.pitch + self.by_row, top)
        with kernel.loop("row", rows) as row:
            base = kernel.let("base", row * self.pitch)
            top = kernel.let("top", repeat(load(self.scores, base + self.by_row), lanes))
            if not self.scaled:
                top = kernel.let("top", top * factor)
            total = kernel.registers("total", "float32", lanes)
            kernel.store(total, 0, splat(0.0, "float32", lanes), lanes)
            with kernel.loop("i", self.key_panel.padded // lanes) as i:
                at = kernel.let("at", base + i * lanes)
                score = load(self.scores, at, lanes)
                if self.scaled:
                    below = (score - top) * splat(LOG2_E, "float32", lanes)
                else:  # one instruction where there are fused ones
                    below = score * factor - top
                share = exp2_below_zero(kernel.let("below", below), kernel.let)
                share = kernel.let("share", share)
                kernel.store(self.scores, at, share, lanes)
                kernel.store(total, 0, load(total, 0, lanes) + share, lanes)
            kernel.store(self.scores, base + self.by_lane, load(total, 0, lanes), lanes)
        with kernel.loop("row", rows) as row:
            total = load(self.scores, row * self.pitch + self.by_lane, lanes)
            whole = folded(kernel, total, lanes, lambda a, b: a + b)
            inverse = splat(1.0, "float32", 1) / whole
            if self.shape.zero_rows:
                inverse = tirx.Select(whole.equal(zero), zero, inverse)
            kernel.store(self.scores, row * self.pitch + self.by_row, inverse)

    def store_results(
        self, query: Expr, column: Expr, results: list[list[Expr]], last_lanes: int
    ) -> None:
        """Divide by the sums of the rows and store."""
        kernel, lanes = self.kernel, self.isa.lanes
        for row, values in enumerate(results):
            inverse = kernel.let("inverse", load(self.scores, row * self.pitch + self.by_row))
            for vector, value in enumerate(values):
                value = value * repeat(inverse, lanes)
                valid = last_lanes if vector == len(values) - 1 else lanes
                target = self.results.at(query + row, column + vector * lanes)
                store_vector(kernel, self.y, target, kernel.let("value", value), valid, lanes)
