"""Which outputs a thread of a sliding window has: `kernels/strips.cuh`.

A thread has a strip of `rows` x `columns` output pixels, of one part of the channels. Blocks are
chosen so that few of their threads are idle, that they read little of what their neighbours read
too, and that there are enough of them for all multiprocessors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from edgepress.targets.cuda.window import Window

_MOST_THREADS = 256
_WARP = 32
_LINE_BYTES = 128
_HALO_WEIGHT = 0.25  # reading twice what the L2 cache has is cheaper than idle threads
_LINE_WEIGHT = 0.15  # each line of the L1 cache that a warp reads takes a cycle of it


@dataclass(frozen=True)
class Strips:
    """How outputs are split among threads.

    Attributes:
        rows, columns: output pixels of a strip.
        parts: into how many parts the channels of a pixel are split.
        block: threads along parts, columns and rows; or `sharing` threads instead of the last.
        sharing: threads that share a strip; 1 where every strip has one.
    """

    rows: int
    columns: int
    parts: int
    block: tuple[int, int, int]
    sharing: int = 1

    def grid(self, window: Window) -> tuple[int, int, int]:
        """Return the blocks along parts and columns, rows, and images."""
        x, y, z = self.block
        along = math.ceil(math.ceil(window.out_width / self.columns) / y)
        below = -(-window.out_height // self.rows)
        below = below if self.sharing > 1 else -(-below // z)
        return -(-self.parts // x) * along, below, window.batch

    def constants(self, window: Window) -> dict[str, int]:
        """Return what `kernels/strips.cuh` reads of its struct of constants."""
        out_height, out_width = (
            -(-out // each) * each
            for out, each in (
                (window.out_height, self.rows),
                (window.out_width, self.columns),
            )
        )
        beyond = [
            start > 0 or (out - 1) * stride - start + (taps - 1) * dilation >= size
            for start, out, stride, taps, dilation, size in zip(
                window.pads,
                (out_height, out_width),
                window.strides,
                window.kernel,
                window.dilations,
                (window.height, window.width),
                strict=True,
            )
        ]
        return {
            "HEIGHT": window.height,
            "WIDTH": window.width,
            "CHANNELS": window.channels,
            "OUT_HEIGHT": window.out_height,
            "OUT_WIDTH": window.out_width,
            "OUT_CHANNELS": window.out_channels,
            "KERNEL_HEIGHT": window.kernel[0],
            "KERNEL_WIDTH": window.kernel[1],
            "STRIDE_Y": window.strides[0],
            "STRIDE_X": window.strides[1],
            "DILATION_Y": window.dilations[0],
            "DILATION_X": window.dilations[1],
            "PAD_TOP": window.pads[0],
            "PAD_LEFT": window.pads[1],
            "BEYOND_ROWS": int(beyond[0]),
            "BEYOND_COLUMNS": int(beyond[1]),
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "PARTS": self.parts,
            "BLOCKS_OF_PARTS": -(-self.parts // self.block[0]),
            "BLOCK_X": self.block[0],
            "BLOCK_Y": self.block[1],
            "BLOCK_Z": self.block[2],
            "SHARING": self.sharing,
        }


def strips_of(
    window: Window,
    rows: int,
    columns: int,
    parts: int,
    part_bytes: int,
    multiprocessors: int,
    sharing: int = 1,
) -> Strips:
    """Choose the block.

    Args:
        window: the geometry.
        rows: of output pixels of a strip.
        columns: of them.
        parts: into how many parts the channels of a pixel are split.
        part_bytes: what of an input pixel a thread reads.
        multiprocessors: of the GPU.
        sharing: threads that share a strip.
    """
    along, below = -(-window.out_width // columns), -(-window.out_height // rows)
    useful = parts * along * below * window.batch * sharing

    def cost(block: tuple[int, int, int]) -> tuple[float, int]:
        strips = Strips(rows, columns, parts, block, sharing)
        x, y, z = strips.grid(window)
        blocks, threads = x * y * z, block[0] * block[1] * block[2]
        warps = -(-threads // _WARP)
        idle = blocks * warps * _WARP / useful
        uneven = -(-blocks // multiprocessors) * multiprocessors / blocks
        height = 1 if sharing > 1 else block[2]
        halo = _reach(window, 0, height * rows) * _reach(window, 1, block[1] * columns)
        run = min(block[0], parts) * part_bytes
        lines = -(-run // _LINE_BYTES) * _LINE_BYTES / run
        return idle * uneven + _HALO_WEIGHT * halo + _LINE_WEIGHT * lines, -threads

    candidates = _blocks(parts, along, below, sharing)
    return Strips(rows, columns, parts, min(candidates, key=cost), sharing)


def _reach(window: Window, axis: int, outputs: int) -> float:
    """Return how many times a block of outputs reads what would do for each once."""
    stride, size = window.strides[axis], (window.out_height, window.out_width)[axis]
    outputs = min(outputs, size)
    read = (outputs - 1) * stride + (window.kernel[axis] - 1) * window.dilations[axis] + 1
    return max(1.0, read / (outputs * stride))


def _blocks(parts: int, along: int, below: int, sharing: int) -> Iterator[tuple[int, int, int]]:
    """Yield shapes of blocks: whole parts, or a number that wastes little, then pixels."""
    widths = {min(parts, 1 << i) for i in range(8)} | {-(-parts // i) for i in range(1, 9)}
    for x, y in itertools.product(sorted(widths), range(1, min(along, 64) + 1)):
        heights = (sharing,) if sharing > 1 else range(1, min(below, 16) + 1)
        for z in heights:
            if x * y * z <= _MOST_THREADS:
                yield x, y, z
