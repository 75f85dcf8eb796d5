"""Products of small matrices: tiles of two pixels by two channels in one register (`smmla`).

Two registers that `conv` holds for the same vector of four channels at two neighbouring pixels,

    a = p0c0 p0c1 p0c2 p0c3        b = p1c0 p1c1 p1c2 p1c3

become two 2×2 matrices while the reduction runs, and the same exchange of halves brings them back:

    a = p0c0 p0c1 p1c0 p1c1        b = p0c2 p0c3 p1c2 p1c3

An instruction adds the product of two pixels' eight inputs with two channels' eight weights to
such a matrix: 32 products, twice those of a dot product. The inputs of two pixels are brought into
one register by a shuffle, which one pixel on its own would waste.
"""

from __future__ import annotations

from tvm import tirx

from edgepress.targets.isa.base import Isa
from edgepress.targets.schedules.emit import Buffer, Expr, Kernel, load

GROUP = 8  # inputs of one product
_VECTOR = 16  # bytes of a register
_HALVES_OF_COLUMN = 2  # pairs of channels in a vector


def by_matrices(channels: int, pixels: int, isa: Isa, quantized: bool) -> bool:
    """Tell whether a convolution or product of so many inputs is made of products of matrices.

    `pixels` are the neighbouring outputs that may share a tile.
    """
    return quantized and isa.matrix is not None and channels % GROUP == 0 and pixels > 1


def held_registers(rows: int, columns: int) -> int:
    """Return how many registers a tile needs."""
    return (rows + rows % 2) * columns + _HALVES_OF_COLUMN * columns + 4


def step_cost(rows: int, columns: float) -> float:
    """Count the instructions of eight inputs: products, loads, shuffles, a share of the loop."""
    pairs = -(-rows // 2)
    return pairs * (_HALVES_OF_COLUMN * columns + 2) + columns + 2


def exchange(kernel: Kernel, held: list[list[Buffer]]) -> None:
    """Turn vectors of channels of neighbouring rows into matrices, or back."""
    for upper, lower in zip(held[::2], held[1::2], strict=True):
        for first, second in zip(upper, lower, strict=True):
            both = [kernel.let("both", load(one, 0, 4)) for one in (first, second)]
            for target, lanes in ((first, (0, 1, 4, 5)), (second, (2, 3, 6, 7))):
                kernel.store(target, 0, _shuffle(both, lanes), 4)


def copied(kernel: Kernel, accumulators: list[Buffer]) -> list[Buffer]:
    """Copy the accumulators of a row, for a pixel that has no neighbour."""
    copies = []
    for accumulator in accumulators:
        copies.append(kernel.registers("held", "int32", 4))
        kernel.store(copies[-1], 0, load(accumulator, 0, 4), 4)
    return copies


def reduce_pairs(
    kernel: Kernel,
    isa: Isa,
    held: list[list[Buffer]],
    inputs: list[Expr],
    weights: tuple[Buffer, Expr],
    steps: int,
) -> None:
    """Emit reduction steps of eight inputs.

    Args:
        kernel: that is written.
        isa: has `matrix`.
        held: matrices, as `exchange` leaves them.
        inputs: `steps` times eight inputs of every row; rows may repeat.
        weights: where they lie, and the index of the first: `[steps][columns][4][8]`.
        steps: 1 or 2.
    """
    assert isa.matrix is not None
    buffer, base = weights
    columns, size = len(held[0]), steps * GROUP
    for part in range(steps):
        pairs = [
            kernel.let("pixels", _pixels(inputs[row : row + 2], part, size))
            for row in range(0, len(held), 2)
        ]
        for column in range(columns):
            for half in range(_HALVES_OF_COLUMN):
                index = (part * columns + column) * _HALVES_OF_COLUMN + half
                w = kernel.let("w", load(buffer, base + index * _VECTOR, _VECTOR))
                for pair, pixels in enumerate(pairs):
                    matrix = held[2 * pair + half][column]
                    kernel.store(matrix, 0, isa.matrix(load(matrix, 0, 4), pixels, w), 4)


def _pixels(pair: list[Expr], part: int, size: int) -> Expr:
    """Put eight inputs of two pixels into one vector."""
    first = part * GROUP
    return _shuffle(pair, [at + i for at in (first, size + first) for i in range(GROUP)])


def _shuffle(values: list[Expr], lanes: list[int] | tuple[int, ...]) -> Expr:
    return tirx.Shuffle(values, [tirx.const(lane, "int32") for lane in lanes])
