from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edgepress.calibration.base import CalibrationError, Range
from edgepress.calibration.fixed_point import (
    MOST_FRACTION_BITS,
    Format,
    fitting_format,
    stochastic,
    to_fixed,
)

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
BITS = st.sampled_from([8, 16])


def test_formats_are_written_as_arm_writes_them() -> None:
    assert [str(Format(16, n)) for n in (15, 12, 0, 18, -5)] == [
        "Q0.15", "Q3.12", "Q15.0", "Q-3.18", "Q20.-5"
    ]  # fmt: skip
    assert str(Format(8, 7)) == "Q0.7"
    assert Format(8, 3).limits == (-128, 127)
    assert Format(13, 3).limits == (-4096, 4095)


@given(low=FLOATS, high=FLOATS, bits=BITS)
@settings(deadline=None, max_examples=300)
def test_the_finest_format_that_holds_the_range(low: float, high: float, bits: int) -> None:
    low, high = min(low, high), max(low, high)
    found = fitting_format(Range(low, high), bits)
    least, largest = found.limits

    def holds(fraction_bits: int) -> bool:
        scale = Fraction(2) ** fraction_bits
        steps = [round(Fraction(value) * scale) for value in (min(low, 0.0), max(high, 0.0))]
        return least <= steps[0] and steps[1] <= largest

    assert found.bits == bits
    assert np.isfinite(found.scale)
    assert found.scale * float(largest) < math.inf
    if min(low, 0.0) == max(high, 0.0):
        assert found.fraction_bits == 0
    elif found.scale * largest < 2**126:
        assert holds(found.fraction_bits)
        assert found.fraction_bits == MOST_FRACTION_BITS or not holds(found.fraction_bits + 1)


@pytest.mark.parametrize(
    ("value_range", "bits", "expected"),
    [
        ((-1.0, 0.99), 8, "Q0.7"),  # the least integer is used
        ((-1.0, 1.0), 8, "Q1.6"),  # 1 is 128 steps of 2**-7
        ((0.0, 0.9960), 8, "Q0.7"),  # within half a step of 127
        ((0.0, 0.9962), 8, "Q1.6"),
        ((-1.004, 0.0), 8, "Q1.6"),
        ((0.0, 6.0), 16, "Q3.12"),
        ((3.0, 5.0), 16, "Q3.12"),  # 0 is always held
        ((0.0, 0.0), 16, "Q15.0"),
        ((0.0, 1e-45), 16, "Q-85.100"),
        ((0.0, 3.4e38), 8, "Q127.-120"),
        ((-3.4e38, 0.0), 16, "Q127.-112"),
    ],
)
def test_formats_of_edge_cases(value_range: tuple[float, float], bits: int, expected: str) -> None:
    assert str(fitting_format(Range(*value_range), bits)) == expected


@pytest.mark.parametrize(
    ("value_range", "message"),
    [
        ((0.0, np.inf), "not finite"),
        ((np.nan, 1.0), "not finite"),
        ((1.0, -1.0), "reversed"),
    ],
)
def test_ranges_without_a_format_are_refused(
    value_range: tuple[float, float], message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        fitting_format(Range(*value_range), 8)


@given(
    values=arrays.arrays(np.float32, (3, 5), elements=FLOATS),
    fraction_bits=st.integers(-112, 100),
    bits=BITS,
)
@settings(deadline=None, max_examples=100)
def test_rounding_is_exact_half_to_even_and_saturates(
    values: np.ndarray, fraction_bits: int, bits: int
) -> None:
    limits = Format(bits, fraction_bits).limits
    integers, saturated = to_fixed(values, fraction_bits, limits)
    exact = [round(Fraction(float(v)) * Fraction(2) ** fraction_bits) for v in values.ravel()]
    kept = [min(max(steps, limits[0]), limits[1]) for steps in exact]
    assert integers.ravel().tolist() == kept
    assert saturated == sum(a != b for a, b in zip(exact, kept, strict=True))


def test_channels_have_formats_of_their_own() -> None:
    values = np.array([[0.5, 1.5], [2.5, -300.0]], np.float32)
    integers, saturated = to_fixed(values, np.array([[0], [1]]), (-128, 127))
    assert integers.tolist() == [[0, 2], [5, -128]]
    assert saturated == 1


@given(
    steps=arrays.arrays(np.float64, 50, elements=st.floats(-1e6, 1e6)),
    seed=st.integers(0, 2**40),
)
@settings(deadline=None, max_examples=50)
def test_stochastic_rounding_takes_a_neighbour_and_keeps_integers(
    steps: np.ndarray, seed: int
) -> None:
    rounded = stochastic(seed, "w")(steps)
    assert ((rounded == np.floor(steps)) | (rounded == np.ceil(steps))).all()
    np.testing.assert_array_equal(stochastic(seed, "w")(np.rint(steps)), np.rint(steps))
    np.testing.assert_array_equal(stochastic(seed, "w")(steps.reshape(5, 10)).ravel(), rounded)


def test_stochastic_rounding_goes_up_as_often_as_the_fraction_says() -> None:
    steps = np.repeat([0.25, -0.25, 7.9, 0.001], 20_000)
    means = stochastic(3, "w")(steps).reshape(4, -1).mean(axis=1)
    # 5 standard deviations of a mean of 20000 draws
    np.testing.assert_allclose(means, [0.25, -0.25, 7.9, 0.001], atol=5 * 0.5 / np.sqrt(20_000))


def test_stochastic_rounding_draws_the_same_for_ever() -> None:
    halves = np.full(16, 0.5)
    drawn = stochastic(0, "conv.weight")(halves)
    assert drawn.tolist() == GOLDEN
    np.testing.assert_array_equal(stochastic(0, "conv.weight")(halves), drawn)
    assert stochastic(1, "conv.weight")(halves).tolist() != GOLDEN
    assert stochastic(0, "other.weight")(halves).tolist() != GOLDEN


GOLDEN = [0, 0, 1, 0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 0, 0, 0]
