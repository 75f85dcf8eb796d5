"""The range that loses least in the mean square, by weighing clipping against rounding."""

from __future__ import annotations

import numpy as np

from edgepress.calibration._histogram import HistogramCalibrator
from edgepress.calibration.base import Range


class Mse(HistogramCalibrator):
    """The clip thresholds that minimise the mean squared error of 8-bit affine quantization.

    A value inside the range is rounded, which costs `scale² / 12` in the mean; a value outside is
    clipped, which costs its squared distance to the range; an exact zero costs nothing. Both
    costs come from prefix sums over the histogram, so all pairs of candidate thresholds are
    compared at once. Minimising the sum of clipping and rounding noise is the criterion of Banner
    et al., "Post training 4-bit quantization of convolutional networks" (ACIQ, 2019), and of Sakr
    et al., "Optimal Clipping and Magnitude-aware Differentiation" (OCTAV, 2022).

    Args:
        bins: of the histogram.
        candidates: thresholds tried on each side of zero, evenly spaced out to the extreme.
        levels: steps of the quantizer, 255 for 8 bits.
    """

    def __init__(self, *, bins: int = 4096, candidates: int = 256, levels: int = 255) -> None:
        super().__init__(bins)
        self.candidates, self.levels = candidates, levels

    def choose(self, low: float, high: float) -> Range:
        """Compare all pairs of thresholds."""
        counts, edges = self.counts, self.edges
        centres = (edges[:-1] + edges[1:]) / 2
        steps = np.arange(1, self.candidates + 1) / self.candidates
        # a range without 0 is widened to 0 by the quantizer: that side has nothing to choose
        lows = np.array([0.0]) if low >= 0.0 else low * steps
        highs = np.array([0.0]) if high <= 0.0 else high * steps

        # [3, bins + 1]: count, sum and sum of squares of everything below each edge
        moments = np.stack([counts, counts * centres, counts * centres**2])
        below = np.concatenate([np.zeros((3, 1)), np.cumsum(moments, axis=1)], axis=1)
        total = below[:, -1:]
        left = below[:, np.searchsorted(centres, lows)]
        right = total - below[:, np.searchsorted(centres, highs, side="right")]
        clip_left = left[2] - 2 * lows * left[1] + lows**2 * left[0]
        clip_right = right[2] - 2 * highs * right[1] + highs**2 * right[0]

        scale = (highs[None, :] - lows[:, None]) / self.levels
        inside = total[0] - left[0][:, None] - right[0][None, :] - self.zeros
        cost = inside * scale**2 / 12 + clip_left[:, None] + clip_right[None, :]
        best_low, best_high = np.unravel_index(int(np.argmin(cost)), cost.shape)
        return Range(float(lows[best_low]), float(highs[best_high]))
