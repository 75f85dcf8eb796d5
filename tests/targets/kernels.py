"""Kernels and what NumPy says they must answer, many of them in one Program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgepress.targets.base import Target
from edgepress.targets.devices.base import host_architecture
from edgepress.targets.isa.base import Isa
from edgepress.targets.load import host_flags, load_target
from edgepress.targets.program import Array, Call, Program, Tensor
from edgepress.targets.schedules import conv, depthwise
from edgepress.targets.schedules.epilogue import Clip, Epilogue, Requantise
from edgepress.targets.schedules.stage import StageShape, stage
from edgepress.targets.schedules.window import WindowShape
from tests.targets.interpret import run_program

FLOAT_TOLERANCE = 1e-5  # of the largest value of an output
LOWEST = {"uint8": 0, "int8": -128}
ISAS = ("avx2", "avx512", "avx512_vnni", "neon", "neon_dotprod", "neon_armv7")
_BOARDS = {
    "avx2": "x86-64-v3",
    "avx512": "x86-64-v4",
    "neon": "raspberry-pi-4",
    "neon_dotprod": "raspberry-pi-5",
    "neon_armv7": "armv7-neon",
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
    """The rule of docs/integer.md on exact sums and float32 multipliers."""
    assert np.abs(total, dtype=np.float64).max(initial=0) < 2**31
    with np.errstate(over="ignore"):
        scaled = total.astype(np.int32).astype(np.float32) * np.asarray(multiplier, np.float32)
    low, high = epilogue.low - epilogue.zero_point, epilogue.high - epilogue.zero_point
    rounded = np.rint(np.clip(scaled, np.float32(low), np.float32(high)))
    return np.asarray((rounded.astype(np.int64) + epilogue.zero_point).astype(epilogue.dtype))


def finished(total: Array, multiplier: Any, epilogue: Epilogue) -> Array:
    """Sums to outputs, integer or float."""
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
    """Random 8-bit values of which many lie at the ends."""
    low = LOWEST[dtype]
    values = random.integers(low, low + 256, shape)
    ends = random.choice([low, low + 255], size=shape)
    return np.where(random.random(shape) < 0.25, ends, values).astype(dtype)


def conv_case(
    window: Window,
    isa: Isa,
    epilogue: Epilogue,
    *,
    seed: int = 0,
    multiplier: float | None = None,
    weight: int | None = None,
) -> Case:
    """A convolution of random values; `multiplier` and `weight` replace those of every channel."""
    random = np.random.default_rng(seed)
    quantized = isinstance(epilogue, Requantise)
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
    if quantized:
        x = eight_bit(random, x_shape, isa.storage).astype(isa.staged)
        w = random.integers(-127, 128, w_shape).astype(np.int8)
        w[random.random(w_shape) < 0.1] = 127
        if weight is not None:
            w[:] = weight
        bias = random.integers(-20_000, 20_000, window.out_channels).astype(np.int32)
        scale = 1e-3 / np.sqrt(w[0].size) if multiplier is None else multiplier
        m = (random.uniform(0.5, 1.5, window.out_channels) * scale).astype(np.float32)
        if multiplier is not None:
            m[:] = multiplier
    else:
        x = random.standard_normal(x_shape).astype(np.float32)
        w = random.standard_normal(w_shape).astype(np.float32)
        bias = random.standard_normal(window.out_channels).astype(np.float32)
        m = np.ones(window.out_channels, np.float32)
    packed = [conv.pack_weights(w, shape, isa, tile), conv.pack_channels(bias, shape, isa)]
    if quantized:
        packed.append(conv.pack_channels(m, shape, isa))
    return Case(
        lambda name: conv.conv(name, shape, isa, epilogue, tile),
        (x, *packed),
        finished(convolved(x, w, shape) + bias, m, epilogue),
        f"{isa.name} {window} {epilogue}",
    )


def depthwise_case(window: Window, isa: Isa, epilogue: Epilogue, *, seed: int = 0) -> Case:
    """A depthwise convolution of random values."""
    random = np.random.default_rng(seed)
    quantized = isinstance(epilogue, Requantise)
    height, width = window.size
    shape = WindowShape(
        window.batch, height, width, window.channels, *window.out,
        window.kernel, window.strides, window.dilations,
    )  # fmt: skip
    x_shape, w_shape = (
        (window.batch, height, width, window.channels),
        (window.channels, 1, *window.kernel),
    )
    if quantized:
        x = eight_bit(random, x_shape, isa.storage)
        w = random.choice([-128, -127, -3, 0, 1, 90, 127], size=w_shape).astype(np.int8)
        bias = random.integers(-20_000, 20_000, window.channels).astype(np.int32)
        m = random.uniform(0.5e-3, 2e-3, window.channels).astype(np.float32)
    else:
        x = random.standard_normal(x_shape).astype(np.float32)
        w = random.standard_normal(w_shape).astype(np.float32)
        bias = random.standard_normal(window.channels).astype(np.float32)
        m = np.ones(window.channels, np.float32)
    total = np.zeros((window.batch, *window.out, window.channels)) + bias
    for i, j, seen in windows(x, window.out, window.kernel, window.strides, window.dilations):
        total += seen.astype(np.float64) * w[:, 0, i, j]
    return Case(
        lambda name: depthwise.depthwise(name, shape, isa, epilogue),
        (x, depthwise.pack_weights(w, isa), bias, *([m] if quantized else [])),
        finished(total, m, epilogue),
        f"{isa.name} depthwise {window} {epilogue}",
    )


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


FLOATS = Clip()
