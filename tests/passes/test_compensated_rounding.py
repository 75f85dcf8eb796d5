from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.passes._compensated_rounding import compensated_steps
from tests.graphs import Array, random


def correlated(count: int, width: int, seed: int = 0) -> Array:
    """Inputs `[count, width]` of which neighbours say nearly the same."""
    mixed = random(count, width, seed=seed) @ random(width, width, seed=seed + 1)
    return np.asarray(mixed + 3, np.float64)


def output_error(weights: Array, steps: Array, scales: Array, x: Array) -> float:
    return float(np.square(x @ (steps * scales - weights)).mean())


def test_outputs_are_nearer_than_with_nearest_rounding() -> None:
    x, weights = correlated(500, 96), random(96, 20, seed=3)
    scales = np.abs(weights).max(axis=0) / 7
    steps = compensated_steps(weights, scales, x.T @ x / len(x), 7)
    nearest = np.clip(np.rint(weights / scales), -7, 7)
    error = output_error(weights, steps, scales, x)
    assert error < 0.5 * output_error(weights, nearest, scales, x)
    # it holds for inputs of the same kind that were not seen, too
    fresh = correlated(500, 96, seed=0)[::-1] + random(500, 96, seed=9) * 0.1
    assert output_error(weights, steps, scales, fresh) < output_error(
        weights, nearest, scales, fresh
    )


def test_two_inputs_as_computed_by_hand() -> None:
    """Equal inputs: what the first one's rounding lost, the second one's gains."""
    second = np.array([[1.0, 1.0], [1.0, 1.0]])
    weights = np.array([[0.4], [0.4]])
    steps = compensated_steps(weights, np.ones(1), second, 127)
    np.testing.assert_array_equal(steps, [[0], [1]])


def test_independent_inputs_are_rounded_to_nearest() -> None:
    weights = random(70, 9)
    scales = np.full(9, 0.1)
    steps = compensated_steps(weights, scales, np.diag(np.linspace(1, 5, 70)), 127)
    np.testing.assert_array_equal(steps, np.clip(np.rint(weights / 0.1), -127, 127))


@given(st.integers(1, 140), st.integers(1, 8), st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_steps_stay_within_their_limit(width: int, outputs: int, seed: int) -> None:
    x = random(6, width, seed=seed)  # of low rank
    weights = random(width, outputs, seed=seed) * 10
    steps = compensated_steps(weights, np.full(outputs, 0.1), (x.T @ x).astype(np.float64), 127)
    assert steps.dtype == np.int8
    assert steps.shape == weights.shape
    assert np.abs(steps.astype(int)).max() <= 127


@pytest.mark.parametrize("second", [np.zeros((3, 3)), np.diag([0.0, 1, 0])])
def test_inputs_that_are_always_zero(second: Array) -> None:
    weights = np.array([[0.6], [1.4], [-2.5]])
    steps = compensated_steps(weights, np.ones(1), second, 127)
    np.testing.assert_array_equal(steps, [[1], [1], [-2]])
