"""The range whose quantized distribution diverges least from the observed one (TensorRT's way)."""

from __future__ import annotations

import numpy as np

from edgepress.calibration._histogram import HistogramCalibrator
from edgepress.calibration.base import Array, Range


class Entropy(HistogramCalibrator):
    """The clip threshold with the least Kullback-Leibler divergence.

    Magnitudes are counted; a threshold after `i` bins turns the first `i` counts into the
    reference distribution P, with everything beyond added to its last bin, and merging those bins
    into `levels` groups, each spread evenly over its non-empty bins, gives the quantized
    distribution Q. The threshold that minimises KL(P‖Q) wins. Method: S. Migacz, "8-bit Inference
    with TensorRT", GTC 2017. As in NVIDIA's pytorch-quantization, the bin of zero takes the count
    of its neighbour: zeros are represented exactly, and after a ReLU they would drown the rest.
    Groups are spread evenly (onnxruntime and MXNet put all left-over bins into the last group).

    KL(P‖Q) needs only sums over each group, because Q is constant on it; with prefix sums all
    thresholds are compared in one array expression.

    A tensor with both signs gets a symmetric threshold and half of the levels; one with a single
    sign gets all of them. The range never exceeds the extremes.

    Args:
        bins: of the histogram.
        levels: of the quantizer, 256 for 8 bits.
    """

    def __init__(self, *, bins: int = 2048, levels: int = 256) -> None:
        super().__init__(bins)
        self.levels = levels

    def extent(self, low: float, high: float) -> tuple[float, float]:
        """Cover the magnitudes."""
        return 0.0, max(abs(low), abs(high))

    def binned(self, values: Array) -> Array:
        """Count magnitudes."""
        return np.abs(values)

    def choose(self, low: float, high: float) -> Range:
        """Compare all thresholds."""
        counts = self.counts
        counts[0] = counts[1]
        levels = self.levels if low >= 0.0 or high <= 0.0 else self.levels // 2
        divergence = divergences(counts, levels)
        threshold = float(self.edges[levels + int(np.argmin(divergence))])
        return Range(-threshold, threshold)


def divergences(counts: Array, levels: int) -> Array:
    """KL(P‖Q) in nats of every threshold from `levels` bins to all of them.

    Args:
        counts: `[bins]` of magnitudes.
        levels: groups that Q has, at most `bins`.

    Returns:
        `[bins - levels + 1]` float64; inf where Q is 0 and P is not.
    """
    counts = counts.astype(np.float64)
    bins = counts.size
    kept = np.arange(levels, bins + 1)
    below = np.concatenate([[0.0], np.cumsum(counts)])
    full = np.concatenate([[0.0], np.cumsum(counts > 0)])
    # Σ p·log p below each edge, before the outliers join the last bin
    spread = np.concatenate([[0.0], np.cumsum(counts * _log(counts))])

    last, outliers = counts[kept - 1], below[-1] - below[kept]
    p_log_p = spread[kept - 1] + (last + outliers) * _log(last + outliers)

    starts = kept[:, None] * np.arange(levels + 1) // levels
    mass = np.diff(below[starts], axis=1)
    nonempty = np.diff(full[starts], axis=1)
    nonempty[:, -1] += (last == 0) & (outliers > 0)
    p_mass = mass.copy()
    p_mass[:, -1] += outliers
    with np.errstate(divide="ignore", invalid="ignore"):
        p_log_q = np.where(p_mass > 0, p_mass * np.log(mass / nonempty), 0.0).sum(axis=1)
        q_total = below[kept]
        divergence: Array = (p_log_p - p_log_q) / below[-1] - np.log(below[-1]) + np.log(q_total)
    divergence[~np.isfinite(divergence)] = np.inf
    return divergence


def _log(counts: Array) -> Array:
    """The natural logarithm, and 0 of 0, since 0·log 0 counts as 0."""
    return np.log(np.where(counts > 0, counts, 1.0))
