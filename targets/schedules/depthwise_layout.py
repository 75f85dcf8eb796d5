"""Where a depthwise convolution's channels, weights and borders lie, for `schedules.depthwise`.

Channels are handled in blocks as wide as one vector of inputs; the last block ends at the last
channel and repeats some that came before. Weights, biases and multipliers are packed per block, in
the order of the lanes that multiply them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepress.targets.isa.base import Isa
from edgepress.targets.schedules.depthwise_taps import Taps
from edgepress.targets.schedules.interleave import lane_order

Array = npt.NDArray[Any]
_MOST_COLUMNS = 8  # 14 is no faster and twice the code
_MOST_TAPS = 250  # of all pixels of a tile, for the same reason
_SEGMENT_BYTES = 16  # what instructions that interleave work on


@dataclass(frozen=True)
class DepthwiseShape:
    """Geometry of a depthwise convolution.

    Attributes:
        batch, height, width, channels: of the input.
        out_height, out_width: of the output.
        kernel, strides, dilations: `(height, width)`.
        pads: rows above and columns to the left of the image that windows cover; how many are
            below and to the right follows.
    """

    batch: int
    height: int
    width: int
    channels: int
    out_height: int
    out_width: int
    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    pads: tuple[int, int] = (0, 0)

    @property
    def lines(self) -> int:
        """Output rows over the whole batch."""
        return self.batch * self.out_height

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.lines * self.out_width * self.channels * self.kernel[0] * self.kernel[1]


@dataclass(frozen=True)
class Block:
    """Neighbouring channels that are handled together, `count` times in a row.

    Attributes:
        first: first channel.
        channels: how many.
        count: how many such blocks follow each other.
        group: taps that a lane multiplies at once.
    """

    first: int
    channels: int
    count: int
    group: int


def channel_blocks(channels: int, isa: Isa, quantized: bool) -> list[Block]:
    """Split channels into blocks: as many of the widest that fits as there are, then the rest.

    >>> from edgepress.targets.isa.base import load_isa
    >>> channel_blocks(144, load_isa("avx512_vnni"), True)
    [Block(first=0, channels=64, count=2, group=4), Block(first=112, channels=32, count=1, group=4)]
    """
    element_bytes = np.dtype(isa.staged).itemsize if quantized else 4
    words = quantized and isa.by_pairs
    group = isa.group if quantized and not words else 1
    widest = 1 if isa.lanes == 1 else isa.vector_bytes // element_bytes
    if words and isa.vector_registers < 32:
        widest //= 2  # sums of the widest block alone would fill the registers
    least = _SEGMENT_BYTES // element_bytes if group > 1 else 1
    if channels < least:
        least, widest, group = 1, least // 2, 1
    widths = [widest >> i for i in range(widest.bit_length()) if widest >> i >= least]
    width = next(width for width in widths if width <= channels)
    count, rest = divmod(channels, width)
    blocks = [Block(0, width, count, group)]
    if rest:
        last = min(width for width in widths if width >= rest)
        blocks.append(Block(channels - last, last, 1, group))
    return blocks


def order_of(block: Block, isa: Isa) -> npt.NDArray[np.int64]:
    """Return which channel of a block each lane holds."""
    if block.group == 1:
        return np.arange(block.channels)
    return lane_order(block.channels, block.group, np.dtype(isa.staged).itemsize)


def weights_dtype(isa: Isa, quantized: bool) -> str:
    """Return the dtype of packed weights."""
    if not quantized:
        return "float32"
    return "int8" if isa.group == 4 else "int16"


def taps_of(shape: DepthwiseShape, block: Block) -> Taps:
    """Return how a block's lanes multiply the window."""
    return Taps(shape.kernel, shape.strides[1], shape.dilations[1], block.group)


def pack_weights(weights: Array, shape: DepthwiseShape, isa: Isa) -> Array:
    """Pack `[channels, 1, kh, kw]` weights: `[block][product][lane][taps of the lane]`."""
    quantized = weights.dtype != np.float32
    dtype = weights_dtype(isa, quantized)
    # A last column of zeros stands for the taps that a lane has no use for.
    taps = np.pad(weights.reshape(shape.channels, -1), ((0, 0), (0, 1))).astype(dtype)
    parts = []
    for block in channel_blocks(shape.channels, isa, quantized):
        sets = [
            [-1 if tap is None else tap[0] * shape.kernel[1] + tap[1] for tap in weight_set]
            for weight_set in taps_of(shape, block).weight_sets
        ]
        for index in range(block.count):
            channels = block.first + index * block.channels + order_of(block, isa)
            parts.append(taps[channels][:, sets].transpose(1, 0, 2).ravel())
    return np.concatenate(parts)


def pack_channels(values: Array, isa: Isa, quantized: bool) -> Array:
    """Pack a value per channel in the order of the lanes."""
    return np.concatenate(
        [
            values[block.first + index * block.channels + order_of(block, isa)]
            for block in channel_blocks(values.size, isa, quantized)
            for index in range(block.count)
        ]
    )


def border_size(shape: DepthwiseShape) -> int:
    """Return how many zero points the kernel reads in place of a row: 0 if it needs none."""
    if not any(any(beyond(shape, row)) for row in range(shape.kernel[0])):
        return 0
    columns = (tile_columns(shape) - 1) * shape.strides[1]
    return (columns + (shape.kernel[1] - 1) * shape.dilations[1] + 1) * shape.channels


def beyond(shape: DepthwiseShape, window_row: int) -> tuple[bool, bool]:
    """Tell whether a row of the window is above or below the image for some output row."""
    first = window_row * shape.dilations[0] - shape.pads[0]
    last = first + (shape.out_height - 1) * shape.strides[0]
    return first < 0, last >= shape.height


def tile_columns(shape: DepthwiseShape) -> int:
    """Return how many output pixels a tile has."""
    most = max(1, min(_MOST_COLUMNS, _MOST_TAPS // (shape.kernel[0] * shape.kernel[1])))
    count = -(-shape.out_width // most)
    return -(-shape.out_width // count)
