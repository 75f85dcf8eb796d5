"""Writes a tile of accumulators out: epilogue, residual, and stores as wide as the dtype allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx

from edgepress.targets.isa.base import Isa
from edgepress.targets.schedules.emit import Buffer, Expr, Kernel, chunks, lanes_of, load
from edgepress.targets.schedules.epilogue import Epilogue, finish
from edgepress.targets.schedules.narrow import can_narrow, narrowed


@dataclass(frozen=True)
class Outputs:
    """Where the outputs of a tile go, and how they come about.

    Attributes:
        kernel: the kernel that is written.
        isa: its instruction set.
        epilogue: what accumulators become.
        y: the outputs.
        pitch: elements from one pixel to the next in `y`.
        residual: what is added, laid out like `y`.
    """

    kernel: Kernel
    isa: Isa
    epilogue: Epilogue
    y: Buffer
    pitch: int
    residual: Buffer | None = None

    def tile(
        self,
        held: Sequence[Sequence[Buffer]],
        scales: Sequence[Expr | None],
        y_base: Expr,
        last_lanes: int,
    ) -> None:
        """Write accumulators of several pixels × several vectors of channels.

        Args:
            held: accumulators by pixel and vector.
            scales: multipliers or shifts of every vector.
            y_base: index of the first output.
            last_lanes: how many channels of the last vector there are.
        """
        widths = [int(register.shape[0]) for register in held[0]]
        whole = self.residual is None or last_lanes == widths[-1]
        if can_narrow(self.epilogue, self.isa) and whole:
            self._narrow_tile(held, scales, y_base, widths, last_lanes)
            return
        for column, (scale, lanes) in enumerate(zip(scales, widths, strict=True)):
            valid = last_lanes if column == len(widths) - 1 else lanes
            for row, accumulators in enumerate(held):
                index = y_base + row * self.pitch + column * self.isa.lanes
                self._vector(index, load(accumulators[column], 0, lanes), scale, valid, lanes)

    def _vector(
        self, index: Expr, accumulator: Expr, scale: Expr | None, valid: int, lanes: int
    ) -> None:
        """Write the first `valid` of a vector's lanes; a residual is read as it lies there."""
        if self.residual is None:
            value = self.kernel.let("value", finish(accumulator, scale, self.epilogue, lanes))
            store_lanes(self.kernel, self.y, index, value, 0, valid, lanes)
            return
        for first, width, count in chunks(valid, lanes):
            for at in range(first, first + count * width, width):
                part = lanes_of(accumulator, at, width, lanes)
                factor = None if scale is None else lanes_of(scale, at, width, lanes)
                residual = load(self.residual, index + at, width)
                value = finish(part, factor, self.epilogue, width, residual)
                self.kernel.store(self.y, index + at, value, width)

    def _narrow_tile(
        self,
        held: Sequence[Sequence[Buffer]],
        scales: Sequence[Expr | None],
        y_base: Expr,
        widths: Sequence[int],
        last_lanes: int,
    ) -> None:
        """Write 8-bit outputs, four vectors at a time, whatever pixels these are of."""
        lanes, columns = self.isa.lanes, len(scales)
        factors = [
            None if scale is None else widened(scale, width, lanes)
            for scale, width in zip(scales, widths, strict=True)
        ]
        places = [(row, column) for row in range(len(held)) for column in range(columns)]
        offsets = [row * self.pitch + column * lanes for row, column in places]
        sizes = [last_lanes if column == columns - 1 else lanes for _, column in places]

        def vectors(four: slice, source: Callable[[int, int, int], Expr]) -> list[Expr]:
            """Read up to four vectors, `source(row, column, lanes)`, all of them as wide."""
            return [
                widened(source(row, column, widths[column]), widths[column], lanes)
                for row, column in places[four]
            ]

        for first in range(0, len(places), 4):
            four = slice(first, first + 4)
            residuals = []
            if self.residual is not None:
                residuals = vectors(four, self._residual(y_base))
            value = narrowed(
                vectors(four, lambda row, column, width: load(held[row][column], 0, width)),
                [factors[column] for _, column in places[four]],
                self.epilogue,
                self.isa,
                residuals,
            )
            value = self.kernel.let("value", value)
            for start, size in runs(offsets[four], sizes[four], lanes):
                index = y_base + offsets[first + start // lanes]
                store_lanes(self.kernel, self.y, index, value, start, size, 4 * lanes)

    def _residual(self, y_base: Expr) -> Callable[[int, int, int], Expr]:
        def read(row: int, column: int, width: int) -> Expr:
            index = y_base + row * self.pitch + column * self.isa.lanes
            return load(self.residual, index, width)

        return read


def widened(value: Expr, width: int, lanes: int) -> Expr:
    """Repeat half a vector where instructions want a whole one; the copy is not used."""
    if width == lanes:
        return value
    return tirx.Shuffle([value] * 2, [tirx.const(i % width, "int32") for i in range(lanes)])


def runs(offsets: Sequence[int], sizes: Sequence[int], lanes: int) -> list[tuple[int, int]]:
    """Join vectors that follow each other in memory: `(first lane, lanes)` of each run.

    >>> runs([0, 16, 96, 112], [16, 16, 16, 8], 16)
    [(0, 32), (32, 24)]
    """
    joined: list[tuple[int, int]] = []
    for i, size in enumerate(sizes):
        if i and sizes[i - 1] == lanes and offsets[i] == offsets[i - 1] + lanes:
            start, before = joined.pop()
            joined.append((start, before + size))
        else:
            joined.append((i * lanes, size))
    return joined


def store_lanes(
    kernel: Kernel, y: Buffer, index: Expr, value: Expr, start: int, size: int, lanes: int
) -> None:
    """Store `size` of a vector's `lanes` lanes, from lane `start` on."""
    for first, width, count in chunks(size, lanes):
        for at in range(first, first + count * width, width):
            kernel.store(y, index + at, lanes_of(value, start + at, width, lanes), width)
