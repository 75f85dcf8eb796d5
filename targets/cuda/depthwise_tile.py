"""How a depthwise convolution is split among the threads of a GPU: what a model finds quickest.

The model counts a thread's instructions and the bytes that it reads from the L1 cache; a
multiprocessor issues 128 lanes of instructions while it reads 128 bytes. A small layer is
done when its slowest thread is, so that it gets small strips; a large one gets those that do least
in total.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from edgepress.targets.cuda.strip_operands import WORD_BYTES, Operands
from edgepress.targets.cuda.window import Window

_ACCESS_BYTES = 16  # the widest load
_LEAST_BYTES = 4  # a load of less takes as long
_MOST_COLUMNS = 8
_MOST_TAPS_AT_ONCE = 7  # columns of a window
_MOST_UNROLLED_TAPS = 49
_MOST_PRODUCTS = 2048  # instructions that multiply, of a thread whose loops are unrolled
RESIDENT_THREADS = 512
"""At least so many are resident: a thread has 128 registers."""
_MOST_REGISTERS = 112
_COMFORTABLE_REGISTERS = 80  # with fewer, 768 threads are resident
_CROWDED = 1.25  # times the time where they are not
_OTHER_REGISTERS = 24
_OVERHEAD = 30  # instructions before the first load and around the last store
_ISSUED = 128  # lanes of instructions that a multiprocessor issues in a cycle
_INPUT_REGISTERS = 64  # that hold inputs before they are used


@dataclass(frozen=True)
class DepthwiseTile:
    """What a thread does.

    Attributes:
        lanes: neighbouring channels.
        rows, columns: output pixels.
        taps: columns of the window that are taken together.
        unrolled: whether all rows of the window are.
        rows_at_once: rows of inputs that are loaded before the first is used.
        weights_held: whether weights are in registers before the kernel before this one is done.
    """

    lanes: int
    rows: int
    columns: int
    taps: int
    unrolled: bool
    rows_at_once: int = 1
    weights_held: bool = False


def choose_tile(window: Window, operands: Operands, multiprocessors: int) -> DepthwiseTile:
    """Return the tile that the model finds quickest."""

    def cost(tile: DepthwiseTile) -> tuple[bool, float]:
        registers = _registers(tile, window, operands)
        time = _time(tile, window, operands, multiprocessors)
        crowded = _CROWDED if registers > _COMFORTABLE_REGISTERS else 1.0
        return registers > _MOST_REGISTERS, time * crowded

    return min(_candidates(window, operands), key=cost)


def input_rows(window: Window, rows: int) -> int:
    """Return how many rows of the input so many output rows see."""
    return (rows - 1) * window.strides[0] + window.kernel[0]


def weight_vectors(tile: DepthwiseTile, window: Window, operands: Operands) -> int:
    """Return how many vectors of weights a thread multiplies: one per tap, or per four of them."""
    if not operands.words:
        return window.kernel[0] * window.kernel[1]
    return -(-input_rows(window, tile.rows) // WORD_BYTES) * tile.rows * window.kernel[1]


def _candidates(window: Window, operands: Operands) -> Iterator[DepthwiseTile]:
    kernel_height, kernel_width = window.kernel
    taps = -(-kernel_width // -(-kernel_width // _MOST_TAPS_AT_ONCE))
    short = taps == kernel_width and kernel_height * kernel_width <= _MOST_UNROLLED_TAPS
    shared = window.dilations[0] == 1 and window.strides[0] < kernel_height
    most = _ACCESS_BYTES // operands.x_bytes
    for lanes, columns, rows in itertools.product(
        [n for n in (16, 8, 4, 2, 1) if n <= most and window.channels % n == 0],
        range(1, min(_MOST_COLUMNS, window.out_width) + 1),
        (1, 2) if shared and short and window.out_height > 1 else (1,),
    ):
        if operands.words and lanes % WORD_BYTES:
            continue
        if lanes * operands.x_bytes < WORD_BYTES and window.channels % (2 * lanes) == 0:
            continue
        products = kernel_height * taps * rows * columns * lanes // (4 if operands.words else 1)
        unrolled = short and products <= _MOST_PRODUCTS
        if rows > 1 and not unrolled:
            continue
        at_once = 1
        if unrolled and not operands.words:
            line = _columns_read(window, columns, taps) * _words(lanes, operands.x_bytes)
            at_once = min(max(_INPUT_REGISTERS // line, 1), input_rows(window, rows))
        tile = DepthwiseTile(lanes, rows, columns, taps, unrolled, at_once)
        held = replace(tile, weights_held=True)
        fits = _registers(held, window, operands) <= _COMFORTABLE_REGISTERS
        yield held if unrolled and fits else tile


def _columns_read(window: Window, columns: int, taps: int) -> int:
    """Return how many columns of the input a strip reads of each row."""
    return len(
        {
            pixel * window.strides[1] + tap * window.dilations[1]
            for pixel in range(columns)
            for tap in range(taps)
        }
    )


def _words(lanes: int, element_bytes: int) -> int:
    """Return the registers that hold so many neighbouring elements."""
    return -(-lanes * element_bytes // 4)


def _registers(tile: DepthwiseTile, window: Window, operands: Operands) -> int:
    """Estimate the registers of a thread."""
    sums = tile.rows * tile.columns * tile.lanes
    line = _columns_read(window, tile.columns, tile.taps) * _words(tile.lanes, operands.x_bytes)
    each = _words(tile.lanes, WORD_BYTES if operands.words else operands.weight_bytes)
    if tile.weights_held:
        weights = each * weight_vectors(tile, window, operands)
    elif operands.words:
        weights = each * tile.taps
    else:
        weights = (tile.lanes if operands.quantized else each) * tile.taps * tile.rows
    if operands.words:
        held = line * min(4, window.kernel[0])
    else:
        held = line * tile.rows_at_once
        if operands.x != "float32":  # part of it is converted before its turn
            held += tile.lanes * _columns_read(window, tile.columns, tile.taps) // 2
    return sums + held + weights + _OTHER_REGISTERS


def _time(tile: DepthwiseTile, window: Window, operands: Operands, multiprocessors: int) -> float:
    """Estimate the time of a layer, in instructions that a multiprocessor issues after another."""
    strips = -(-window.out_height // tile.rows) * -(-window.out_width // tile.columns)
    threads = window.batch * strips * (window.channels // tile.lanes)
    share = threads / (multiprocessors * _ISSUED)
    # A thread alone takes its time even where nothing else is to be done.
    return (share + 1) * max(_instructions(tile, window, operands), _bytes(tile, window, operands))


def _input_loads(tile: DepthwiseTile, window: Window) -> int:
    """Return how often a thread loads inputs."""
    columns = _columns_read(window, tile.columns, tile.taps)
    return math.ceil(input_rows(window, tile.rows) * columns * window.kernel[1] / tile.taps)


def _bytes(tile: DepthwiseTile, window: Window, operands: Operands) -> float:
    """Return what a thread reads from the L1 cache."""
    inputs, weights = _input_loads(tile, window), weight_vectors(tile, window, operands)
    each = WORD_BYTES if operands.words else operands.weight_bytes
    x_bytes = max(tile.lanes * operands.x_bytes, _LEAST_BYTES)
    return float(inputs * x_bytes + weights * max(tile.lanes * each, _LEAST_BYTES))


def _instructions(tile: DepthwiseTile, window: Window, operands: Operands) -> float:
    """Count the instructions of a thread; those of half rate twice."""
    inputs, weights = _input_loads(tile, window), weight_vectors(tile, window, operands)
    outputs = tile.rows * tile.columns * tile.lanes
    taps = window.kernel[0] * window.kernel[1]
    narrow = (operands.x != "float32") + (operands.y != "float32")
    total = _OVERHEAD + 3.0 * inputs + outputs * (8 if operands.quantized else narrow + 1)
    if operands.words:
        permutations = inputs * tile.lanes
        return total + permutations + 2.0 * weights / tile.rows * outputs
    total += weights * max(1, tile.lanes * operands.weight_bytes / _ACCESS_BYTES)
    converted = inputs * tile.lanes * (operands.x != "float32")
    converted += weights * tile.lanes * (operands.weights != "float32")
    return total + converted + taps * outputs * (2 if operands.quantized else 1)
