import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from edgepress.targets.isa.base import Isa, load_isa
from edgepress.targets.program import Array
from edgepress.targets.schedules import elementwise
from edgepress.targets.schedules.concat import concat
from edgepress.targets.schedules.elementwise import Operand
from edgepress.targets.schedules.epilogue import Requantise
from tests.targets.kernels import (
    LOWEST,
    WIDE,
    Case,
    check,
    eight_bit,
    native_isas,
    requantise_to,
    requantised,
    shift_to,
)

SIZES = (1, 2, 3, 15, 16, 33, 100, 4096, 4097, 5000)


def every_value(size: int, dtype: str) -> Array:
    """All 256 values in turn; of 16 bits every 257th, both ends among them."""
    if dtype == "int16":
        return ((np.arange(size) % 256) * 257 + LOWEST[dtype]).astype(dtype)
    return (np.arange(size) % 256 + LOWEST[dtype]).astype(dtype)


def rescale_case(size: int, isa: Isa, dtype: str, multiplier: float, out: Requantise) -> Case:
    x, point = every_value(size, dtype), 0 if dtype == "int16" else LOWEST[dtype] + 50
    return Case(
        lambda name: elementwise.rescale(
            name, size, isa, Operand(dtype, point, size), multiplier, out
        ),
        (x,),
        requantised(x.astype(np.int64) - point, multiplier, out),
        f"rescale {size} {dtype} * {multiplier} to {out}",
    )


def quantise_case(x: Array, isa: Isa, scale: float, epilogue: Requantise) -> Case:
    """Checked against Python's own half-to-even rounding of the correctly rounded quotient."""
    low, high = LOWEST[epilogue.dtype], LOWEST[epilogue.dtype] + 255
    with np.errstate(over="ignore"):
        quotients = [float(np.float32(value) / np.float32(scale)) for value in x]
    quotients = [1e4 if math.isnan(q) else q for q in quotients]  # NaN becomes the highest value
    steps = [round(min(max(q, -1e4), 1e4)) + epilogue.zero_point for q in quotients]
    wanted = np.array([min(max(step, low), high) for step in steps], epilogue.dtype)
    return Case(
        lambda name: elementwise.quantise(name, len(x), isa, scale, epilogue),
        (x,),
        wanted,
        f"quantise {len(x)} / {scale} to {epilogue}",
    )


def dequantise_case(size: int, isa: Isa, dtype: str, scale: float, point: int) -> Case:
    x = every_value(size, dtype)
    return Case(
        lambda name: elementwise.dequantise(name, size, isa, scale, dtype, point),
        (x,),
        (x.astype(np.float32) - np.float32(point)) * np.float32(scale),
        f"dequantise {size} {dtype}",
    )


def binary_case(
    kind: str,
    size: int,
    periods: tuple[int, int],
    isa: Isa,
    epilogue: Requantise,
    factors: tuple[int, int] = (1, 1),
    multiplier: float = 1.0,
    dtypes: tuple[str, str] = ("", ""),
) -> Case:
    random = np.random.default_rng(size)
    kinds = [dtype or isa.storage for dtype in dtypes]
    points = [
        0 if kind == "int16" else LOWEST[kind] + offset
        for kind, offset in zip(kinds, (255, 0), strict=True)
    ]
    a, b = (eight_bit(random, (period,), kind) for period, kind in zip(periods, kinds, strict=True))
    left, right = (
        np.resize(x.astype(np.int64) - point, size) for x, point in zip((a, b), points, strict=True)
    )
    operands = tuple(
        Operand(kind, point, period)
        for kind, point, period in zip(kinds, points, periods, strict=True)
    )
    if kind == "add":
        total = left * factors[0] + right * factors[1]
        options: tuple[Any, ...] = (operands, factors, multiplier, epilogue)
    else:
        total, options = left * right, (operands, multiplier, epilogue)
    generate: Callable[..., Any] = getattr(elementwise, kind)
    return Case(
        lambda name: generate(name, size, isa, *options),
        (a, b),
        requantised(total, multiplier, epilogue),
        f"{kind} {size} {periods} {factors} {multiplier} {dtypes} {epilogue}",
    )


