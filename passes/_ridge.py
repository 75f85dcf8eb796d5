"""Ridge regression of what a layer should add to its output, on sums over samples.

A layer computes `W·p + b` from patches p of its input and should have computed a target. The change
`[dW db]` that removes most of the residual r solves a linear system in two sums, `Σ [p;1][p;1]ᵀ`
and `Σ r [p;1]ᵀ`. With few samples the solution fits their noise, so a penalty on dW holds it back;
how much of one is found by cross-validation over the samples: Hastie, Tibshirani and Friedman, "The
Elements of Statistical Learning", 2009, sections 3.4.1 and 7.10.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from edgepress.calibration.base import Array

#: Penalties that compete, as shares of the mean variance of an input, the most careful one first.
PENALTIES = (math.inf, 1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-6)
_LEAST_VARIANCE = 1e-12  # of the mean square


@dataclass
class Sums:
    """What the regression needs to know of some samples.

    Attributes:
        size: inputs of the layer; n may be less, where patches are given in a basis of all that
            occur.
        gram: `[groups, n+1, n+1]` float64: `Σ [p;1][p;1]ᵀ`.
        cross: `[groups, out/groups, n+1]` float64: `Σ r [p;1]ᵀ`.
        count: positions in the sums.
    """

    size: int
    gram: Array = field(default_factory=lambda: np.zeros(()))
    cross: Array = field(default_factory=lambda: np.zeros(()))
    count: int = 0

    def add(self, patches: Array, residual: Array) -> None:
        """Add some positions.

        Args:
            patches: `[groups, positions, n+1]`.
            residual: `[groups, out/groups, positions]` float64.
        """
        patches = patches.astype(np.float64)
        self.gram = self.gram + patches.swapaxes(1, 2) @ patches
        self.cross = self.cross + residual @ patches
        self.count += patches.shape[1]

    def __add__(self, other: Sums) -> Sums:
        return replace(
            self,
            gram=self.gram + other.gram,
            cross=self.cross + other.cross,
            count=self.count + other.count,
        )

    def __sub__(self, other: Sums) -> Sums:
        return replace(
            self,
            gram=self.gram - other.gram,
            cross=self.cross - other.cross,
            count=self.count - other.count,
        )

    def loss(self, change: Array) -> float:
        """Return by how much a change `[groups, out/groups, n+1]` raises the squared residual."""
        explained = 2 * float(np.sum(change * self.cross))
        return float(np.sum((change @ self.gram) * change)) - explained


def fit(folds: Sequence[Sums], *, biased: bool) -> Array | None:
    """Return the change of weights and bias that is best on samples it was not fitted to.

    Args:
        folds: sums over disjoint sets of samples, at least two.
        biased: whether the layer has a bias to change; otherwise db is 0.

    Returns:
        `[groups, out/groups, n+1]` float64, db last; None where no change helps.
    """
    total = sum(folds[1:], folds[0])
    best, least = None, 0.0
    for penalty in PENALTIES:
        loss = sum(fold.loss(_solve(total - fold, penalty, biased=biased)) for fold in folds)
        if loss < least:
            best, least = penalty, loss
        elif best is not None:  # from here on it only fits more noise
            break
    return None if best is None else _solve(total, best, biased=biased)


def _solve(sums: Sums, penalty: float, *, biased: bool) -> Array:
    """Return the change for a penalty; an infinite one leaves the weights alone."""
    gram, cross = sums.gram / sums.count, sums.cross / sums.count
    mean, shift = gram[:, -1:, :-1], cross[..., -1:]
    if not biased:
        mean, shift = np.zeros_like(mean), np.zeros_like(shift)
    if math.isinf(penalty):
        return np.concatenate([np.zeros_like(cross[..., :-1]), shift], axis=-1)
    covariance = gram[:, :-1, :-1] - mean.swapaxes(1, 2) * mean
    cross = cross[..., :-1] - shift * mean
    square = np.trace(gram[:, :-1, :-1], axis1=1, axis2=2) / sums.size
    variance = np.trace(covariance, axis1=1, axis2=2) / sums.size
    # a group whose input never varies gets a penalty all the same
    variance = np.maximum(variance, _LEAST_VARIANCE * square)
    variance = np.where(variance > 0, variance, 1.0)[:, None, None]
    ridged = covariance + penalty * variance * np.eye(covariance.shape[-1])
    weights = np.linalg.solve(ridged, cross.swapaxes(1, 2)).swapaxes(1, 2)
    bias = shift - (weights * mean).sum(axis=-1, keepdims=True)
    return np.concatenate([weights, bias], axis=-1)
