"""A range that leaves out the rarest values on either side."""

from __future__ import annotations

import numpy as np

from edgepress.calibration._histogram import HistogramCalibrator
from edgepress.calibration.base import CalibrationError, Range


class Percentile(HistogramCalibrator):
    """The range that holds the given percentage of all values.

    Half of the rest is cut from either side, rounded outwards to the edge of a histogram bin, so
    that at least `percentile` per cent of the values lie inside.

    Args:
        percentile: in per cent, above 0 and at most 100, where nothing is cut.
        bins: of the histogram; the range is as fine as one bin.

    Raises:
        CalibrationError: the percentile is out of bounds.
    """

    def __init__(self, *, percentile: float = 99.99, bins: int = 8192) -> None:
        if not 0.0 < percentile <= 100.0:
            raise CalibrationError(
                f"percentile is {percentile:g}; it must be above 0 and at most 100."
            )
        super().__init__(bins)
        self.percentile = percentile

    def choose(self, low: float, high: float) -> Range:  # noqa: ARG002 - the edges hold them
        """Cut the rarest values on either side."""
        counts, edges = self.counts, self.edges
        cut = counts.sum() * (100.0 - self.percentile) / 200.0
        first = int(np.argmax(np.cumsum(counts) > cut))
        last = self.bins - 1 - int(np.argmax(np.cumsum(counts[::-1]) > cut))
        return Range(float(edges[first]), float(edges[last + 1]))
