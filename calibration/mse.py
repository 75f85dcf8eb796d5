"""The range that loses least in the mean square, by weighing clipping against rounding."""

from __future__ import annotations

import numpy as np

from edgepress.calibration._histogram import Floats, HistogramCalibrator
from edgepress.calibration.base import Array, Range


class Mse(HistogramCalibrator):
    """The clip thresholds that minimise the mean squared error of 8-bit affine quantization.

    A value inside the range is rounded, which costs `scale² / 12` in the mean; a value outside is
    clipped, which costs its squared distance to the range. Both come from prefix sums over the
    histogram, so all pairs of candidate thresholds are compared at once. Values that rectifiers
    pile up are counted apart: zeros cost nothing, and those at either extreme cost what the
    quantizer really makes of them. Minimising the sum of clipping and rounding noise is the
    criterion of Banner et al., "Post training 4-bit quantization of convolutional networks"
    (ACIQ, 2019), and of Sakr et al., "Optimal Clipping and Magnitude-aware Differentiation"
    (OCTAV, 2022).

    Args:
        bins: of the histogram.
        candidates: thresholds tried on each side of zero, evenly spaced out to the extreme.
        levels: steps of the quantizer, 255 for 8 bits.
    """

    def __init__(self, *, bins: int = 4096, candidates: int = 256, levels: int = 255) -> None:
        super().__init__(bins)
        self.candidates, self.levels = candidates, levels
        self._zeros = self._at_low = self._at_high = 0

    def observe(self, values: Array, sweep: int) -> None:
        """Take in the values of one sample, of any shape."""
        super().observe(values, sweep)
        if sweep == 1:
            self._zeros += values.size - int(np.count_nonzero(values))
            self._at_low += int(np.count_nonzero(values == self._low)) if self._low else 0
            self._at_high += int(np.count_nonzero(values == self._high)) if self._high else 0

    def choose(self, low: float, high: float) -> Range:
        """Compare all pairs of thresholds."""
        counts, edges = self.counts, self.edges
        counts[0] -= self._at_low
        counts[-1] -= self._at_high
        centres = (edges[:-1] + edges[1:]) / 2
        steps = np.arange(1, self.candidates + 1) / self.candidates
        # a range without 0 is widened to 0 by the quantizer: that side has nothing to choose
        lows = (np.array([0.0]) if low >= 0.0 else low * steps)[:, None]
        highs = (np.array([0.0]) if high <= 0.0 else high * steps)[None, :]

        # [3, bins + 1]: count, sum and sum of squares of everything below each edge
        moments = np.stack([counts, counts * centres, counts * centres**2])
        below = np.concatenate([np.zeros((3, 1)), np.cumsum(moments, axis=1)], axis=1)
        left = below[:, np.searchsorted(centres, lows)]
        right = below[:, -1:, None] - below[:, np.searchsorted(centres, highs, side="right")]
        clipped = sum(
            part[2] - 2 * threshold * part[1] + threshold**2 * part[0]
            for part, threshold in ((left, lows), (right, highs))
        )
        scale = (highs - lows) / self.levels
        inside = counts.sum() - self._zeros - left[0] - right[0]
        cost = clipped + inside * scale**2 / 12
        for count, value in ((self._at_low, low), (self._at_high, high)):
            cost = cost + count * self._error(value, lows, scale) ** 2
        best_low, best_high = np.unravel_index(int(np.argmin(cost)), cost.shape)
        return Range(float(lows[best_low, 0]), float(highs[0, best_high]))

    def _error(self, value: float, lows: Floats, scale: Floats) -> Floats:
        """What quantizing one value gets wrong, for every pair of thresholds."""
        zero_point = np.rint(-lows / scale)
        integer = np.clip(np.rint(value / scale) + zero_point, 0, self.levels)
        error: Floats = (integer - zero_point) * scale - value
        return error
