"""Max and average pooling over the channels of NHWC tensors.

The input is padded already: with the lowest value for a max pool, with the zero point (or 0.0) for
an average, so that no window asks where it is. An average multiplies by one factor per output
pixel, which carries the count of real pixels under that window and, for integers, the scales: a
float32, or an int32 and one shift for all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx

from edgepress.targets.isa.base import Isa
from edgepress.targets.schedules.emit import Kernel, cast, chunks, load, repeat, splat
from edgepress.targets.schedules.epilogue import (
    Epilogue,
    Requantise,
    Shift,
    clamped_output,
    divided,
    factor_dtype,
    finish,
)
from edgepress.targets.schedules.window import WindowShape

PARALLEL_READS = 200_000  # below this, handing over a part costs more than it saves


def max_pool(name: str, shape: WindowShape, isa: Isa, dtype: str) -> Any:
    """Generate the kernel: arguments x (padded) and y, both of `dtype`."""
    kernel = Kernel(name)
    x = kernel.argument("x", dtype, shape.batch * shape.height * shape.width * shape.channels)
    y = kernel.argument("y", dtype, shape.lines * shape.out_width * shape.channels)
    widest = isa.vector_bytes // np.dtype(dtype).itemsize
    with (
        kernel.loop("line", shape.lines, shape.reads >= PARALLEL_READS) as line,
        kernel.loop("column", shape.out_width) as column,
    ):
        corner = kernel.let("corner", shape.corner(line, column))
        pixel = kernel.let("pixel", (line * shape.out_width + column) * shape.channels)
        for first, lanes, blocks in chunks(shape.channels, widest):
            with kernel.loop("block", blocks) as block:
                channel = kernel.let("channel", block * lanes + first)
                highest = kernel.registers("highest", dtype, lanes)
                kernel.store(highest, 0, load(x, corner + channel, lanes), lanes)
                with (
                    kernel.loop("row", shape.kernel[0]) as row,
                    kernel.loop("tap", shape.kernel[1]) as tap,
                ):
                    value = load(x, corner + channel + shape.tap(row, tap), lanes)
                    kernel.store(highest, 0, tirx.Max(load(highest, 0, lanes), value), lanes)
                kernel.store(y, pixel + channel, load(highest, 0, lanes), lanes)
    return kernel.finish()


def average_pool(
    name: str,
    shape: WindowShape,
    isa: Isa,
    dtype: str,
    zero_point: int,
    epilogue: Epilogue,
    places: int = 0,
) -> Any:
    """Generate the kernel.

    Arguments of the kernel: x (padded), factors `[out_height * out_width]`, y. The factors are
    int32 for a `Shift`, and then products are divided by `2**places`; float32 otherwise. `dtype`
    and `zero_point` are those of x; a float32 x has zero point 0.
    """
    kernel = Kernel(name)
    quantized = isinstance(epilogue, Requantise)
    held_type = "int32" if quantized else "float32"
    x = kernel.argument("x", dtype, shape.batch * shape.height * shape.width * shape.channels)
    factor_type = factor_dtype(epilogue) if isinstance(epilogue, Requantise) else "float32"
    factors = kernel.argument("factors", factor_type, shape.out_height * shape.out_width)
    y = kernel.argument("y", epilogue.dtype, shape.lines * shape.out_width * shape.channels)
    start = -zero_point * shape.taps
    with (
        kernel.loop("line", shape.lines, shape.reads >= PARALLEL_READS) as line,
        kernel.loop("column", shape.out_width) as column,
    ):
        corner = kernel.let("corner", shape.corner(line, column))
        pixel = kernel.let("pixel", (line * shape.out_width + column) * shape.channels)
        index = (line % shape.out_height) * shape.out_width + column
        factor = kernel.let("factor", load(factors, index))
        for first, lanes, blocks in chunks(shape.channels, isa.lanes):
            with kernel.loop("block", blocks) as block:
                channel = kernel.let("channel", block * lanes + first)
                total = kernel.registers("total", held_type, lanes)
                kernel.store(total, 0, splat(start, held_type, lanes), lanes)
                with (
                    kernel.loop("row", shape.kernel[0]) as row,
                    kernel.loop("tap", shape.kernel[1]) as tap,
                ):
                    value = load(x, corner + channel + shape.tap(row, tap), lanes)
                    value = cast(value, held_type, lanes) if quantized else value
                    kernel.store(total, 0, load(total, 0, lanes) + value, lanes)
                scale = repeat(factor, lanes)
                held = load(total, 0, lanes)
                if isinstance(epilogue, Shift):
                    product = cast(held, "int64", lanes) * cast(scale, "int64", lanes)
                    product = kernel.let("product", product)
                    rounded = divided(product, places, lanes, "int64")
                    result = clamped_output(rounded, epilogue, lanes, "int64")
                else:
                    result = finish(held if quantized else held * scale, scale, epilogue, lanes)
                kernel.store(y, pixel + channel, result, lanes)
    return kernel.finish()
