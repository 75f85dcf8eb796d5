"""A streaming histogram in two sweeps: exact extremes first, then counts over fixed bins.

The bins are decided by the extremes of all samples, and counts are integers: the result depends
neither on the order of the samples nor on how they are batched, and takes the memory of the bins
only. (Histograms that grow while they fill, as in onnxruntime and MXNet, depend on the order.)
"""

from __future__ import annotations

import math
from abc import abstractmethod

import numpy as np
import numpy.typing as npt

from edgepress.calibration.base import Array, CalibrationError, Calibrator, Range, extremes

Floats = npt.NDArray[np.float64]


class HistogramCalibrator(Calibrator):
    """What the calibrators that need a distribution share.

    Attributes:
        bins: number of bins.
    """

    sweeps = 2

    def __init__(self, bins: int) -> None:
        self.bins = bins
        self._low, self._high = math.inf, -math.inf
        self._counts = np.zeros(bins, np.int64)

    def extent(self, low: float, high: float) -> tuple[float, float]:
        """Return what the bins must cover, given the extremes of all values."""
        return low, high

    def binned(self, values: Array) -> Array:
        """Return what is counted of the values; a calibrator may count magnitudes."""
        return values

    @abstractmethod
    def choose(self, low: float, high: float) -> Range:
        """Choose the range; `low < high` are the extremes, `counts` and `edges` are complete."""

    @property
    def counts(self) -> Floats:
        """`[bins]`: how many values fell into each bin."""
        return self._counts.astype(np.float64)

    @property
    def edges(self) -> Floats:
        """`[bins + 1]`: the bins' edges."""
        return np.linspace(*self.extent(self._low, self._high), self.bins + 1)

    def observe(self, values: Array, sweep: int) -> None:
        """Take in the values of one sample, of any shape: extremes in sweep 0, counts in 1."""
        if not values.size:
            return
        if sweep == 0:
            low, high = extremes(values)
            self._low, self._high = min(self._low, low), max(self._high, high)
            return
        low, high = self.extent(self._low, self._high)
        if low == high:
            return
        # float64: the span of float32 extremes may overflow float32
        place = self.binned(values).astype(np.float64).ravel()
        place -= low
        place *= self.bins / (high - low)
        index = place.astype(np.intp)
        np.clip(index, 0, self.bins - 1, out=index)
        self._counts += np.bincount(index, minlength=self.bins)

    def range(self) -> Range:
        """Return the range, inside the extremes. Raises CalibrationError without observations."""
        low, high = self._low, self._high
        if low > high:
            raise CalibrationError(
                f"{type(self).__name__.lower()} saw no values; observe at least one sample."
            )
        if low == high:
            return Range(low, high)
        if not self._counts.any():
            raise CalibrationError(
                f"{type(self).__name__.lower()} needs two sweeps over the samples; it got one."
            )
        chosen = self.choose(low, high)
        return Range(max(low, chosen.low), min(high, chosen.high))
