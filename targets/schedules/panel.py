"""Float matrix products whose right operand is packed first: what attention and MatMul share.

A panel holds a matrix `[depth, width]` as blocks of `columns` vectors, `[block][depth][columns *
lanes]`, the last block narrower, with zeros behind the width. A tile of `rows` × `columns` vectors
of results stays in registers while the depth runs, as in `conv`: each step loads `columns` vectors
of the panel and repeats one left value per row to all lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from edgepress.targets.isa.base import Isa
from edgepress.targets.schedules.conv import ConvShape, Tile, choose_tile
from edgepress.targets.schedules.emit import (
    Buffer,
    Expr,
    Kernel,
    chunks,
    lanes_of,
    load,
    repeat,
    splat,
)

_BY_ELEMENT_BYTES = 16  # vectors of Neon multiply by one lane of a register


@dataclass(frozen=True)
class Matrix:
    """A matrix in memory: where it starts, and how far apart its rows and columns are."""

    buffer: Buffer
    start: Expr
    row: int
    column: int = 1

    def at(self, row: Expr, column: Expr) -> Expr:
        """Return the index of an element."""
        return self.start + row * self.row + column * self.column


@dataclass(frozen=True)
class Place:
    """Where a `[batch, heads, rows, columns]` tensor lies in another, in elements.

    Attributes:
        size: of the other.
        start: of the first element.
        batch, head, row, column: how far apart neighbours are.
    """

    size: int
    start: int
    batch: int
    head: int
    row: int
    column: int = 1

    def matrix(self, kernel: Kernel, buffer: Buffer, batch: Expr, head: Expr) -> Matrix:
        """Return the matrix of one head."""
        start = kernel.let("start", self.start + batch * self.batch + head * self.head)
        return Matrix(buffer, start, self.row, self.column)


@dataclass(frozen=True)
class Panel:
    """Geometry of a packed matrix.

    Attributes:
        depth, width: of the matrix.
        columns: vectors of a block.
        lanes: of a vector.
    """

    depth: int
    width: int
    columns: int
    lanes: int

    @property
    def padded(self) -> int:
        """Elements of one row, zeros included."""
        return -(-self.width // self.lanes) * self.lanes

    @property
    def size(self) -> int:
        """Elements of the whole panel."""
        return self.depth * self.padded

    def blocks(self, kernel: Kernel) -> Iterator[tuple[Expr, int, int]]:
        """Emit what is done for every block: its first column, its vectors, lanes of the last.

        The body of the `for` runs once for all full blocks, in a loop, and once for the last one.
        """
        wide = self.columns * self.lanes
        full, rest = divmod(self.width, wide)
        if full:
            with kernel.loop("block", full) as block:
                yield block * wide, self.columns, self.lanes
        if rest:
            vectors = -(-rest // self.lanes)
            yield full * wide, vectors, rest - (vectors - 1) * self.lanes


def tile_for(rows: int, depth: int, width: int, isa: Isa) -> Tile:
    """Pick rows and columns for a product of this size."""
    return choose_tile(ConvShape(1, 1, rows, depth, 1, rows, width), isa, False)


def pack(kernel: Kernel, target: Buffer, panel: Panel, source: Matrix) -> None:
    """Emit the packing of a matrix whose rows or columns (`row` is 1) lie in one piece each."""
    for first, vectors, last_lanes in panel.blocks(kernel):
        base = kernel.let("base", first * panel.depth)
        for column in range(vectors):
            valid = last_lanes if column == vectors - 1 else panel.lanes
            at = first + column * panel.lanes
            to = Matrix(target, base + column * panel.lanes, vectors * panel.lanes)
            if source.column == 1:
                _copy_rows(kernel, to, source, at, panel, valid)
            else:
                _turn_columns(kernel, to, source, at, panel, valid)


def _copy_rows(
    kernel: Kernel, to: Matrix, source: Matrix, first: Expr, panel: Panel, valid: int
) -> None:
    """Copy one vector of every row."""
    with kernel.loop("k", panel.depth) as k:
        origin = kernel.let("origin", source.at(k, first))
        target = kernel.let("target", to.at(k, 0))
        if valid < panel.lanes:
            kernel.store(to.buffer, target, splat(0.0, "float32", panel.lanes), panel.lanes)
        copy_vector(kernel, to.buffer, target, source.buffer, origin, valid, panel.lanes)


def _turn_columns(
    kernel: Kernel, to: Matrix, source: Matrix, first: Expr, panel: Panel, valid: int
) -> None:
    """Transpose `valid` columns of the source, each contiguous, to one vector of every row."""
    lanes = panel.lanes
    whole, rest = divmod(panel.depth, lanes)
    if whole:
        with kernel.loop("k", whole) as k:
            columns = [
                kernel.let("column", load(source.buffer, source.at(k * lanes, first + i), lanes))
                if i < valid
                else splat(0.0, "float32", lanes)
                for i in range(lanes)
            ]
            for i, row in enumerate(_transposed(kernel, columns)):
                kernel.store(to.buffer, to.at(k * lanes + i, 0), row, lanes)
    if rest:
        with kernel.loop("k", rest) as k:
            target = kernel.let("target", to.at(whole * lanes + k, 0))
            if valid < lanes:
                kernel.store(to.buffer, target, splat(0.0, "float32", lanes), lanes)
            for i in range(valid):
                value = load(source.buffer, source.at(whole * lanes + k, first + i))
                kernel.store(to.buffer, target + i, value)


def _transposed(kernel: Kernel, vectors: list[Expr]) -> list[Expr]:
    """Transpose a square of vectors by exchanging ever larger squares beside its diagonal."""
    lanes, distance = len(vectors), 1
    while distance < lanes:
        upper = [i if i & distance == 0 else lanes + i - distance for i in range(lanes)]
        lower = [i + distance if i & distance == 0 else lanes + i for i in range(lanes)]
        for i in range(lanes):
            if i & distance:
                continue
            pair = vectors[i], vectors[i + distance]
            for place, order in ((i, upper), (i + distance, lower)):
                vectors[place] = kernel.let("turned", tirx.Shuffle(list(pair), _indices(order)))
        distance *= 2
    return vectors


def _indices(order: list[int]) -> list[Any]:
    return [tirx.const(i, "int32") for i in order]


def multiply(
    kernel: Kernel,
    isa: Isa,
    left: Matrix,
    rows: int,
    panel: Panel,
    packed: Buffer,
    store: Callable[[Expr, list[list[Expr]], int], None],
) -> None:
    """Emit the product of `rows` rows of a matrix `[rows, depth]` with a panel.

    Args:
        kernel: that is written.
        isa: decides how left values are read.
        left: its first row.
        rows: how many rows a tile has.
        panel: geometry of the right operand.
        packed: where it lies.
        store: called as `store(first column, results [row][vector], lanes of the last vector)`.
    """
    lanes = isa.lanes
    for first, vectors, last_lanes in panel.blocks(kernel):
        base = kernel.let("base", first * panel.depth)
        right = Matrix(packed, base, vectors * lanes)
        held = [
            [kernel.registers("held", "float32", lanes) for _ in range(vectors)]
            for _ in range(rows)
        ]
        for accumulators in held:
            for accumulator in accumulators:
                kernel.store(accumulator, 0, splat(0.0, "float32", lanes), lanes)
        by_element = isa.vector_bytes == _BY_ELEMENT_BYTES and left.column == 1
        step = lanes if by_element else 1
        whole, rest = divmod(panel.depth, step)
        if whole:
            with kernel.loop("k", whole) as k:
                _steps(kernel, held, left, right, k * step, step)
        if rest:
            with kernel.loop("k", rest) as k:
                _steps(kernel, held, left, right, whole * step + k, 1)
        results = [[load(accumulator, 0, lanes) for accumulator in row] for row in held]
        store(first, results, last_lanes)


def _steps(
    kernel: Kernel, held: list[list[Buffer]], left: Matrix, right: Matrix, k: Expr, count: int
) -> None:
    """Add `count` products to every accumulator."""
    vectors = len(held[0])
    lanes = right.row // vectors
    k = kernel.let("at", k)
    values = [
        kernel.let("x", load(left.buffer, left.at(row, k), count)) for row in range(len(held))
    ]
    for i in range(count):
        weights = [
            kernel.let("w", load(right.buffer, right.at(k + i, column * lanes), lanes))
            for column in range(vectors)
        ]
        for accumulators, value in zip(held, values, strict=True):
            x = repeat(lanes_of(value, i, 1, count), lanes)
            for accumulator, w in zip(accumulators, weights, strict=True):
                kernel.store(accumulator, 0, load(accumulator, 0, lanes) + x * w, lanes)


def copy_vector(
    kernel: Kernel,
    to: Buffer,
    target: Expr,
    source: Buffer,
    origin: Expr,
    valid: int,
    lanes: int,
) -> None:
    """Copy the first `valid` elements of a vector."""
    for first, width, count in chunks(valid, lanes):
        for at in range(first, first + count * width, width):
            kernel.store(to, target + at, load(source, origin + at, width), width)


def store_vector(
    kernel: Kernel, to: Buffer, index: Expr, value: Expr, valid: int, lanes: int
) -> None:
    """Store the first `valid` lanes of a vector."""
    for first, width, count in chunks(valid, lanes):
        for at in range(first, first + count * width, width):
            kernel.store(to, index + at, lanes_of(value, at, width, lanes), width)
