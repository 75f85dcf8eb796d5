"""Brings an image to where a convolution reads it: planes become padded pixels in one pass.

NCHW to NHWC for two to four channels. Floats may be quantized on the way; 8-bit pixels always take
four bytes, of which the last hold the fill value where there are fewer channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from edgepress.targets.isa.base import Isa
from edgepress.targets.schedules.emit import Expr, Kernel, cast, chunks, load, splat
from edgepress.targets.schedules.epilogue import Requantise, requantised
from edgepress.targets.schedules.stage import StageShape, fill_run

PIXEL_BYTES = 4  # of 8-bit values
_PARALLEL_SIZE = 32 * 1024  # below this, handing over a part costs more than it saves


def intake(
    name: str,
    shape: StageShape,
    isa: Isa,
    dtypes: tuple[str, str],
    fill: float,
    scale: float | None = None,
    epilogue: Requantise | None = None,
) -> Any:
    """Generate the kernel: arguments x `[batch, channels, height, width]` and y, padded NHWC.

    Args:
        name: of the kernel.
        shape: of the image and of the padded one.
        isa: the instruction set.
        dtypes: of x and y.
        fill: the value of the border.
        scale: where floats are quantized, what they are divided by.
        epilogue: and how the quotients become integers.
    """
    kernel = Kernel(name)
    plane, pitch = shape.height * shape.width, shape.out_channels
    line, lines = shape.out_width * pitch, shape.batch * shape.out_height
    x = kernel.argument("x", dtypes[0], shape.batch * shape.channels * plane)
    y = kernel.argument("y", dtypes[1], lines * line)
    left = min(shape.left, shape.out_width)
    copied = min(shape.width, shape.out_width - left)
    fill_lanes = isa.vector_bytes // (4 if dtypes[1] == "float32" else 1)

    def channel(index: Expr, lanes: int) -> Expr:
        """Read neighbours in one plane, as y has them: float32, or int32 of 8-bit values."""
        value = load(x, index, lanes)
        if epilogue is not None:
            value = requantised(value / splat(scale or 1.0, "float32", lanes), epilogue, lanes)
        return value if dtypes[1] == "float32" else cast(value, "int32", lanes)

    def pixels(target: Expr, source: Expr, lanes: int) -> None:
        planes = [
            kernel.let("channel", channel(source + c * plane, lanes)) for c in range(shape.channels)
        ]
        if dtypes[1] == "float32":
            _interleave(planes, lanes, lambda at, value: kernel.store(y, target + at, value, lanes))
            return
        joined = kernel.let("pixels", _packed(planes, int(fill), lanes))
        size = PIXEL_BYTES * lanes
        kernel.store(y, target, tirx.reinterpret(f"{dtypes[1]}x{size}", joined), size)

    with kernel.loop("line", lines, parallel=lines * line >= _PARALLEL_SIZE) as at:
        image, row = at // shape.out_height, at % shape.out_height
        start = kernel.let("start", at * line)
        inside = tirx.all(row >= shape.top, row < min(shape.top + shape.height, shape.out_height))
        with kernel.block(inside):
            rows = image * (shape.channels * shape.height) + row - shape.top
            base = kernel.let("base", rows * shape.width)
            fill_run(kernel, y, start, left * pitch, fill, fill_lanes)
            for first, lanes, count in overlapping(copied, isa.lanes):
                with kernel.loop("i", count) as i:
                    pixel = kernel.let("pixel", first + i * lanes)
                    pixels(start + (left + pixel) * pitch, base + pixel, lanes)
            right = left + copied
            rest = (shape.out_width - right) * pitch
            fill_run(kernel, y, start + right * pitch, rest, fill, fill_lanes)
        with kernel.block(tirx.Not(inside)):
            fill_run(kernel, y, start, line, fill, fill_lanes)
    return kernel.finish()


def overlapping(size: int, lanes: int) -> list[tuple[int, int, int]]:
    """Cover `size` elements as `emit.chunks` does, but what is left over by one more whole vector.

    >>> overlapping(39, 16), overlapping(3, 16)
    ([(0, 16, 2), (23, 16, 1)], [(0, 2, 1), (2, 1, 1)])
    """
    count, rest = divmod(size, lanes)
    if not count:
        return chunks(size, lanes)
    return [(0, lanes, count), *([(size - lanes, lanes, 1)] if rest else [])]


def _packed(planes: list[Expr], fill: int, lanes: int) -> Expr:
    """Put one byte of every plane into each 32-bit lane, the first one lowest; then the fill."""
    beyond = [fill & 0xFF] * (PIXEL_BYTES - len(planes))
    constant = int.from_bytes([*[0] * len(planes), *beyond], "little", signed=False)
    total = splat(constant - 2**32 if constant >= 2**31 else constant, "int32", lanes)
    for place, plane in enumerate(planes):
        part = plane & splat(0xFF, "int32", lanes)
        total = total | (part << splat(8 * place, "int32", lanes))
    return total


def _interleave(planes: list[Expr], lanes: int, store: Callable[[int, Expr], None]) -> None:
    """Store `lanes` pixels of neighbouring channels, one vector at a time."""
    channels = len(planes)
    for first in range(0, channels * lanes, lanes):
        places = [divmod(first + i, channels) for i in range(lanes)]  # (pixel, channel)
        if lanes == 1:
            store(first, planes[places[0][1]])
            continue
        indices = [tirx.const(channel * lanes + pixel, "int32") for pixel, channel in places]
        store(first, tirx.Shuffle(planes, indices))
