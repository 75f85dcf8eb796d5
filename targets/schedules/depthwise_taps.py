"""How the taps of a depthwise window are spread over lanes that multiply several at once.

A lane multiplies `group` inputs of one channel with as many weights. Its inputs are either
neighbouring rows of one column, interleaved once and used by every output pixel whose window
covers the column; or, for a row that is left over, `group` neighbouring columns, counted from the
first of a tile, so that there are as many variants of the weights as windows can begin at places
within such a run of columns. With `group` 1 both are single taps.

Only the weights of a window that begins where a run does are stored. In the other variants they
have moved up within their lanes, and over into the next run: two shifts make them.

A 5×5 window on four taps per lane: rows 0 to 3 take 5 products, and row 4 takes 2, of which each
set of inputs serves up to 8 output pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

Tap = tuple[int, int]
#: One entry per element of a lane: a row and column of the window, or nothing (a weight of 0).
WeightSet = tuple[Tap | None, ...]


@dataclass(frozen=True)
class Rows:
    """Inputs of a lane: rows of the window from `first` on, in one column of the tile."""

    first: int
    column: int


@dataclass(frozen=True)
class Columns:
    """Inputs of a lane: `group` columns of the tile from `column` on, in one row of the window."""

    row: int
    column: int


Source = Rows | Columns


@dataclass(frozen=True)
class Weights:
    """What a product multiplies its inputs with: a packed set, or two of them moved up.

    Attributes:
        stored: the set whose elements are moved up in their lanes; None where there is none.
        shift: by so many elements.
        before: the set whose last elements come in from below; None where zeros do.
    """

    stored: int | None
    shift: int = 0
    before: int | None = None


@dataclass(frozen=True)
class Taps:
    """The products of one output pixel.

    Attributes:
        kernel: height and width of the window.
        stride, dilation: horizontal ones.
        group: taps that a lane multiplies at once.
    """

    kernel: tuple[int, int]
    stride: int
    dilation: int
    group: int

    @property
    def _left_over(self) -> bool:
        """Whether the last row of the window is taken column by column."""
        height, width = self.kernel
        alone = height % self.group == 1 and width > 1
        return self.group > 1 and alone and self.dilation == 1

    @property
    def _groups(self) -> range:
        """First rows of the groups of rows."""
        return range(0, self.kernel[0] - self._left_over, self.group)

    @property
    def weight_sets(self) -> list[WeightSet]:
        """The sets of weights that are packed, in their order."""
        height, width = self.kernel
        sets = [
            tuple((r, column) if r < self._end else None for r in range(first, first + self.group))
            for first in self._groups
            for column in range(width)
        ]
        if self._left_over:
            for run in range(self._runs(0)):
                columns = range(run * self.group, (run + 1) * self.group)
                sets.append(tuple((height - 1, c) if c < width else None for c in columns))
        return sets

    def products(self, pixel: int) -> list[tuple[Source, Weights]]:
        """Return the inputs and the weights of every product of an output pixel."""
        height, width = self.kernel
        first = pixel * self.stride
        products: list[tuple[Source, Weights]] = [
            (Rows(row, first + column * self.dilation), Weights(index * width + column))
            for index, row in enumerate(self._groups)
            for column in range(width)
        ]
        if self._left_over:
            shift = first % self.group
            products += [
                (Columns(height - 1, first - shift + run * self.group), self._moved(run, shift))
                for run in range(self._runs(shift))
            ]
        return products

    def _moved(self, run: int, shift: int) -> Weights:
        """Return the weights of the left-over row for windows that begin `shift` columns in."""
        start = len(self._groups) * self.kernel[1]
        stored = start + run if run < self._runs(0) else None
        return Weights(stored, shift, start + run - 1 if shift and run else None)

    @property
    def _end(self) -> int:
        return self.kernel[0] - self._left_over

    def _runs(self, shift: int) -> int:
        """Runs of columns under a window that begins `shift` columns into the first."""
        return -(-(shift + self.kernel[1]) // self.group)
