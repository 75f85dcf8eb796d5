from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.calibration.base import CalibrationError, Range
from edgepress.calibration.percentile import Percentile


def chosen(values: np.ndarray, **options: float) -> Range:
    calibrator = Percentile(**options)  # type: ignore[arg-type]
    for sweep in range(calibrator.sweeps):
        calibrator.observe(values, sweep)
    return calibrator.range()


@given(seed=st.integers(0, 999), percentile=st.sampled_from([50.0, 90.0, 99.0, 99.9]))
@settings(deadline=None, max_examples=30)
def test_it_drops_as_many_as_it_may_to_one_bin(seed: int, percentile: float) -> None:
    values = np.random.default_rng(seed).standard_normal(20_003).astype(np.float32)
    dropped = int(values.size * (100 - percentile) / 200)
    bin_width = (values.max() - values.min()) / 8192
    low, high = np.sort(values)[[dropped, -1 - dropped]]
    found = chosen(values, percentile=percentile)
    assert low - 1.01 * bin_width <= found.low <= low + 1e-6
    assert high - 1e-6 <= found.high <= high + 1.01 * bin_width
    inside = np.mean((values >= found.low - 1e-6) & (values <= found.high + 1e-6))
    assert inside >= percentile / 100


def test_an_outlier_is_cut_and_hundred_per_cent_keeps_it() -> None:
    values = np.append(np.linspace(0, 1, 99_999, dtype=np.float32), np.float32(100))
    assert chosen(values, percentile=99.99).high == pytest.approx(1.0, abs=0.02)
    assert chosen(values, percentile=100.0) == Range(0.0, 100.0)


def test_zeros_behind_a_relu_stay_the_lower_end() -> None:
    values = np.maximum(np.random.default_rng(0).standard_normal(9999), 0).astype(np.float32)
    assert chosen(values).low == 0.0


@pytest.mark.parametrize("percentile", [0.0, -1.0, 100.1, float("nan")])
def test_a_percentile_out_of_bounds_is_refused(percentile: float) -> None:
    with pytest.raises(CalibrationError, match="above 0 and at most 100"):
        Percentile(percentile=percentile)
