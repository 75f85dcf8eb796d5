"""Products of two float matrices that are both computed, for every matrix of a batch.

The right one is packed one block of columns at a time (`panel`), transposed on the way where its
columns lie in one piece; all rows of the left one are multiplied with the block while it is in
cache. Operands say by strides where they lie, so that transposes and broadcasts cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from edgepress.targets.isa.base import Isa
from edgepress.targets.schedules.emit import Expr, Kernel
from edgepress.targets.schedules.panel import (
    Matrix,
    Panel,
    Place,
    multiply,
    pack,
    store_vector,
    tile_for,
)

_PARALLEL_MACS = 500_000  # below this, handing over a part costs more than it saves


@dataclass(frozen=True)
class MatMulShape:
    """Sizes of `[batch, heads, rows, depth] x [batch, heads, depth, width]`, and the places.

    Attributes:
        batch, heads: how many products there are; two axes, as operands may repeat along one.
        rows, depth, width: of each product.
        left, right: where the operands lie; neighbouring columns of the right one, or neighbouring
            rows, are neighbours in memory.
    """

    batch: int
    heads: int
    rows: int
    depth: int
    width: int
    left: Place
    right: Place

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.batch * self.heads * self.rows * self.depth * self.width


def matmul(name: str, shape: MatMulShape, isa: Isa) -> Any:
    """Generate the kernel: arguments left, right and y `[batch, heads, rows, width]`, float32."""
    return _Writer(name, shape, isa).write()


class _Writer:
    """Emits one kernel."""

    def __init__(self, name: str, shape: MatMulShape, isa: Isa) -> None:
        self.kernel, self.shape, self.isa = Kernel(name), shape, isa
        self.left = self.kernel.argument("left", "float32", shape.left.size)
        self.right = self.kernel.argument("right", "float32", shape.right.size)
        size = shape.batch * shape.heads * shape.rows * shape.width
        self.y = self.kernel.argument("y", "float32", size)
        self.tile = tile_for(shape.rows, shape.depth, shape.width, isa)

    def write(self) -> Any:
        """Emit one task per matrix and full block of columns, then those of the last blocks."""
        shape, threaded = self.shape, self.shape.macs >= _PARALLEL_MACS
        matrices, wide = shape.batch * shape.heads, self.tile.columns * self.isa.lanes
        full, rest = divmod(shape.width, wide)
        if full:
            with self.kernel.loop("task", matrices * full, parallel=threaded) as task:
                task = tirx.const(0, "int32") + task
                self.block(tirx.floordiv(task, full), tirx.floormod(task, full) * wide, wide)
        if rest:
            with self.kernel.loop("task", matrices, parallel=threaded) as task:
                self.block(tirx.const(0, "int32") + task, full * wide, rest)
        return self.kernel.finish()

    def block(self, matrix: Expr, first: Expr, width: int) -> None:
        """Emit `width` columns from `first` on of one product."""
        kernel, shape = self.kernel, self.shape
        matrix, first = kernel.let("matrix", matrix), kernel.let("first", first)
        batch = kernel.let("batch", tirx.floordiv(matrix, shape.heads))
        head = kernel.let("head", tirx.floormod(matrix, shape.heads))
        left = shape.left.matrix(kernel, self.left, batch, head)
        right = shape.right.matrix(kernel, self.right, batch, head)
        columns = Matrix(right.buffer, right.at(0, first), right.row, right.column)
        panel = Panel(shape.depth, width, self.tile.columns, self.isa.lanes)
        packed = kernel.workspace("packed", "float32", panel.size)
        pack(kernel, packed, panel, columns)
        full, rest = divmod(shape.rows, self.tile.rows)

        def rows(start: Expr, count: int) -> None:
            begin = kernel.let("begin", left.at(start, 0))
            target = kernel.let("target", (matrix * shape.rows + start) * shape.width + first)

            def store(column: Expr, results: list[list[Expr]], last_lanes: int) -> None:
                self.store(target + column, results, last_lanes)

            tile = Matrix(left.buffer, begin, left.row, left.column)
            multiply(kernel, self.isa, tile, count, panel, packed, store)

        if full:
            with kernel.loop("tile", full) as index:
                rows(index * self.tile.rows, self.tile.rows)
        if rest:
            rows(full * self.tile.rows, rest)

    def store(self, target: Expr, results: list[list[Expr]], last_lanes: int) -> None:
        """Store the results of a tile."""
        lanes = self.isa.lanes
        for row, values in enumerate(results):
            for column, value in enumerate(values):
                valid = last_lanes if column == len(values) - 1 else lanes
                index = target + row * self.shape.width + column * lanes
                store_vector(self.kernel, self.y, index, value, valid, lanes)
