"""Interpolated tables: the kernel, the arithmetic and how near they come to their functions."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from edgepress.targets.isa.base import load_isa
from edgepress.targets.lowering.interpolation import InterpolatedTable, interpolated_table
from edgepress.targets.lowering.quantization import Quantization
from edgepress.targets.program import Array
from edgepress.targets.schedules.interpolate import interpolate
from tests.targets.kernels import HIGHEST, LOWEST, Case, check, native_isas

EVERY = np.arange(-(2**15), 2**15).astype(np.int16)
BOUNDS = (-np.inf, np.inf)


def wide(scale: float) -> Quantization:
    return Quantization(np.float32(scale), 0, "int16")


def read(entries: Array, bits: int, fraction: int, x: int) -> int:
    """One look-up in exact arithmetic: a line between two entries, rounded half up."""
    index, rest = divmod(x + 2**15, 2**bits)
    a, b = int(entries[index]), int(entries[index + 1])
    value: Fraction = (a + (b - a) * Fraction(rest, 2**bits)) / 2**fraction
    return math.floor(value + Fraction(1, 2))


def random_entries(bits: int, fraction: int, dtype: str, seed: int) -> Array:
    random = np.random.default_rng(seed)
    low, high = LOWEST[dtype] << fraction, HIGHEST[dtype] << fraction
    entries = random.integers(low, high + 1, 2 ** (16 - bits) + 1)
    ends = random.choice([low, high], entries.shape)
    mixed = np.where(random.random(entries.shape) < 0.4, ends, entries)
    return np.asarray(mixed.astype(np.int16))


KINDS = [(7, 0, "int16"), (4, 0, "int16"), (7, 7, "int8"), (5, 7, "uint8")]


@pytest.mark.parametrize("isa_name", native_isas())
def test_the_kernel(isa_name: str) -> None:
    isa, cases = load_isa(isa_name), []
    for seed, (size, (bits, fraction, dtype)) in enumerate(
        zip((2**16, 1, 37, 4099), KINDS, strict=True)
    ):
        entries = random_entries(bits, fraction, dtype, seed)
        x = np.random.default_rng(seed).permutation(EVERY)[:size]
        wanted = [read(entries, bits, fraction, int(value)) for value in x]
        cases.append(
            Case(
                lambda name, size=size, options=(bits, fraction, dtype): interpolate(  # type: ignore[misc]
                    name, size, isa, *options
                ),
                (x, entries),
                np.array(wanted).astype(dtype),
                f"{size} {bits} {fraction} {dtype}",
            )
        )
    check(cases, isa_name)


@pytest.mark.parametrize(("bits", "fraction", "dtype"), KINDS)
def test_the_reference(bits: int, fraction: int, dtype: str) -> None:
    entries = random_entries(bits, fraction, dtype, 9)
    x = EVERY[::97]
    answer = InterpolatedTable(entries, bits, fraction).look_up(x)
    assert answer.tolist() == [read(entries, bits, fraction, int(value)) for value in x]


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


@pytest.mark.parametrize(
    ("scale", "target"),
    [
        (8 / 2**15, wide(2.0**-15)),
        (20 / 2**15, wide(1e-4)),
        (40 / 2**15, Quantization(np.float32(1 / 256), 0, "uint8")),
        (8 / 2**15, Quantization(np.float32(1 / 128), 0, "int8")),
    ],
)
def test_tables_come_near_their_function(scale: float, target: Quantization) -> None:
    table = interpolated_table(sigmoid, wide(scale), target, BOUNDS)
    exact = sigmoid(EVERY.astype(np.float64) * np.float64(np.float32(scale)))
    exact = np.clip(exact / np.float64(target.scale), target.lowest, target.highest)
    assert np.abs(table.look_up(EVERY) - exact).max() <= 1.51
    assert table.entries.size == 2 ** (16 - table.bits) + 1


def test_a_steep_function_takes_the_largest_table() -> None:
    table = interpolated_table(sigmoid, wide(1.0), wide(2.0**-15), BOUNDS)
    assert (table.bits, table.entries.size) == (4, 4097)
    straight = interpolated_table(lambda x: 0.5 * x, wide(2.0**-10), wide(2.0**-11), BOUNDS)
    assert (straight.bits, straight.entries.size) == (7, 513)
    np.testing.assert_array_equal(straight.look_up(EVERY[:-128]), EVERY[:-128])


def test_clamps_and_what_is_no_number() -> None:
    for bounds, function in itertools.product([(0.0, 0.5), (0.0, np.inf)], [np.log, np.negative]):
        table = interpolated_table(function, wide(2.0**-10), wide(2.0**-12), bounds)
        answer = table.look_up(EVERY)
        assert answer.min() >= 0
        assert answer.max() <= min(bounds[1] * 2**12, 2**15 - 1)
    logarithm = interpolated_table(np.log, wide(2.0**-10), wide(2.0**-12), BOUNDS)
    assert logarithm.look_up(EVERY[:100]).tolist() == [2**15 - 1] * 100  # NaN is the highest