@pytest.mark.parametrize("isa_name", native_isas())
def test_rescale(isa_name: str) -> None:
    isa = load_isa(isa_name)
    other = {"uint8": "int8", "int8": "uint8"}[isa.storage]
    multipliers = (0.0, 1e-9, 0.5, 1.0, 0.7231, 1.5, 1e9, 2.0**96)
    cases = [
        rescale_case(size, isa, dtype, multiplier, requantise_to(isa, point, *clamp))
        for size, dtype, multiplier, point, clamp in zip(
            SIZES,
            itertools.cycle([isa.storage, other]),
            itertools.cycle(multipliers),
            itertools.cycle((0, 255, 99)),
            itertools.cycle([(0, 255), (10, 200)]),
            strict=False,
        )
    ]
    check(cases, isa_name)


@pytest.mark.parametrize("isa_name", native_isas())
def test_quantise_rounds_half_to_even_and_saturates(isa_name: str) -> None:
    isa = load_isa(isa_name)
    ties = (np.arange(-600, 601) / 2).astype(np.float32)
    above, below = np.nextafter(ties, np.float32(1e9)), np.nextafter(ties, np.float32(-1e9))
    ends = np.array([np.inf, -np.inf, 3e38, -3e38, 1e-45, 0.0, -0.0, np.nan], np.float32)
    x = np.concatenate([ties, above, below, ends])
    cases = [
        quantise_case(x * np.float32(scale), isa, scale, requantise_to(isa, point))
        for scale, point in ((1.0, 0), (0.25, 255), (float(np.float32(0.1)), 127))
    ]
    cases += [quantise_case(x, isa, scale, requantise_to(isa, 9)) for scale in (2.0**-100, 1e30)]
    cases += [quantise_case(x[:size], isa, 0.5, requantise_to(isa, 3)) for size in SIZES[:6]]
    check(cases, isa_name)


@pytest.mark.parametrize("isa_name", native_isas())
def test_dequantise_is_exact(isa_name: str) -> None:
    isa = load_isa(isa_name)
    cases = [
        dequantise_case(size, isa, dtype, float(np.float32(scale)), LOWEST[dtype] + point)
        for size, dtype, scale, point in [
            (1, "uint8", 0.1, 0),
            (256, "uint8", 0.37, 255),
            (257, "int8", 2.0**-100, 128),
            (4099, "int8", 3e30, 0),
        ]
    ]
    cases = [
        Case(case.kernel, case.arguments, case.wanted.view(np.float32), case.what) for case in cases
    ]
    check(cases, isa_name)


@pytest.mark.parametrize("isa_name", native_isas())
def test_add_and_multiply(isa_name: str) -> None:
    isa = load_isa(isa_name)
    out = requantise_to(isa, 60, 5, 250)
    whole = [(size, (size, size)) for size in (1, 7, 32, 35, 5000)]
    repeated = [
        (35, (35, 7)),
        (35, (7, 35)),
        (5040, (5040, 1)),
        (66, (1, 66)),
        (8200, (4100, 8200)),
    ]
    cases = []
    for size, periods in whole + repeated:
        factors = (2**21, -(2**20) - 12345)
        cases.append(binary_case("add", size, periods, isa, out, factors, 2.0**-22))
        cases.append(binary_case("multiply", size, periods, isa, out, multiplier=0.0042))
    for multiplier in (1e-12, 1.0):
        cases.append(binary_case("add", 100, (100, 100), isa, out, (2**21, 2**21), multiplier))
    check(cases, isa_name)


@pytest.mark.parametrize("isa_name", native_isas())
def test_16_bits_and_shifts(isa_name: str) -> None:
    isa = load_isa(isa_name)
    out = [WIDE, requantise_to(isa, 60), shift_to("int16", left=True), shift_to(isa.storage)]
    cases = [rescale_case(300, isa, "int16", m, out[i % 2]) for i, m in enumerate((1e-9, 0.7, 3e4))]
    cases += [
        rescale_case(300, isa, dtype, places, out[2 + places % 2])
        for places in (-17, -8, 0, 1, 8, 15, 16, 31, 32)
        for dtype in ("int16", isa.storage)
    ]
    wide, mixed = ("int16", "int16"), ("", "int16")
    largest = (2**15, 2**15 - 1)
    for periods in ((100, 100), (100, 10), (1, 100)):
        cases.append(binary_case("add", 100, periods, isa, WIDE, largest, 2.0**-16, wide))
        cases.append(binary_case("add", 100, periods, isa, out[2], (2**15, -3), 16, wide))
        cases.append(binary_case("add", 100, periods, isa, out[3], (2**15, 2**14), 23, mixed))
        cases.append(binary_case("multiply", 100, periods, isa, WIDE, multiplier=5e-5, dtypes=wide))
        cases.append(binary_case("multiply", 100, periods, isa, out[2], multiplier=15, dtypes=wide))
        cases.append(
            binary_case("multiply", 100, periods, isa, out[3], multiplier=16, dtypes=mixed)
        )
    check(cases, isa_name)


