"""What percentile, entropy and mse share: streaming, exact, independent of order and batches."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.calibration.base import CalibrationError, Calibrator, Range, calibrator_class

METHODS = ("entropy", "mse", "percentile")


def observed(method: str, samples: list[np.ndarray]) -> Calibrator:
    calibrator = calibrator_class(method)()
    for sweep in range(calibrator.sweeps):
        for sample in samples:
            calibrator.observe(sample, sweep)
    return calibrator


def drawn(seed: int, shape: str) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(3000).astype(np.float32)
    return {
        "normal": values,
        "relu": np.maximum(values, 0),
        "negative": -np.abs(values) - 1,
        "offset": values + 20,
        "heavy": values**5,
        "tiny": values * np.float32(1e-40),
        "huge": np.sign(values) * np.float32(3e38),
    }[shape]


SHAPES = st.sampled_from(["normal", "relu", "negative", "offset", "heavy", "tiny", "huge"])


@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 99), shape=SHAPES, order=st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=15)
def test_order_and_batches_do_not_matter(method: str, seed: int, shape: str, order: object) -> None:
    values = drawn(seed, shape)
    samples = np.split(values, 10)
    shuffled = list(samples)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    whole = observed(method, [values.reshape(1, 30, 100)]).range()
    assert observed(method, samples).range() == observed(method, shuffled).range() == whole
    assert values.min() <= whole.low < whole.high <= values.max()


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_tensor_has_a_range_of_one_value(method: str) -> None:
    assert observed(method, [np.full((2, 3), 1.5, np.float32)]).range() == Range(1.5, 1.5)


@pytest.mark.parametrize("method", METHODS)
def test_memory_does_not_grow_with_the_samples(method: str) -> None:
    calibrator = calibrator_class(method)()
    sample = drawn(0, "normal")
    for sweep in range(2):
        calibrator.observe(sample, sweep)
    tracemalloc.start()
    for _ in range(50):
        calibrator.observe(sample, sweep=1)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < sample.nbytes


@pytest.mark.parametrize("method", METHODS)
def test_missing_observations_are_errors(method: str) -> None:
    with pytest.raises(CalibrationError, match=f"{method} saw no values"):
        calibrator_class(method)().range()
    calibrator = calibrator_class(method)()
    calibrator.observe(np.array([1, 2], "f"), sweep=0)
    with pytest.raises(CalibrationError, match="needs two sweeps"):
        calibrator.range()
