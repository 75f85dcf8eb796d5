"""Kernels and what NumPy says they must answer, many of them in one Program."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgepress.targets.base import Target
from edgepress.targets.devices.base import host_architecture
from edgepress.targets.isa.base import Isa
from edgepress.targets.load import host_flags, load_target
from edgepress.targets.lowering.operands import centred_bias
from edgepress.targets.program import Array, Call, Program, Tensor
from edgepress.targets.schedules import conv
from edgepress.targets.schedules.depthwise import depthwise
from edgepress.targets.schedules.depthwise_layout import (
    DepthwiseShape,
    border_size,
    pack_channels,
    pack_weights,
)
from edgepress.targets.schedules.epilogue import (
    Added,
    Clip,
    Epilogue,
    Requantise,
    Shift,
    factor_dtype,
    first_step,
)
from edgepress.targets.schedules.stage import StageShape, stage
from tests.targets.interpret import run_program

FLOAT_TOLERANCE = 1e-5  # of the largest value of an output
LOWEST = {"uint8": 0, "int8": -128, "int16": -(2**15)}
HIGHEST = {"uint8": 255, "int8": 127, "int16": 2**15 - 1}
ISAS = ("avx2", "avx512", "avx512_vnni", "neon", "neon_dotprod", "neon_i8mm", "neon_armv7")
_BOARDS = {
    "avx2": "x86-64-v3",
    "avx512": "x86-64-v4",
    "neon": "raspberry-pi-4",
    "neon_dotprod": "raspberry-pi-5",
    "neon_i8mm": "armv8-i8mm",
    "neon_armv7": "armv7-neon",
    "scalar": "armv7-soft-float",
}


@functools.cache
def target_of(isa: str) -> Target:
    """A target that uses an instruction set."""
    if isa != "avx512_vnni":
        return load_target(_BOARDS[isa])
    plain = load_target("x86-64-v4")
    flags = (*plain.cpu_flags, "avx512_vnni")
    features = ("+avx512vnni", *plain.features)
    return dataclasses.replace(plain, isa=isa, features=features, cpu_flags=flags)


def native_isas() -> list[str]:
    """The instruction sets that this machine can run."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = host_flags(cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else "")
    return [
        isa
        for isa in ISAS
        if target_of(isa).architecture == host_architecture()
        and flags.issuperset(target_of(isa).cpu_flags)
    ]


@dataclass(frozen=True)
class Case:
    """A kernel, by the name that it will get, its arguments and what it must write after them."""

    kernel: Callable[[str], Any]
    arguments: tuple[Array, ...]
    wanted: Array
    what: str


def program_of(cases: Sequence[Case]) -> tuple[Program, dict[str, Array]]:
    """One program that calls every kernel once, and its feeds: the first argument of each."""
    program, feeds = Program(), dict[str, Array]()
    for index, case in enumerate(cases):
        names = [f"k{index}_a{i}" for i in range(len(case.arguments))]
        output = f"k{index}_out"
        first = case.arguments[0]
        program.tensors[names[0]] = Tensor(names[0], str(first.dtype), first.shape)
        program.tensors[output] = Tensor(output, str(case.wanted.dtype), case.wanted.shape)
        program.constants.update(zip(names[1:], case.arguments[1:], strict=True))
        program.kernels[f"k{index}"] = case.kernel(f"k{index}")
        program.calls.append(Call(f"k{index}", (*names, output), (output,), case.what))
        feeds[names[0]] = first
    program.inputs = tuple(feeds)
    program.outputs = tuple(f"k{index}_out" for index in range(len(cases)))
    return program, feeds


def compare(cases: Sequence[Case], answers: Mapping[str, Array]) -> None:
    """Check answers of `program_of`: bit for bit, floats to `FLOAT_TOLERANCE`."""
    for index, case in enumerate(cases):
        answer = answers[f"k{index}_out"]
        if case.wanted.dtype == np.float32:
            size = np.abs(case.wanted, where=np.isfinite(case.wanted), out=np.zeros_like(answer))
            limit = FLOAT_TOLERANCE * max(float(size.max(initial=0)), 1e-30)
            np.testing.assert_allclose(answer, case.wanted, 0, limit, err_msg=case.what)
        else:
            np.testing.assert_array_equal(answer, case.wanted, case.what)


