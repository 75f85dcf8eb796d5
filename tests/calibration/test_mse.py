from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.calibration.base import Range
from edgepress.calibration.mse import Mse
from edgepress.calibration.qparams import activation_qparams, dequantize, quantize

#: Rounding is modelled as uniform noise; a search over real errors may be luckier with the grid.
OF_THE_BEST = 1.1


def chosen(values: np.ndarray) -> Range:
    calibrator = Mse()
    for sweep in range(calibrator.sweeps):
        calibrator.observe(values, sweep)
    return calibrator.range()


def true_error(values: np.ndarray, value_range: Range) -> float:
    """The mean squared error of really quantizing the values."""
    scale, zero_point = activation_qparams(value_range)
    integers = quantize(values, scale, zero_point, "uint8")
    return float(np.mean((dequantize(integers, scale, zero_point) - values) ** 2))


@given(
    seed=st.integers(0, 999),
    power=st.sampled_from([1, 3]),
    floor=st.sampled_from([-np.inf, -0.5, 0.0]),
)
@settings(deadline=None, max_examples=20)
def test_it_is_near_the_best_of_a_brute_force_search(seed: int, power: int, floor: float) -> None:
    values = np.random.default_rng(seed).standard_normal(20_000).astype(np.float32) ** power
    values = np.maximum(values, np.float32(floor))
    low, high = float(values.min()), float(values.max())
    steps = np.linspace(0.05, 1, 20)
    best = min(true_error(values, Range(low * a, high * b)) for a in steps for b in steps)
    assert true_error(values, chosen(values)) <= OF_THE_BEST * best


def test_a_far_outlier_is_clipped() -> None:
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    values = np.append(values, np.float32(60))
    found = chosen(values)
    assert found.high < 55
    assert true_error(values, found) < true_error(values, Range(float(values.min()), 60.0))


@pytest.mark.parametrize("sign", [1, -1])
def test_one_sided_tensors_keep_the_side_that_is_free(sign: int) -> None:
    values = sign * np.random.default_rng(1).uniform(2, 3, 5000).astype(np.float32)
    found = chosen(values)
    assert (found.low if sign > 0 else -found.high) == pytest.approx(np.abs(values).min())
    assert (found.high if sign > 0 else -found.low) == pytest.approx(3.0, abs=0.02)
