"""How threads share rows, and how each walks along: the type `Walk` of `rows.cuh`."""

from __future__ import annotations

from dataclasses import dataclass

_BLOCK = 128  # threads, where several rows share a block
_HELD = {32: 32, 256: 32, 512: 32, 1024: 16}  # threads of a row: the most values that each holds
_HELD_BY_FEW = 16  # by a warp, where rows are few: a block would be done sooner


@dataclass(frozen=True)
class RowWalk:
    """Rows, and the threads that walk along them.

    Attributes:
        rows: how many there are.
        length, stride: values of a row, and how far apart they are.
        threads: of a row: 1, a warp or a block.
        width: neighbouring values of a vector.
        vectors: of a thread at a time.
        rows_per_block: how many rows share a block.
    """

    rows: int
    length: int
    stride: int
    threads: int
    width: int
    vectors: int
    rows_per_block: int

    @property
    def source(self) -> str:
        """The type in CUDA C++."""
        numbers = (self.threads, self.width, self.vectors, self.length, self.stride)
        return f"Walk<{', '.join(map(str, numbers))}>"

    @property
    def block(self) -> tuple[int, int, int]:
        """Threads of a block."""
        return (self.threads * self.rows_per_block, 1, 1)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Blocks."""
        return (-(-self.rows // self.rows_per_block), 1, 1)


def walk_rows(rows: int, length: int, narrowest_bytes: int, multiprocessors: int) -> RowWalk:
    """Return the walk along rows of neighbouring values.

    Args:
        rows: how many.
        length: of a row.
        narrowest_bytes: bytes of the narrowest of the types that are read and written.
        multiprocessors: of the GPU.
    """
    held = dict(_HELD)
    if rows < 4 * multiprocessors:
        held[32] = _HELD_BY_FEW
    threads = next((threads for threads in held if length <= threads * held[threads]), max(held))
    width = 16 // narrowest_bytes
    if length % (threads * width):
        width = min(width, 4)  # lanes would have nothing to do
    while length % width:
        width //= 2
    vectors = min(-(-length // (threads * width)), _HELD[threads] // width)
    rows_per_block = 1
    if threads == 32:
        while rows_per_block < _BLOCK // 32 and rows >= 2 * rows_per_block * multiprocessors:
            rows_per_block *= 2
    return RowWalk(rows, length, 1, threads, width, vectors, rows_per_block)


def walk_columns(outer: int, length: int, inner: int) -> RowWalk:
    """Return the walk along the middle axis of `[outer, length, inner]`, a thread for each row."""
    return RowWalk(outer * inner, length, inner, 1, 1, min(length, _HELD[32]), _BLOCK)
