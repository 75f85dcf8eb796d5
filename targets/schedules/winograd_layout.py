"""How a convolution by Winograd's filtering is cut up, and how its tensors lie in memory.

The kernel is in `winograd.py`, which says what the words mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepress.targets.isa.base import Isa
from edgepress.targets.schedules.conv import Tile
from edgepress.targets.schedules.winograd_transforms import Transform

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class WinogradShape:
    """Geometry of a 3×3 convolution with stride 1 over an input that is not padded.

    Attributes:
        batch, height, width, channels: of the input.
        top, left: rows and columns of zeros before the input; what is missing behind it to fill the
            output is zero too.
        out_height, out_width, out_channels: of the output.
    """

    batch: int
    height: int
    width: int
    channels: int
    top: int
    left: int
    out_height: int
    out_width: int
    out_channels: int

    def tiles(self, transform: Transform) -> tuple[int, int]:
        """Return rows of tiles, of all images together, and tiles in a row."""
        rows = -(-self.out_height // transform.outputs)
        return self.batch * rows, -(-self.out_width // transform.outputs)

    def products(self, transform: Transform) -> int:
        """Multiply-accumulates of the matrix products."""
        rows, columns = self.tiles(transform)
        return transform.products * rows * columns * self.channels * self.out_channels


@dataclass(frozen=True)
class WinogradPlan:
    """How a layer is computed.

    Attributes:
        transform: the tile.
        weights_first: the order of loops; see `winograd.py`.
        lines: rows of tiles whose transformed inputs are held at once.
        depth: input channels whose transformed weights are held at once; all of them where
            weights come first.
        tile: accumulators of a matrix product, tiles × vectors of output channels.
    """

    transform: Transform
    weights_first: bool
    lines: int
    depth: int
    tile: Tile


@dataclass(frozen=True)
class Span:
    """Neighbouring tiles along an axis for which the same elements exist.

    Attributes:
        first, stop: the tiles.
        low, high: of the elements of each tile, `low <= i < high` exist.
    """

    first: int
    stop: int
    low: int
    high: int


def spans(count: int, pitch: int, size: int, offset: int, extent: int) -> list[Span]:
    """Classify tiles that start at `tile * pitch - offset` and want `size` elements of `extent`."""
    found: list[Span] = []
    for tile in range(count):
        start = tile * pitch - offset
        low, high = min(max(-start, 0), size), max(min(extent - start, size), 0)
        if found and (found[-1].low, found[-1].high) == (low, high):
            first = found.pop().first
        else:
            first = tile
        found.append(Span(first, tile + 1, low, high))
    return found


def blocks_of(channels: int, isa: Isa, columns: int) -> tuple[int, int]:
    """Return how many whole blocks of output channels there are, and the vectors of the last."""
    full, rest = divmod(channels, columns * isa.lanes)
    return full, -(-rest // isa.lanes)


def pack_weights(weights: Array, isa: Isa, columns: int) -> Array:
    """Pack `[out, in, 3, 3]` weights for blocks of `columns` vectors; missing channels are zero."""
    out, channels = weights.shape[:2]
    full, last = blocks_of(out, isa, columns)
    parts = []
    for block, vectors in enumerate([columns] * full + [last] * (last > 0)):
        first = block * columns * isa.lanes
        block_weights = np.zeros((vectors * isa.lanes, channels, 9), np.float32)
        some = weights[first : first + vectors * isa.lanes].reshape(-1, channels, 9)
        block_weights[: len(some)] = some
        lanes_apart = block_weights.reshape(vectors, isa.lanes, channels, 9)
        parts.append(lanes_apart.transpose(2, 0, 3, 1).ravel())
    return np.concatenate(parts)


def scratch_size(shape: WinogradShape, isa: Isa, plan: WinogradPlan) -> int:
    """Return how many float32 the threads of one call share: transformed weights or inputs."""
    if not plan.weights_first:
        return inputs_size(shape, isa, plan)
    full, last = blocks_of(shape.out_channels, isa, plan.tile.columns)
    whole = weights_size(plan.tile.columns, isa, plan)
    return full * whole + (weights_size(last, isa, plan) if last else 0)


def inputs_size(shape: WinogradShape, isa: Isa, plan: WinogradPlan) -> int:
    """Return how many float32 the transformed inputs of `plan.lines` rows of tiles take.

    Positions lie a vector more apart than they need, here and below, so as not to share a set of
    the cache.
    """
    tiles = plan.lines * shape.tiles(plan.transform)[1]
    return plan.transform.products * (tiles * shape.channels + isa.lanes)


def weights_size(vectors: int, isa: Isa, plan: WinogradPlan) -> int:
    """Return how many float32 the transformed weights of a block of output channels take.

    Those of all positions, or of one row of positions where tiles come first.
    """
    positions = plan.transform.products if plan.weights_first else plan.transform.inputs
    return positions * (plan.depth * vectors + 1) * isa.lanes
