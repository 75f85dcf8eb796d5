"""How a convolution without tensor cores is split among threads: what a model finds quickest.

As `depthwise_tile`, but many threads read the same inputs and weights, so that it counts how many
loads a multiprocessor has to serve rather than their bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from edgepress.targets.cuda.strip_operands import Operands
from edgepress.targets.cuda.window import Window

_ACCESS_BYTES = 16  # the widest load
_MOST_COLUMNS = 8
_MOST_OUTPUTS = 8
_MOST_TAPS_AT_ONCE = 7  # columns of a window
_MOST_UNROLLED = 4  # steps
_MOST_PRODUCTS = 1024  # instructions that multiply, of unrolled steps
RESIDENT_THREADS = 512
"""At least so many are resident: a thread has 128 registers."""
_MOST_REGISTERS = 104
_OTHER_REGISTERS = 28
_LOAD = 10.0  # instructions that a multiprocessor issues while it serves a load of 16 bytes
_STEP = 6.0  # instructions of a loop
_OVERHEAD = 80
_SHARE = 60  # of a barrier
_ISSUED = 128  # lanes of instructions that a multiprocessor issues in a cycle


@dataclass(frozen=True)
class GroupedTile:
    """What a thread does.

    Attributes:
        outputs: neighbouring output channels.
        inputs: input channels that are read at once; words of four of them where `Operands.words`.
        columns: output pixels.
        taps: columns of the window that are taken together.
        sharing: threads that share the input channels.
        unroll: steps along input channels that are taken together.
    """

    outputs: int
    inputs: int
    columns: int
    taps: int
    sharing: int = 1
    unroll: int = 1


def choose_tile(
    window: Window, groups: int, operands: Operands, multiprocessors: int
) -> GroupedTile:
    """Return the tile that the model finds quickest."""

    def cost(tile: GroupedTile) -> tuple[bool, float, int]:
        registers = _registers(tile, window, operands)
        time = _time(tile, window, groups, operands, multiprocessors)
        return registers > _MOST_REGISTERS, time, -tile.unroll

    return min(_candidates(window, groups, operands), key=cost)


def _candidates(window: Window, groups: int, operands: Operands) -> Iterator[GroupedTile]:
    kernel_width = window.kernel[1]
    taps = -(-kernel_width // -(-kernel_width // _MOST_TAPS_AT_ONCE))
    given = window.channels // groups // operands.per_x
    most = _ACCESS_BYTES // (operands.x_bytes * operands.per_x)
    for outputs, inputs, columns in itertools.product(
        [n for n in (8, 4, 2, 1) if window.out_channels // groups % n == 0],
        [n for n in (8, 4, 2, 1) if n <= most and given % n == 0],
        range(1, min(_MOST_COLUMNS, window.out_width) + 1),
    ):
        products = taps * inputs * outputs * columns
        for sharing in (1, 2, 4, 8, 16):
            steps = -(-given // inputs // sharing)
            if sharing > 1 and (steps < 2 or outputs * columns > _MOST_OUTPUTS * 4):
                continue
            unroll = max(1, min(_MOST_UNROLLED, steps, _MOST_PRODUCTS // products))
            tile = GroupedTile(outputs, inputs, columns, taps, sharing, unroll)
            while tile.unroll > 1 and _registers(tile, window, operands) > _MOST_REGISTERS:
                unroll //= 2
                tile = GroupedTile(outputs, inputs, columns, taps, sharing, unroll)
            yield tile


def _columns_read(window: Window, tile: GroupedTile) -> int:
    """Return how many columns of the input a strip reads of each row."""
    return len(
        {
            pixel * window.strides[1] + tap * window.dilations[1]
            for pixel in range(tile.columns)
            for tap in range(tile.taps)
        }
    )


def _registers(tile: GroupedTile, window: Window, operands: Operands) -> int:
    """Estimate the registers of a thread."""
    x_bytes = operands.x_bytes * operands.per_x
    inputs = _columns_read(window, tile) * -(-tile.inputs * x_bytes // 4)
    weights = -(-tile.outputs * operands.weight_bytes * operands.per_x // 4)
    held = tile.unroll * (inputs + tile.inputs * weights)
    if not operands.words and operands.x != "float32":  # part of it is converted before its turn
        held += tile.outputs + _columns_read(window, tile)
    return tile.outputs * tile.columns + held + _OTHER_REGISTERS


def _time(
    tile: GroupedTile, window: Window, groups: int, operands: Operands, multiprocessors: int
) -> float:
    """Estimate the time of a layer, in instructions that a multiprocessor issues after another."""
    strips = window.batch * window.out_height * -(-window.out_width // tile.columns)
    threads = strips * (window.out_channels // tile.outputs) * tile.sharing
    share = threads / (multiprocessors * _ISSUED)
    given = window.channels // groups // operands.per_x
    steps = -(-given // tile.inputs // tile.sharing)
    lines = window.kernel[0] * -(-window.kernel[1] // tile.taps)
    columns = _columns_read(window, tile)
    products = tile.taps * tile.inputs * tile.columns * tile.outputs
    loads = columns * _wide(tile.inputs * operands.x_bytes * operands.per_x)
    weights = tile.taps * tile.inputs
    loads += weights * _wide(tile.outputs * operands.weight_bytes * operands.per_x)
    converted = 0
    if not operands.words:
        converted += columns * tile.inputs * (operands.x != "float32")
        converted += weights * tile.outputs * (operands.weights != "float32")
    step = products * (2 if operands.quantized else 1) + converted + 2 * loads
    step = max(step, _LOAD * loads) + _STEP / tile.unroll
    once = _OVERHEAD + 8 * tile.columns * tile.outputs
    if tile.sharing > 1:
        once += _SHARE + 2 * tile.sharing * tile.columns * tile.outputs
    # A thread alone takes its time even where nothing else is to be done, and waits for each step.
    alone = once + lines * steps * (step + 400 / tile.unroll)
    return share * (lines * steps * step + once) + alone


def _wide(size_bytes: int) -> float:
    """Return how many loads of 16 bytes take as long as one of so many."""
    return max(0.5, size_bytes / _ACCESS_BYTES)
