"""Copies the input of a convolution or pool into a padded buffer.

NHWC. Border pixels and channels beyond the real ones take the fill value (a zero point, or minus
infinity for a max pool); the values are widened where the instruction set multiplies wider ones.
Rows and columns that no window reads are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from edgepress.targets.isa.base import Isa
from edgepress.targets.schedules.emit import Buffer, Expr, Kernel, cast, chunks, load, splat

_PARALLEL_BYTES = 64 * 1024  # below this, handing over a part costs more than it saves


@dataclass(frozen=True)
class StageShape:
    """Geometry of the copy.

    Attributes:
        batch, height, width: of the input.
        channels: input channels of one group.
        groups: groups of channels, each padded on its own.
        top, left: border before the first row and column.
        out_height, out_width, out_channels: of the padded buffer; `out_channels` per group.
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
    groups: int = 1


def stage(name: str, shape: StageShape, isa: Isa, dtypes: tuple[str, str], fill: float) -> Any:
    """Generate the kernel: arguments x and y; `dtypes` are those of x and y."""
    kernel = Kernel(name)
    size_in = shape.batch * shape.height * shape.width * shape.channels * shape.groups
    pitch = shape.out_channels * shape.groups
    line = shape.out_width * pitch
    lines = shape.batch * shape.out_height
    x = kernel.argument("x", dtypes[0], size_in)
    y = kernel.argument("y", dtypes[1], lines * line)
    lanes = isa.vector_bytes // (4 if dtypes[1] == "float32" else 1)
    left = min(shape.left, shape.out_width)
    copied = min(shape.width, shape.out_width - left)
    last_row = min(shape.top + shape.height, shape.out_height)

    def copy_run(target: Expr, source: Expr, size: int) -> None:
        _copy(kernel, y, x, target, source, size, lanes, dtypes)

    with kernel.loop("line", lines, parallel=lines * line >= _PARALLEL_BYTES) as at:
        image, row = at // shape.out_height, at % shape.out_height
        start = kernel.let("start", at * line)
        inside = tirx.all(row >= shape.top, row < last_row)
        with kernel.block(inside):
            source = image * shape.height + row - shape.top
            base = kernel.let("base", source * (shape.width * shape.channels * shape.groups))
            fill_run(kernel, y, start, left * pitch, fill, lanes)
            body = start + left * pitch
            if shape.out_channels == shape.channels:
                copy_run(body, base, copied * pitch)
            else:
                with kernel.loop("pixel", copied * shape.groups) as pixel:
                    to = kernel.let("to", body + pixel * shape.out_channels)
                    copy_run(to, base + pixel * shape.channels, shape.channels)
                    beyond = shape.out_channels - shape.channels
                    fill_run(kernel, y, to + shape.channels, beyond, fill, lanes)
            right = left + copied
            rest = (shape.out_width - right) * pitch
            fill_run(kernel, y, start + right * pitch, rest, fill, lanes)
        with kernel.block(tirx.Not(inside)):
            fill_run(kernel, y, start, line, fill, lanes)
    return kernel.finish()


def fill_run(kernel: Kernel, y: Buffer, index: Expr, size: int, fill: float, lanes: int) -> None:
    """Store one value `size` times, up to `lanes` at once."""
    for first, width, count in chunks(size, lanes):
        with kernel.loop("i", count) as i:
            kernel.store(y, index + first + i * width, splat(fill, y.dtype, width), width)


def _copy(
    kernel: Kernel,
    y: Buffer,
    x: Buffer,
    target: Expr,
    source: Expr,
    size: int,
    lanes: int,
    dtypes: tuple[str, str],
) -> None:
    for first, width, count in chunks(size, lanes):
        with kernel.loop("i", count) as i:
            value = load(x, source + first + i * width, width)
            if dtypes[0] != dtypes[1]:
                value = cast(value, dtypes[1], width)
            kernel.store(y, target + first + i * width, value, width)