@pytest.mark.parametrize("isa_name", native_isas()[:1])
@settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    drawn=st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 40), st.booleans()), min_size=8, max_size=8
    )
)
def test_drawn_periods(isa_name: str, drawn: list[tuple[int, int, bool]]) -> None:
    isa, cases = load_isa(isa_name), []
    for lines, period, swapped in drawn:
        size = lines * period
        periods = (period, size) if swapped else (size, period)
        kind = "add" if period % 2 else "multiply"
        cases.append(binary_case(kind, size, periods, isa, requantise_to(isa), (3, -5), 0.01))
    check(cases, isa_name)


@pytest.mark.parametrize("isa_name", native_isas()[:1])
def test_tables_see_every_value(isa_name: str) -> None:
    random = np.random.default_rng(0)
    cases = []
    for source, wanted in itertools.product(("uint8", "int8"), repeat=2):
        table = eight_bit(random, (256,), wanted)
        for size in (256, 1, 4096, 4100):
            x = every_value(size, source)
            answer = np.array([table[int(v) - LOWEST[source]] for v in x], wanted)
            cases.append(
                Case(
                    lambda name, size=size, dtypes=(source, wanted): elementwise.look_up(  # type: ignore[misc]
                        name, size, dtypes
                    ),
                    (x, table),
                    answer,
                    f"look up {size} {source} {wanted}",
                )
            )
    check(cases, isa_name)


@pytest.mark.parametrize("isa_name", native_isas()[:1])
def test_expand_broadcasts(isa_name: str) -> None:
    shapes = [
        ((), (2, 3)),
        ((3,), (2, 3)),
        ((2, 1), (2, 3)),
        ((1, 3, 1, 2), (2, 3, 4, 2)),
        ((2, 1, 1, 1), (2, 3, 1, 5)),
    ]
    cases = []
    for size, shape in shapes:
        x = np.arange(math.prod(size), dtype=np.uint8).reshape(size)
        cases.append(
            Case(
                lambda name, size=size, shape=shape: elementwise.expand(  # type: ignore[misc]
                    name, size, shape, "uint8"
                ),
                (x,),
                np.ascontiguousarray(np.broadcast_to(x, shape)),
                f"expand {size} to {shape}",
            )
        )
    check(cases, isa_name)


@pytest.mark.parametrize("isa_name", native_isas())
def test_concat(isa_name: str) -> None:
    isa, cases = load_isa(isa_name), []
    kinds = [("uint8", (3,)), ("float32", (7, 1, 33)), ("int64", (2, 5)), ("bool", (70, 3, 1))]
    for outer, (dtype, runs) in itertools.product((1, 5), kinds):
        parts = [(np.arange(outer * run) % 3).reshape(outer, run).astype(dtype) for run in runs]
        cases.append(
            Case(
                lambda name, outer=outer, runs=runs, dtype=dtype: concat(  # type: ignore[misc]
                    name, outer, runs, dtype, isa
                ),
                tuple(parts),
                np.concatenate(parts, axis=1),
                f"concat {outer} x {runs} {dtype}",
            )
        )
    check(cases, isa_name)


@pytest.mark.parametrize("isa_name", native_isas()[:1])
def test_threads_share_the_work(isa_name: str) -> None:
    isa, size = load_isa(isa_name), 512 * 1024 + 37
    out = requantise_to(isa)
    cases = [
        rescale_case(size, isa, isa.storage, 0.9, out),
        binary_case("add", size, (size, size), isa, out, (3, 2), 0.2),
    ]
    check(cases, isa_name)
