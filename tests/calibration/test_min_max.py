from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as arrays

from edgepress.calibration.base import CalibrationError, Range, calibrator_class
from edgepress.calibration.min_max import MinMax


def test_it_is_found_by_name() -> None:
    assert calibrator_class("min_max") is MinMax


@given(arrays.arrays(np.float32, (5, 3), elements={"allow_nan": False, "allow_infinity": False}))
@settings(deadline=None, max_examples=50)
def test_it_is_numpys_minimum_and_maximum_in_any_order(samples: np.ndarray) -> None:
    forward, backward = MinMax(), MinMax()
    for sample in samples:
        forward.observe(sample, sweep=0)
    backward.observe(samples[::-1], sweep=0)
    assert forward.range() == backward.range() == Range(samples.min(), samples.max())


def test_empty_values_count_for_nothing() -> None:
    calibrator = MinMax()
    calibrator.observe(np.array([2, 3], "f"), sweep=0)
    calibrator.observe(np.zeros((0, 4), np.float32), sweep=0)
    assert calibrator.range() == Range(2.0, 3.0)


def test_nothing_observed_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="saw no values"):
        MinMax().range()