def check(cases: Sequence[Case], isa: str) -> None:
    """Compile, run on this machine, and compare."""
    program, feeds = program_of(cases)
    compare(cases, run_program(program, target_of(isa), feeds))


# Oracles ------------------------------------------------------------------------------------


def requantised(total: Array, multiplier: Any, epilogue: Requantise) -> Array:
    """The rules of docs/integer.md on exact sums: float32 multipliers, or shifts."""
    assert np.abs(total, dtype=np.float64).max(initial=0) < 2**31
    low, high = epilogue.low - epilogue.zero_point, epilogue.high - epilogue.zero_point
    if isinstance(epilogue, Shift):  # float64 holds int32 and their halves exactly
        steps = np.rint(total.astype(np.float64) * 2.0 ** -np.asarray(multiplier, np.float64))
        return np.asarray((np.clip(steps, low, high) + epilogue.zero_point).astype(epilogue.dtype))
    with np.errstate(over="ignore"):
        scaled = total.astype(np.int32).astype(np.float32) * np.asarray(multiplier, np.float32)
    rounded = np.rint(np.clip(scaled, np.float32(low), np.float32(high)))
    return np.asarray((rounded.astype(np.int64) + epilogue.zero_point).astype(epilogue.dtype))


def finished(
    total: Array, multiplier: Any, epilogue: Epilogue, residual: Array | None = None
) -> Array:
    """Sums to outputs, integer or float."""
    if isinstance(epilogue, Added):
        assert residual is not None
        inner = finished(total, multiplier, epilogue.inner)
        if not isinstance(epilogue.inner, Requantise):
            return finished(inner.astype(np.float64) + residual, None, epilogue.final)
        own = (inner.astype(np.int64) - epilogue.inner.zero_point) * epilogue.factors[0]
        other = residual.astype(np.int64) - epilogue.residual_zero_point
        return finished(own + other * epilogue.factors[1], epilogue.factor, epilogue.final)
    if isinstance(epilogue, Requantise):
        return requantised(total, multiplier, epilogue)
    return np.clip(total, epilogue.low, epilogue.high).astype(np.float32)


def windows(
    x: Array,
    out: tuple[int, int],
    kernel: tuple[int, int],
    strides: tuple[int, int],
    dilations: tuple[int, int],
) -> list[tuple[int, int, Array]]:
    """Every tap `(row, column, the NHWC values that output pixels see there)`."""
    taps = []
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            rows = i * dilations[0] + np.arange(out[0]) * strides[0]
            columns = j * dilations[1] + np.arange(out[1]) * strides[1]
            taps.append((i, j, x[:, rows][:, :, columns]))
    return taps


def convolved(x: Array, w: Array, shape: conv.ConvShape) -> Array:
    """Sums of a grouped convolution in float64: x NHWC and padded, w `[out, in / groups, h, w]`."""
    out = (shape.out_height, shape.out_width)
    total = np.zeros((shape.batch, *out, shape.out_channels))
    per_in, per_out = shape.channels, shape.out_channels // shape.groups
    for i, j, seen in windows(x, out, shape.kernel, shape.strides, shape.dilations):
        for g in range(shape.groups):
            inputs = seen[..., g * per_in : g * per_in + w.shape[1]].astype(np.float64)
            weights = w[g * per_out : (g + 1) * per_out, :, i, j].astype(np.float64)
            total[..., g * per_out : (g + 1) * per_out] += inputs @ weights.T
    return total


