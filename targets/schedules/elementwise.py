"""Integer element-wise kernels: quantise, dequantise, rescale, add, multiply, look up.

All run over flat tensors. A second operand may repeat with a period (a value per channel in NHWC)
or be a single value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from edgepress.targets.isa.base import Isa
from edgepress.targets.schedules.emit import Expr, Kernel, cast, chunks, load, repeat, splat
from edgepress.targets.schedules.epilogue import (
    Requantise,
    finish_sum,
    requantise,
    weighted_sum,
)

_PARALLEL_SIZE = 64 * 1024  # below this, handing over a part costs more than it saves
_LINE = 4096


@dataclass(frozen=True)
class Operand:
    """An integer operand: dtype, zero point and how many elements before it repeats."""

    dtype: str
    zero_point: int
    period: int


def for_each(
    kernel: Kernel, size: int, period: int, lanes: int, body: Callable[[Expr, Expr, int], None]
) -> None:
    """Call `body(index, index within the period, lanes)` for runs that cover `size` elements."""
    line = period if 1 < period < size else min(size, _LINE)
    full, rest = divmod(size, line)

    def run(start: Expr, length: int) -> None:
        for first, width, count in chunks(length, lanes):
            with kernel.loop("i", count) as i:
                at = kernel.let("at", i * width + first)
                within = at if 1 < period < size else start + at
                body(start + at, 0 if period == 1 else within, width)

    with kernel.loop("line", full, parallel=size >= _PARALLEL_SIZE) as index:
        run(index * line, line)
    if rest:
        run(full * line, rest)


def quantise(name: str, size: int, isa: Isa, scale: float, epilogue: Requantise) -> Any:
    """Generate `y = zero_point + round(x / scale)`, saturating: arguments x float32 and y.

    It divides, as ONNX's QuantizeLinear does; a product with 1 / scale would round differently.
    """
    kernel = Kernel(name)
    x = kernel.argument("x", "float32", size)
    y = kernel.argument("y", epilogue.dtype, size)

    def body(index: Expr, _within: Expr, lanes: int) -> None:
        scaled = load(x, index, lanes) / splat(scale, "float32", lanes)
        kernel.store(y, index, requantise(scaled, epilogue, lanes), lanes)

    for_each(kernel, size, size, isa.lanes, body)
    return kernel.finish()


def dequantise(name: str, size: int, isa: Isa, scale: float, dtype: str, zero_point: int) -> Any:
    """Generate `y = (x - zero_point) * scale`: arguments x and y float32."""
    kernel = Kernel(name)
    x = kernel.argument("x", dtype, size)
    y = kernel.argument("y", "float32", size)

    def body(index: Expr, _within: Expr, lanes: int) -> None:
        centred = cast(load(x, index, lanes), "int32", lanes) - splat(zero_point, "int32", lanes)
        value = cast(centred, "float32", lanes) * splat(scale, "float32", lanes)
        kernel.store(y, index, value, lanes)

    for_each(kernel, size, size, isa.lanes, body)
    return kernel.finish()


def rescale(
    name: str, size: int, isa: Isa, operand: Operand, factor: float, epilogue: Requantise
) -> Any:
    """Generate a change of scale and zero point, with the clamp of a ReLU or Clip: x and y.

    The factor here and below is a multiplier, or for `Shift` the places to shift by.
    """

    def combine(values: list[Expr], _lanes: int) -> Expr:
        return values[0]

    return _combine(name, size, isa, [operand], combine, factor, epilogue)


def add(
    name: str,
    size: int,
    isa: Isa,
    operands: tuple[Operand, Operand],
    factors: tuple[int, int],
    factor: float,
    epilogue: Requantise,
) -> Any:
    """Generate `requantise(a * factors[0] + b * factors[1])` on centred values: a, b, y."""

    def combine(values: list[Expr], lanes: int) -> Expr:
        return weighted_sum(values, factors, lanes)

    return _combine(name, size, isa, list(operands), combine, factor, epilogue)


def multiply(
    name: str,
    size: int,
    isa: Isa,
    operands: tuple[Operand, Operand],
    factor: float,
    epilogue: Requantise,
) -> Any:
    """Generate `requantise(a * b)` on centred values: a, b, y."""

    def combine(values: list[Expr], _lanes: int) -> Expr:
        return values[0] * values[1]

    return _combine(name, size, isa, list(operands), combine, factor, epilogue)


def _combine(
    name: str,
    size: int,
    isa: Isa,
    operands: list[Operand],
    combine: Callable[[list[Expr], int], Expr],
    factor: float,
    epilogue: Requantise,
) -> Any:
    kernel = Kernel(name)
    buffers = [
        kernel.argument(f"x{i}", operand.dtype, operand.period)
        for i, operand in enumerate(operands)
    ]
    y = kernel.argument("y", epilogue.dtype, size)

    def body(index: Expr, within: Expr, lanes: int) -> None:
        values = []
        for buffer, operand in zip(buffers, operands, strict=True):
            if operand.period == 1 and size > 1:
                value = repeat(load(buffer, 0), lanes)
            else:
                value = load(buffer, index if operand.period == size else within, lanes)
            centred = cast(value, "int32", lanes) - splat(operand.zero_point, "int32", lanes)
            values.append(kernel.let("centred", centred))
        total = kernel.let("total", combine(values, lanes))
        kernel.store(y, index, finish_sum(total, factor, epilogue, lanes), lanes)

    for_each(kernel, size, min(operand.period for operand in operands), isa.lanes, body)
    return kernel.finish()


def look_up(name: str, size: int, dtypes: tuple[str, str]) -> Any:
    """Generate `y = table[x - lowest x]` for any function of one 8-bit value: x, table, y.

    The table has 256 entries in ascending order of x.
    """
    kernel = Kernel(name)
    x = kernel.argument("x", dtypes[0], size)
    table = kernel.argument("table", dtypes[1], 256)
    y = kernel.argument("y", dtypes[1], size)
    offset = 128 if dtypes[0] == "int8" else 0
    lines, rest = divmod(size, _LINE)

    def run(start: Expr, length: int) -> None:
        with kernel.loop("i", length) as i:
            position = tirx.Cast("int32", load(x, start + i)) + offset
            kernel.store(y, start + i, load(table, position))

    if lines:
        with kernel.loop("line", lines, parallel=size >= _PARALLEL_SIZE) as line:
            run(line * _LINE, _LINE)
    if rest:
        run(lines * _LINE, rest)
    return kernel.finish()


def expand(name: str, given: tuple[int, ...], shape: tuple[int, ...], dtype: str) -> Any:
    """Generate a broadcast of x `given` to y `shape` as NumPy defines it: x and y."""
    kernel = Kernel(name)
    given = (1,) * (len(shape) - len(given)) + given
    x = kernel.argument("x", dtype, math.prod(given))
    y = kernel.argument("y", dtype, math.prod(shape))

    def axis(depth: int, source: Expr, target: Expr) -> None:
        if depth == len(shape):
            kernel.store(y, target, load(x, source))
            return
        with kernel.loop(f"i{depth}", shape[depth]) as i:
            step = i * math.prod(given[depth + 1 :]) if given[depth] > 1 else 0
            axis(depth + 1, source + step, target + i * math.prod(shape[depth + 1 :]))

    axis(0, 0, 0)
    return kernel.finish()
