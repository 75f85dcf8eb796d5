from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.calibration.base import Range
from edgepress.calibration.entropy import Entropy, divergences


def slow_divergence(counts: np.ndarray, kept: int, levels: int) -> float:
    """KL(P‖Q) as the TensorRT slides spell it, bin by bin."""
    p = counts[:kept].astype(float)
    p[-1] += counts[kept:].sum()
    q = np.zeros(kept)
    for group in range(levels):
        start, stop = kept * group // levels, kept * (group + 1) // levels
        filled = [i for i in range(start, stop) if p[i] > 0]
        for i in filled:
            q[i] = counts[start:stop].sum() / len(filled)
    if not q.sum():
        return math.inf
    p, q = p / p.sum(), q / q.sum()
    if any(q[p > 0] == 0):
        return math.inf
    return float(sum(x * math.log(x / y) for x, y in zip(p, q, strict=True) if x > 0))


@given(
    counts=st.lists(st.integers(0, 50), min_size=24, max_size=24).filter(any),
    levels=st.sampled_from([3, 8]),
)
@settings(deadline=None, max_examples=50)
def test_it_is_the_slow_definition(counts: list[int], levels: int) -> None:
    array = np.array(counts)
    slow = [slow_divergence(array, kept, levels) for kept in range(levels, 25)]
    np.testing.assert_allclose(divergences(array, levels), slow, rtol=1e-9, atol=1e-9)


def chosen(values: np.ndarray, **options: int) -> Range:
    calibrator = Entropy(**options)
    for sweep in range(calibrator.sweeps):
        calibrator.observe(values, sweep)
    return calibrator.range()


def test_a_signed_tensor_gets_a_symmetric_range_without_its_outlier() -> None:
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    found = chosen(np.append(values, np.array([-30, 30], "f")))
    assert found.low == -found.high
    assert 2 < found.high < 10


def test_a_non_negative_tensor_starts_at_its_minimum() -> None:
    values = np.abs(np.random.default_rng(0).standard_normal(100_000)).astype(np.float32)
    found = chosen(np.append(values, np.float32(30)))
    assert found.low == values.min()
    assert 2 < found.high < 10


def test_zeros_do_not_change_the_choice() -> None:
    values = np.abs(np.random.default_rng(0).standard_normal(50_000)).astype(np.float32)
    with_zeros = np.append(values, np.zeros(500_000, np.float32))
    assert chosen(with_zeros).high == pytest.approx(chosen(values).high, rel=1e-6)