# Cases --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """What a random convolution or pool looks like; its input is padded already."""

    batch: int = 1
    out: tuple[int, int] = (3, 5)
    channels: int = 4
    out_channels: int = 4
    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    groups: int = 1
    extra: tuple[int, int] = (0, 0)

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the input; `extra` of them are never read."""
        sizes = [
            (o - 1) * s + (k - 1) * d + 1 + e
            for o, s, k, d, e in zip(
                self.out, self.strides, self.kernel, self.dilations, self.extra, strict=True
            )
        ]
        return sizes[0], sizes[1]


def eight_bit(random: np.random.Generator, shape: Sequence[int], dtype: str) -> Array:
    """Random values of an 8-bit or 16-bit dtype, of which many lie at the ends."""
    low, high = LOWEST[dtype], HIGHEST[dtype]
    values = random.integers(low, high + 1, shape)
    ends = random.choice([low, high], size=shape)
    return np.where(random.random(shape) < 0.25, ends, values).astype(dtype)


def conv_case(
    window: Window,
    isa: Isa,
    epilogue: Epilogue,
    *,
    seed: int = 0,
    multiplier: float | None = None,
    weight: int | None = None,
    operands: tuple[str, str] = ("", "int8"),
    extremes: bool = False,
) -> Case:
    """A convolution of random values; `multiplier` and `weight` replace those of every channel.

    `operands` are the dtypes of input and weights; "" is the storage of the instruction set. With
    `extremes`, all inputs but those of the first pixel are the least value, and biases are 0.
    """
    random = np.random.default_rng(seed)
    first = first_step(epilogue)
    quantized = isinstance(first, Requantise)
    given_dtype, isa = operands[0] or isa.storage, isa.for_operands(*operands)
    read = conv.step(isa, quantized)
    given = window.channels // window.groups
    channels = -(-given // read) * read
    height, width = window.size
    shape = conv.ConvShape(
        window.batch, height, width, channels, *window.out, window.out_channels,
        window.kernel, window.strides, window.dilations, window.groups,
    )  # fmt: skip
    x_shape = (window.batch, height, width, channels * window.groups)
    w_shape = (window.out_channels, given, *window.kernel)
    tile = conv.choose_tile(shape, isa, quantized)
    # What lies in channels beyond the real ones must not matter, so it is not zero.
    if isinstance(first, Requantise):
        x = eight_bit(random, x_shape, given_dtype).astype(isa.staged)
        largest = largest_weight(given_dtype, operands[1], math.prod(w_shape[1:]))
        w = random.integers(-largest, largest + 1, w_shape).astype(operands[1])
        w[random.random(w_shape) < 0.1] = largest
        if weight is not None:
            w[:] = weight
        bias = random.integers(-20_000, 20_000, window.out_channels).astype(np.int32)
        if extremes:
            x[:, :, 1:], bias[:] = LOWEST[given_dtype], 0
        scale = 1e-3 / np.sqrt(w[0].size) if multiplier is None else multiplier
        m = (random.uniform(0.5, 1.5, window.out_channels) * scale).astype(np.float32)
        if multiplier is not None:
            m = np.full(window.out_channels, multiplier, factor_dtype(first))
        elif "int16" in (given_dtype, first.dtype) or isinstance(first, Shift):
            m = fitting_factors(random, convolved(x, w, shape) + bias, first)
    else:
        x = random.standard_normal(x_shape).astype(np.float32)
        w = random.standard_normal(w_shape).astype(np.float32)
        bias = random.standard_normal(window.out_channels).astype(np.float32)
        m = np.ones(window.out_channels, np.float32)
    isa = isa.for_weights(w)
    packed = [conv.pack_weights(w, shape, isa, tile), conv.pack_channels(bias, shape, isa)]
    if quantized:
        packed.append(conv.pack_channels(m, shape, isa))
    if isinstance(first, Requantise):  # clamped before rounding in every other case
        first = dataclasses.replace(first, fits=seed % 2 == 0 and np.abs(m).max() < 1)
        if isinstance(epilogue, Added):
            epilogue = dataclasses.replace(epilogue, inner=first)
        else:
            epilogue = first
    residual = None
    if isinstance(epilogue, Added):
        size = (window.batch, *window.out, window.out_channels)
        residual = random.standard_normal(size).astype(np.float32)
        if quantized:
            residual = eight_bit(random, size, epilogue.residual_dtype)
        packed.append(residual)
    return Case(
        lambda name: conv.conv(name, shape, isa, epilogue, tile, str(w.dtype)),
        (x, *packed),
        finished(convolved(x, w, shape) + bias, m, epilogue, residual),
        f"{isa.name} {window} {epilogue} {operands}",
    )


def largest_weight(x: str, weight: str, taps: int) -> int:
    """The largest weight with which no sum of `taps` products overflows."""
    return min(HIGHEST[weight], (2**31 - 2**16) // (2**15 if x == "int16" else 255) // taps)


def fitting_factors(random: np.random.Generator, total: Array, epilogue: Requantise) -> Array:
    """Multipliers or shifts per channel with which most outputs fit and some saturate."""
    reach = np.abs(total).reshape(-1, total.shape[-1]).max(0) + 1
    ratio = (HIGHEST[epilogue.dtype] - LOWEST[epilogue.dtype]) / 2 / reach
    if isinstance(epilogue, Shift):
        places = np.ceil(-np.log2(ratio)) + random.integers(-2, 3, ratio.shape)
        return np.asarray(np.maximum(places, -17 if epilogue.left else 0).astype(np.int32))
    return np.asarray((ratio * random.uniform(0.3, 3, ratio.shape)).astype(np.float32))


def depthwise_case(
    window: Window | DepthwiseShape,
    isa: Isa,
    epilogue: Epilogue,
    *,
    seed: int = 0,
    operands: tuple[str, str] = ("", "int8"),
    zero_point: int | None = None,
    multiplier: float | None = None,
    least_weight: int = -128,
) -> Case:
    """A depthwise convolution of random values.

    `operands` as in `conv_case`; `zero_point` is that of the input, counted from its lowest value
    (drawn if None), and `multiplier` replaces those of every channel. 8-bit weights go down to
    `least_weight`.
    """
    shape = depthwise_shape(window) if isinstance(window, Window) else window
    random, given = np.random.default_rng(seed), isa.storage
    isa = isa.for_operands(*operands)
    quantized, point = isinstance(epilogue, Requantise), 0
    x_shape = (shape.batch, shape.height, shape.width, shape.channels)
    w_shape = (shape.channels, 1, *shape.kernel)
    if quantized:
        dtype = operands[0] or given
        if dtype != "int16":
            drawn = random.choice([0, 3, 128, 255]) if zero_point is None else zero_point
            point = LOWEST[dtype] + int(drawn)
        x = eight_bit(random, x_shape, dtype)
        w = random.choice([least_weight, -127, -3, 0, 1, 90, 127], size=w_shape).astype(operands[1])
        if operands[1] == "int16":
            largest = largest_weight(dtype, "int16", math.prod(shape.kernel))
            w = random.choice([-largest, -9, 0, largest // 3, largest], size=w_shape)
            w = w.astype(np.int16)
        bias = random.integers(-20_000, 20_000, shape.channels).astype(np.int32)
        m = random.uniform(0.5e-3, 2e-3, shape.channels).astype(np.float32)
    else:
        x = random.standard_normal(x_shape).astype(np.float32)
        w = random.standard_normal(w_shape).astype(np.float32)
        bias = random.standard_normal(shape.channels).astype(np.float32)
        m = np.ones(shape.channels, np.float32)
    padded = padded_for(x, shape, point)
    out = (shape.out_height, shape.out_width)
    total = np.zeros((shape.batch, *out, shape.channels)) + bias
    for i, j, seen in windows(padded, out, shape.kernel, shape.strides, shape.dilations):
        total += (seen.astype(np.float64) - point) * w[:, 0, i, j]
    if isinstance(epilogue, Shift) or (quantized and x.dtype == np.int16):
        assert isinstance(epilogue, Requantise)
        m = fitting_factors(random, total, epilogue)
    if multiplier is not None:
        m = np.full(shape.channels, multiplier, np.float32)
    if isinstance(epilogue, Requantise) and m.dtype == np.float32:
        epilogue = dataclasses.replace(epilogue, fits=bool((m < 1).all()))
    isa = isa.for_weights(w)
    packed = [pack_weights(w, shape, isa)]
    if quantized:
        centred = centred_bias(bias, w, point)
        packed += [pack_channels(values, isa, True) for values in (centred, m)]
    else:
        packed.append(pack_channels(bias, isa, False))
    if size := border_size(shape):
        packed.append(np.full(size, point, x.dtype))
    return Case(
        lambda name: depthwise(name, shape, isa, epilogue, str(x.dtype), point),
        (x, *packed),
        finished(total, m, epilogue),
        f"{isa.name} {shape} {epilogue} {operands}",
    )


def depthwise_shape(window: Window) -> DepthwiseShape:
    """The shape of a depthwise convolution that needs no border."""
    return DepthwiseShape(
        window.batch, *window.size, window.channels, *window.out,
        window.kernel, window.strides, window.dilations,
    )  # fmt: skip


def padded_for(x: Array, shape: DepthwiseShape, fill: float) -> Array:
    """An input with the border that the windows of a shape see, and no more."""
    axes = zip(
        (shape.height, shape.width),
        (shape.out_height, shape.out_width),
        shape.kernel,
        shape.strides,
        shape.dilations,
        shape.pads,
        strict=True,
    )
    border = [
        (pad, max((out - 1) * stride + (kernel - 1) * dilation + 1 - pad - size, 0))
        for size, out, kernel, stride, dilation, pad in axes
    ]
    return np.pad(x, [(0, 0), *border, (0, 0)], constant_values=fill)


def stage_case(
    shape: StageShape, isa: Isa, dtypes: tuple[str, str], fill: float, *, seed: int = 0
) -> Case:
    """A padded copy of random values."""
    random = np.random.default_rng(seed)
    given = (shape.batch, shape.height, shape.width, shape.groups, shape.channels)
    x = random.integers(-100 if dtypes[0] != "uint8" else 0, 100, given).astype(dtypes[0])
    size = (shape.batch, shape.out_height, shape.out_width, shape.groups, shape.out_channels)
    wanted = np.full(size, fill, dtypes[1])
    for row in range(shape.top, min(shape.top + shape.height, shape.out_height)):
        for column in range(shape.left, min(shape.left + shape.width, shape.out_width)):
            source = x[:, row - shape.top, column - shape.left]
            wanted[:, row, column, :, : shape.channels] = source
    return Case(
        lambda name: stage(name, shape, isa, dtypes, fill),
        (x,),
        wanted,
        f"{isa.name} {shape} {dtypes} {fill}",
    )


def requantise_to(isa: Isa, zero_point: int = 3, low: int = 0, high: int = 255) -> Requantise:
    """An epilogue in the storage of an instruction set; numbers count from its lowest value."""
    base = LOWEST[isa.storage]
    return Requantise(isa.storage, zero_point + base, low + base, high + base)


def shift_to(dtype: str, *, left: bool = False, low: int | None = None) -> Shift:
    """An epilogue by shifts whose zero point is real zero, as fixed-point graphs have it."""
    point = 128 if dtype == "uint8" else 0
    return Shift(dtype, point, LOWEST[dtype] if low is None else low, HIGHEST[dtype], left)


def added_to(isa: Isa, final: Requantise | None = None) -> Added:
    """A residual in the storage of an instruction set, and the sum's own scale and clamp."""
    base = LOWEST[isa.storage]
    final = final or requantise_to(isa, 90, 40, 251)
    factor = 2.0**-22 * 1.37
    if isinstance(final, Shift):
        factor = 22
    else:
        final = dataclasses.replace(final, fits=True)
    inner = requantise_to(isa, 7)
    return Added(inner, final, isa.storage, base + 130, (2**21, -(2**20) - 12345), factor)


WIDE = Requantise("int16", 0, LOWEST["int16"], HIGHEST["int16"])
FLOATS = Clip()
