"""The requantisation rule itself, against Python's exact integers and rounding."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from edgepress.targets.isa.base import Isa, load_isa
from edgepress.targets.program import Array
from edgepress.targets.schedules.emit import Kernel, chunks, load
from edgepress.targets.schedules.epilogue import (
    Clip,
    Requantise,
    Shift,
    clamped_output,
    divided,
    factor_dtype,
    finish,
)
from edgepress.targets.schedules.narrow import can_narrow, narrowed
from tests.targets.kernels import Case, check, native_isas

LARGEST = 2**31 - 1


def exactly(accumulator: int, multiplier: float, epilogue: Requantise) -> int:
    """The rules in exact arithmetic; only the two float32 operations round."""
    if isinstance(epilogue, Shift):
        steps = round(Fraction(accumulator) / Fraction(2) ** int(multiplier))
        low, high = epilogue.low - epilogue.zero_point, epilogue.high - epilogue.zero_point
        return min(max(steps, low), high) + epilogue.zero_point
    scaled = np.float32(float(np.float32(accumulator)) * float(np.float32(multiplier)))
    if not np.isfinite(scaled):
        return epilogue.high if scaled > 0 else epilogue.low
    low, high = epilogue.low - epilogue.zero_point, epilogue.high - epilogue.zero_point
    clamped = min(max(Fraction(float(scaled)), Fraction(low)), Fraction(high))
    return round(clamped) + epilogue.zero_point  # Fraction rounds half to even


def case(totals: Array, multiplier: float, epilogue: Requantise, lanes: int) -> Case:
    def generate(name: str) -> object:
        kernel = Kernel(name)
        x = kernel.argument("x", "int32", totals.size)
        m = kernel.argument("m", factor_dtype(epilogue), totals.size)
        y = kernel.argument("y", epilogue.dtype, totals.size)
        for first, width, count in chunks(totals.size, lanes):
            with kernel.loop("i", count) as i:
                at = first + i * width
                value = finish(load(x, at, width), load(m, at, width), epilogue, width)
                kernel.store(y, at, value, width)
        return kernel.finish()

    multipliers = np.full(totals.size, multiplier, factor_dtype(epilogue))
    with np.errstate(over="ignore"):
        answers = [exactly(int(total), multiplier, epilogue) for total in totals]
    wanted = np.array(answers, epilogue.dtype)
    return Case(generate, (totals, multipliers), wanted, f"* {multiplier} to {epilogue}")


def narrow_case(totals: Array, multiplier: float, epilogue: Requantise, isa: Isa) -> Case:
    """The same, four vectors at a time."""
    size = 4 * isa.lanes
    totals = np.resize(totals, -(-totals.size // size) * size).astype(np.int32)

    def generate(name: str) -> object:
        kernel = Kernel(name)
        x = kernel.argument("x", "int32", totals.size)
        m = kernel.argument("m", factor_dtype(epilogue), totals.size)
        y = kernel.argument("y", epilogue.dtype, totals.size)
        with kernel.loop("i", totals.size // size) as i:
            places = [i * size + j * isa.lanes for j in range(4)]
            vectors, factors = ([load(b, at, isa.lanes) for at in places] for b in (x, m))
            value = narrowed(vectors, factors, epilogue, isa)
            kernel.store(y, i * size, value, size)
        return kernel.finish()

    plain = case(totals, multiplier, epilogue, isa.lanes)
    return dataclasses.replace(plain, kernel=generate)


EDGES = np.array([0, 1, -1, 2**24, 2**24 + 1, -(2**24) - 1, LARGEST, -LARGEST - 1, 3, -3], np.int32)
EPILOGUES = [
    Requantise("uint8", 0, 0, 255),
    Requantise("uint8", 255, 0, 255),
    Requantise("uint8", 128, 128, 255),  # a fused ReLU
    Requantise("int8", -128, -128, 127),
    Requantise("int8", 127, -128, 127),
    Requantise("int8", 0, 0, 0),  # a clamp to one value
]


@pytest.mark.parametrize("isa_name", native_isas())
def test_ties_and_ends(isa_name: str) -> None:
    lanes = load_isa(isa_name).lanes
    halves = np.arange(-515, 516, dtype=np.int32)
    cases = [case(halves, 0.5, epilogue, lanes) for epilogue in EPILOGUES]
    cases += [
        case(EDGES, multiplier, epilogue, lanes)
        for epilogue in EPILOGUES[:4]
        for multiplier in (0.0, 1e-9, 2.0**-24, 1e-7, 1.0, 1e9, 3e38, -0.5, 2.0**-140)
    ]
    check(cases, isa_name)


@pytest.mark.parametrize("isa_name", [n for n in native_isas() if load_isa(n).narrow])
def test_narrowing_keeps_ties_and_ends(isa_name: str) -> None:
    """Products next to the ends of int32 where nothing clamps before the rounding."""
    isa = load_isa(isa_name)
    rules = [e for e in EPILOGUES if e.dtype == isa.storage]
    assert all(can_narrow(rule, isa) for rule in rules)
    assert not can_narrow(Requantise("int16", 0, 0, 1), isa)
    halves = np.arange(-515, 516, dtype=np.int32)
    cases = []
    low = rules[0].low
    for rule in [*rules, Requantise(isa.storage, low + 90, low + 40, low + 200)]:
        for fits in (True, False):
            epilogue = dataclasses.replace(rule, fits=fits)
            cases.append(narrow_case(halves, 0.5, epilogue, isa))
            below = float(np.nextafter(np.float32(1), np.float32(0)))
            for multiplier in (0.0, 2.0**-24, 2.0**-15, below, 2.0**-140):
                cases.append(narrow_case(EDGES, multiplier, epilogue, isa))
        cases += [narrow_case(EDGES, m, rule, isa) for m in (1.0, 1e9, 3e38, -0.5)]
    shifts = Shift(isa.storage, rules[0].zero_point, rules[0].low, rules[0].high, left=True)
    cases += [narrow_case(near_ties(n), n, shifts, isa) for n in (-17, -3, 0, 1, 9, 31)]
    check(cases, isa_name)


SHIFTS = [
    Shift("uint8", 128, 0, 255, left=True),
    Shift("int8", 0, 0, 127, left=True),
    Shift("int16", 0, -(2**15), 2**15 - 1, left=True),
]


def near_ties(places: int) -> Array:
    """int32 values next to the middle between two results, and at the ends."""
    half = 2 ** max(places - 1, 0)
    around = [k * half + d for k in range(-7, 8) for d in (-1, 0, 1)]
    far = [sign * (2**15 * 2 * half) + d for sign in (-1, 1) for d in (-half, 0, half)]
    values = [v for v in around + far if -(2**31) <= v < 2**31]
    return np.array([*values, *EDGES.tolist(), 2**30, 2**30 + 1, -(2**30), -(2**30) - 1], np.int32)


@pytest.mark.parametrize("isa_name", native_isas())
def test_shifts_are_exact(isa_name: str) -> None:
    lanes, cases = load_isa(isa_name).lanes, []
    for places in (-17, -16, -7, -1, 0, 1, 2, 3, 7, 16, 17, 30, 31):
        for epilogue in SHIFTS if places in (-17, 0, 1, 31) else SHIFTS[places % 3 :][:1]:
            cases.append(case(near_ties(places), places, epilogue, lanes))
            if places >= 0:
                plain = dataclasses.replace(epilogue, left=False)
                cases.append(case(near_ties(places), places, plain, lanes))
    check(cases, isa_name)


@pytest.mark.parametrize("isa_name", native_isas())
def test_constant_shifts_are_exact(isa_name: str) -> None:
    """What element-wise kernels (int32) and average pools (int64) use."""
    lanes, cases = load_isa(isa_name).lanes, []
    epilogue = SHIFTS[2]
    for places in (-17, -3, 0, 1, 2, 15, 30, 31, 32, 60):
        for dtype in ("int32", "int64"):
            x = near_ties(min(places, 31))
            if dtype == "int64" and places > 31:
                x = x.astype(np.int64) << (places - 31)

            def generate(
                name: str, x: Array = x, places: int = places, dtype: str = dtype
            ) -> object:
                kernel = Kernel(name)
                source = kernel.argument("x", dtype, x.size)
                y = kernel.argument("y", epilogue.dtype, x.size)
                for first, width, count in chunks(x.size, lanes):
                    for at in range(first, first + count * width, width):
                        value = divided(load(source, at, width), places, width, dtype)
                        kernel.store(y, at, clamped_output(value, epilogue, width, dtype), width)
                return kernel.finish()

            x = x.astype(dtype)
            wanted = [exactly(int(value), places, epilogue) for value in x]
            cases.append(Case(generate, (x,), np.array(wanted, np.int16), f"{dtype} {places}"))
    check(cases, isa_name)


@st.composite
def drawn_rule(draw: st.DrawFn) -> tuple[Requantise, float]:
    dtype = draw(st.sampled_from(["uint8", "int8"]))
    lowest = 0 if dtype == "uint8" else -128
    point = draw(st.integers(0, 255)) + lowest
    low = draw(st.integers(0, 255)) + lowest
    high = draw(st.integers(low, lowest + 255))
    return Requantise(dtype, point, low, high), draw(
        st.floats(2.0**-30, 2.0**10, width=32, allow_nan=False)
    )


@pytest.mark.parametrize("isa_name", native_isas()[:1])
@settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate])
@given(drawn=st.lists(drawn_rule(), min_size=12, max_size=12), seed=st.integers(0, 99))
def test_drawn_rules(isa_name: str, drawn: list[tuple[Requantise, float]], seed: int) -> None:
    random, cases = np.random.default_rng(seed), []
    for epilogue, multiplier in drawn:
        spread = min(400 / multiplier, 2.0**31 - 1)
        totals = (random.uniform(-1, 1, 200) * spread).astype(np.int32)
        cases.append(case(totals, multiplier, epilogue, load_isa(isa_name).lanes))
    check(cases, isa_name)


@pytest.mark.parametrize("isa_name", native_isas())
def test_float_clips(isa_name: str) -> None:
    x = np.array([-np.inf, -7, -0.5, 0, 0.25, 6, 6.5, 3e38, np.inf], np.float32)
    clips = [Clip(), Clip(0.0), Clip(0.0, 6.0), Clip(high=-0.5)]

    def generate(name: str, clip: Clip) -> object:
        kernel = Kernel(name)
        source, y = (kernel.argument(n, "float32", x.size) for n in "xy")
        for i in range(x.size):
            kernel.store(y, i, finish(load(source, i), None, clip, 1))
        return kernel.finish()

    check(
        [
            Case(
                lambda name, clip=clip: generate(name, clip),  # type: ignore[misc]
                (x,),
                np.clip(x, np.float32(clip.low), np.float32(clip.high)),
                str(clip),
            )
            for clip in clips
        ],
        isa_name,
    )
