"""Interleaves vectors so that every 32-bit lane holds one element of each, within 128 bits.

Instructions that zip two vectors work on 128 bits at a time (`vpunpck`, `zip1` and `zip2`), so
that wider vectors come out in an order of their own. Nothing needs to undo it: weights, biases and
multipliers are packed in that order, and narrowing with saturation, again 128 bits at a time,
brings outputs back into the order of the inputs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import tirx

from edgepress.targets.schedules.deferred import deferred
from edgepress.targets.schedules.emit import Expr, Kernel

_SEGMENT_BYTES = 16


def interleaved(kernel: Kernel, rows: Sequence[Expr], size: int, element_bytes: int) -> list[Expr]:
    """Zip 2 or 4 vectors of `size` elements each into as many vectors."""

    def zipped(first: Expr, second: Expr, zip_: _Zip) -> Expr:
        constants = [tirx.const(int(value), "int32") for value in dataclasses.astuple(zip_)]
        return kernel.let("zipped", deferred(_shuffle, first.ty, [first, second, *constants]))

    return _zipped(rows, size, element_bytes, zipped)


def _shuffle(_kind: Any, first: Expr, second: Expr, *zip_: Expr) -> Expr:
    return tirx.Shuffle([first, second], _constants(_Zip(*(int(value) for value in zip_))))


@functools.cache
def _constants(zip_: _Zip) -> Any:
    return tvm.runtime.convert([tirx.const(index, "int32") for index in zip_.indices()])


def lane_order(size: int, group: int, element_bytes: int) -> npt.NDArray[np.int64]:
    """Return which element of the inputs each 32-bit lane holds, over all vectors in order."""
    vectors = _zipped(
        [np.arange(size)] * group,
        size,
        element_bytes,
        lambda first, second, zip_: np.concatenate([first, second])[zip_.indices()],
    )
    return np.concatenate(vectors)[::group]


@dataclass(frozen=True)
class _Zip:
    """Elements of two vectors in turns: from the low or the high halves of every 128 bits.

    Attributes:
        size: elements of a vector.
        element_bytes: of one element.
        unit: how many stay together.
        high: which halves.
    """

    size: int
    element_bytes: int
    unit: int
    high: int

    def indices(self) -> list[int]:
        """Return what a shuffle of both takes; from `size` on they mean the second vector."""
        per_segment = _SEGMENT_BYTES // (self.element_bytes * self.unit)
        half = per_segment // 2
        return [
            start + i
            for segment in range(0, self.size // self.unit, per_segment)
            for at in range(segment + self.high * half, segment + (self.high + 1) * half)
            for start in (at * self.unit, at * self.unit + self.size)
            for i in range(self.unit)
        ]


def _zipped(
    rows: Sequence[Any],
    size: int,
    element_bytes: int,
    zipped: Callable[[Any, Any, _Zip], Any],
) -> list[Any]:
    vectors, unit = list(rows), 1
    while unit < len(rows):
        half = len(vectors) // 2
        # Rows 0 and 1 belong together and rows 2 and 3; then the low halves of both pairs.
        pairs = (
            zip(vectors[::2], vectors[1::2], strict=True)
            if unit == 1
            else zip(vectors[:half], vectors[half:], strict=True)
        )
        ways = [_Zip(size, element_bytes, unit, high) for high in (0, 1)]
        vectors = [zipped(*pair, way) for pair in pairs for way in ways]
        unit *= 2
    return vectors
