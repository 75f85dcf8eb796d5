from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.passes._ridge import Sums, fit
from tests.graphs import Array

Folds = list[tuple[Array, Array]]


def data(seed: int, *, groups: int, outputs: int, size: int, rows: int, noise: float) -> Folds:
    """Four folds of patches `[groups, rows, n+1]` and the residual of a random linear layer."""
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal((groups, outputs, size + 1))
    folds = []
    for _ in range(4):
        patches = rng.standard_normal((groups, rows, size + 1)) + 0.7
        patches[..., -1] = 1
        residual = truth @ patches.swapaxes(1, 2)
        folds.append((patches, residual + noise * rng.standard_normal(residual.shape)))
    return folds


def together(folds: Folds) -> tuple[Array, Array]:
    """All folds in one: `[groups, rows, n+1]` and `[groups, out, rows]`."""
    patches, residual = zip(*folds, strict=True)
    return np.concatenate(patches, axis=1), np.concatenate(residual, axis=2)


def sums(folds: Folds) -> list[Sums]:
    made = []
    for patches, residual in folds:
        made.append(Sums(size=patches.shape[2] - 1))
        half = patches.shape[1] // 2
        made[-1].add(patches[:, :half], residual[..., :half])
        made[-1].add(patches[:, half:], residual[..., half:])
    return made


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 999),
    groups=st.integers(1, 3),
    outputs=st.integers(1, 4),
    size=st.integers(1, 5),
)
def test_with_many_samples_it_is_least_squares(
    seed: int, groups: int, outputs: int, size: int
) -> None:
    folds = data(seed, groups=groups, outputs=outputs, size=size, rows=300, noise=0.01)
    found = fit(sums(folds), biased=True)
    assert found is not None
    patches, residual = together(folds)
    for group in range(groups):
        want = np.linalg.lstsq(patches[group], residual[group].T, rcond=None)[0].T
        np.testing.assert_allclose(found[group], want, atol=2e-3)


def test_noise_holds_the_weights_back() -> None:
    folds = data(1, groups=1, outputs=3, size=30, rows=10, noise=20.0)
    found = fit(sums(folds), biased=True)
    patches, residual = together(folds)
    plain = np.linalg.lstsq(patches[0], residual[0].T, rcond=None)[0].T
    assert found is None or np.linalg.norm(found) < 0.5 * np.linalg.norm(plain)


def test_pure_noise_changes_nothing_or_little() -> None:
    rng = np.random.default_rng(3)
    folds = [
        (
            np.concatenate([rng.standard_normal((1, 8, 20)), np.ones((1, 8, 1))], 2),
            rng.standard_normal((1, 2, 8)),
        )
        for _ in range(4)
    ]
    found = fit(sums(folds), biased=False)
    assert found is None or np.abs(found).max() < 0.1


def test_without_a_bias_the_last_column_is_zero() -> None:
    folds = data(4, groups=2, outputs=3, size=4, rows=200, noise=0.0)
    found = fit(sums(folds), biased=False)
    assert found is not None
    assert (found[..., -1] == 0).all()
    patches, residual = together(folds)
    for group in range(2):
        want = np.linalg.lstsq(patches[group][:, :-1], residual[group].T, rcond=None)[0].T
        np.testing.assert_allclose(found[group][:, :-1], want, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("level", [0.0, 5.0])
def test_an_input_that_never_varies_gets_only_a_bias(level: float) -> None:
    patches = np.full((1, 20, 4), level)
    patches[..., -1] = 1
    folds = [(patches, np.full((1, 2, 20), 3.0))] * 4
    found = fit(sums(folds), biased=True)
    assert found is not None
    np.testing.assert_allclose(found @ patches[0, 0], np.full((1, 2), 3.0), rtol=1e-6)
    np.testing.assert_allclose(found[..., :-1], 0, atol=1e-6)


def test_the_loss_is_that_of_the_residual() -> None:
    ((patches, residual),) = data(5, groups=2, outputs=3, size=4, rows=50, noise=1.0)[:1]
    change = np.random.default_rng(0).standard_normal((2, 3, 5))
    whole = Sums(size=4)
    whole.add(patches, residual)
    left = residual - change @ patches.swapaxes(1, 2)
    want = float(np.square(left).sum() - np.square(residual).sum())
    assert whole.loss(change) == pytest.approx(want)


def test_in_a_basis_of_all_patches_the_change_is_the_same() -> None:
    """20 patches of 50 inputs span 20 dimensions: there the answer is the same, turned."""
    rng = np.random.default_rng(2)
    hidden = rng.standard_normal((4, 1, 5, 4)) + 0.3
    patches = hidden @ rng.standard_normal((4, 50)) + 0.1 * rng.standard_normal((4, 1, 5, 50))
    residual = (hidden @ rng.standard_normal((4, 3))).swapaxes(2, 3)
    basis = np.linalg.qr(patches.reshape(20, 50).T)[0]
    found = []
    for turn in (np.eye(50), basis):
        folds = [Sums(size=50) for _ in range(4)]
        for fold, read, wanted in zip(folds, patches @ turn, residual, strict=True):
            fold.add(np.concatenate([read, np.ones((1, 5, 1))], axis=2), wanted)
        change = fit(folds, biased=True)
        assert change is not None
        found.append(np.concatenate([change[..., :-1] @ turn.T, change[..., -1:]], axis=2))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6, atol=1e-9)
    assert np.abs(found[0][..., :-1]).max() > 1e-3
